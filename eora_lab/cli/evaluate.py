"""`eora-lab evaluate`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from eora_lab.cli.options import Dtype, Evaluation


@dataclass(frozen=True)
class Evaluate:
    """Measure the perplexity of a model or of a run folder."""

    model: Annotated[str, tyro.conf.Positional] = "smollm2-135m"
    """embedded model, hub id, model folder, or run folder"""
    adapter: str | None = None
    """PEFT adapter folder to use with a run folder's compressed weights, in place of its own; off: none"""
    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")] = field(default_factory=Evaluation)
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.adapters import use_only
        from eora_lab.evaluate import perplexity
        from eora_lab.runs import load_model_or_run

        model, tokenizer = load_model_or_run(self.model, self.dtype, self.device)
        if self.adapter:
            use_only(model, self.adapter)
        windows = self.evaluation.tokens(tokenizer)
        value = perplexity(model, windows, progress=True)
        print(f"perplexity {value:.4f} on {len(windows)} x {windows.shape[1]} tokens of {self.evaluation.source}")
