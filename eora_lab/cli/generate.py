"""`eora-lab generate`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from eora_lab.cli.options import Loading


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
    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)

    def run(self) -> None:
        from eora_lab.layer.linear import backends_in_use
        from eora_lab.model.generate import generate
        from eora_lab.run.adapters import use_only

        model, tokenizer = self.loading.load(self.model)
        if self.adapter:
            use_only(model, self.adapter)
        if used := backends_in_use(model):
            print(f"computing {', '.join(f'{n} layers by {name}' for name, n in used.items())}", file=sys.stderr)
        print(self.prompt + generate(model, tokenizer, self.prompt, self.tokens, self.temperature, self.seed))
