"""`eora-lab generate`."""

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
    adapter: tuple[str, ...] = ()
    """PEFT adapter folder to use with a run folder's compressed weights, in place of its own; off: none; several: the
    continuation with each, all in one batch (own: the run's)"""
    tokens: int = 48
    """how many tokens to add at the most"""
    temperature: float = 0.0
    """0: always the likeliest token"""
    seed: int = 0
    """seed of the sampling"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)

    def run(self) -> None:
        from eora_lab.model.generate import generate, generate_each
        from eora_lab.run.adapters import OFF, OWN, Adapters, use_only

        model, tokenizer = self.loading.load(self.model)
        settings = self.tokens, self.temperature, self.seed
        if len(self.adapter) > 1:
            folders = {name: name for name in dict.fromkeys(self.adapter) if name not in (OWN, OFF)}
            with Adapters(model, folders).batch([None if name == OFF else name for name in self.adapter]):
                written = generate_each(model, tokenizer, [self.prompt] * len(self.adapter), *settings)
            for name, text in zip(self.adapter, written, strict=True):
                print(f"[{name}] {self.prompt}{text}")
            return
        if self.adapter and self.adapter[0] != OWN:
            use_only(model, self.adapter[0])
        print(self.prompt + generate(model, tokenizer, self.prompt, *settings))
