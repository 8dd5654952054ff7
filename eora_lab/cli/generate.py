"""`eora-lab generate`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from eora_lab.model.load import Dtype


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a model or a run folder."""

    model: Annotated[str, tyro.conf.Positional]
    """embedded model, hub id, model folder, or run folder"""
    prompt: Annotated[str, tyro.conf.Positional]
    """text to continue"""
    adapter: str | None = None
    """PEFT adapter folder to use with a run folder's compressed weights, in place of its own; off: none"""
    tokens: int = 48
    """how many tokens to add at the most"""
    temperature: float = 0.0
    """0: always the likeliest token"""
    seed: int = 0
    """seed of the sampling"""
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.model.generate import generate
        from eora_lab.run.adapters import use_only
        from eora_lab.run.folder import load_model_or_run

        model, tokenizer = load_model_or_run(self.model, self.dtype, self.device)
        if self.adapter:
            use_only(model, self.adapter)
        print(self.prompt + generate(model, tokenizer, self.prompt, self.tokens, self.temperature, self.seed))
