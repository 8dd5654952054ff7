"""`eora-lab finetune`."""

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.options import say_start
from eora_lab.finetune.settings import Init, Training
from eora_lab.text.settings import Calibration, Evaluation


@dataclass(frozen=True)
class Finetune:
    """Train the low-rank path of a compressed model: from EoRA, from an SVD, or from LoRA's own start.

    The compressed weights stay frozen. OUTPUT/eora (svd, lora) becomes a PEFT adapter, with its checkpoints and its
    loss curve (log.json). An interrupted training resumes when it is started again with the same settings.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """run folder of the compressed model"""
    output: Annotated[Path, tyro.conf.Positional]
    """folder to write"""
    init: tuple[Init, ...] = ("eora",)
    """starts, each trained on its own: eora (solved from the training text), svd (of the weight error), or lora
    (A random, B zero)"""
    rank: int = 64
    """rank of the path in every layer"""
    training: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=Training)
    data: Annotated[Calibration, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Calibration(nsamples=800, seqlen=256)
    )
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(window_length=256))
    device: str = "cpu"
    """cpu or cuda"""
    base: str | None = None
    """the base model of the run, where it is no longer in its place"""

    def run(self) -> None:
        import torch

        from eora_lab.finetune.finetune import finetune
        from eora_lab.model.start import start_text
        from eora_lab.run.folder import claim_folder, load_original, load_run, read_config

        model, tokenizer, _ = load_run(self.run_folder, device=self.device, model=self.base)
        original = load_original(self.run_folder, self.device, self.base)
        say_start(start_text(tokenizer))
        tokens = self.data.batches(original, tokenizer)
        held_out = torch.cat(list(self.evaluation.tokens(tokenizer).values()))
        base = read_config(self.run_folder)["settings"]
        settings = asdict(self.training) | asdict(self.data) | {"rank": self.rank, "weights": base["weights"]}
        settings |= {f"evaluation.{key}": value for key, value in asdict(self.evaluation).items()}
        claim_folder(self.output, settings | {"base": str(self.run_folder.resolve())}, "finetune.json")
        columns = "{:6} {:>14} {:>14} {:>16} {:>14}"
        rows: list[tuple[str, ...]] = [("start", "train: first", "last quarter", "held-out: first", "last")]
        for init in self.init:
            folder = self.output / init
            log = finetune(model, original, tokens, held_out, folder, self.training, init, self.rank, self.data.seed)
            train, judged = ([entry[key] for entry in log if key in entry] for key in ("loss", "eval_loss"))
            quarter = train[-max(1, len(train) // 4) :]
            losses = train[0], sum(quarter) / len(quarter), judged[0], judged[-1]
            rows.append((init, *(f"{value:.4f}" for value in losses)))
            hint = shlex.join(["eora-lab", "evaluate", str(self.run_folder), "--adapter", str(folder)])
            print(f"wrote {folder}: try  {hint}", flush=True)
        texts = ", ".join(self.evaluation.perplexity)
        print(f"loss in nats a token; held-out: {len(held_out)} x {held_out.shape[1]} of {texts}")
        for row in rows:
            print(columns.format(*row))
