"""`eora-lab compensate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.compress import run_pass
from eora_lab.cli.options import Dtype
from eora_lab.compensate.budget import Budget
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation


@dataclass(frozen=True)
class Compensate:
    """Compensate a GPTQ checkpoint that exists already, and keep the result in a run folder.

    The original model gives the weights that the checkpoint was made from; its own codes stay as they are. An
    interrupted run resumes when it is started again with the same settings.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """folder of a GPTQ checkpoint"""
    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str
    """the original model: embedded model, hub id, or folder"""
    method: str = "eora"
    """how the error is compensated: none, svd, act_s, qera_approx or eora"""
    rank: int = 64
    """rank of the compensation in every layer; a smaller layer gets the highest that it allows"""
    factor_bits: int = 16
    """bits of A and B: 16, or 2 to 8 on a grid"""
    inputs: Literal["compensated", "original"] = "compensated"
    """where a block's calibration inputs come from: the blocks before it as compressed and compensated, or the
    original model"""
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    evaluate: bool = True
    """measure the perplexity before and after"""
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.formats.gptq_checkpoint import GptqCheckpoint
        from eora_lab.model.load import load_model
        from eora_lab.run.pipeline import check_given

        checkpoint = GptqCheckpoint(self.checkpoint)
        model, tokenizer = load_model(self.model, dtype=self.dtype, device=self.device)
        checkpoint.check_model(model)
        check_given(model, checkpoint)  # the pass does so too, but only after the texts were prepared
        run_pass(
            model,
            tokenizer,
            Recipe(
                **checkpoint.config.recipe(),
                method=self.method,
                rank=self.rank,
                factor_bits=self.factor_bits,
                inputs=self.inputs,
            ),
            self.output,
            budget=self.budget,
            calibration=self.calibration,
            evaluation=self.evaluation if self.evaluate else None,
            weights=checkpoint,
            about={"checkpoint": str(self.checkpoint.resolve())},
        )
