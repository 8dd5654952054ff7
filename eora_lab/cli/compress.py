"""`eora-lab compress`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.options import Dtype
from eora_lab.compensate.budget import Budget
from eora_lab.compress import CompressedWeight
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation


@dataclass(frozen=True)
class Compress:
    """Compress a model, compensate it, and keep the result in a run folder.

    The folder holds the packed weights, the low-rank path as a PEFT adapter, the configuration and the report. An
    interrupted run resumes when it is started again with the same settings.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: Recipe("gptq", bits=4))
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
        from eora_lab.model.load import load_model

        model, tokenizer = load_model(self.model, dtype=self.dtype, device=self.device)
        run_pass(
            model,
            tokenizer,
            self.recipe,
            self.output,
            budget=self.budget,
            calibration=self.calibration,
            evaluation=self.evaluation if self.evaluate else None,
        )


def run_pass(
    model,
    tokenizer,
    recipe: Recipe,
    output: Path,
    *,
    budget: Budget,
    calibration: Calibration,
    evaluation: Evaluation | None,
    weights: Mapping[str, CompressedWeight] | None = None,
    about: dict | None = None,
) -> None:
    """Plan the ranks, run the pass into the folder `output`, evaluate and print. `about` is noted in config.json."""
    from eora_lab.calibrate.stream import collect_statistics
    from eora_lab.measure.evaluate import perplexity
    from eora_lab.run.folder import write_report
    from eora_lab.run.pipeline import compress_model
    from eora_lab.run.ranks import plan_ranks

    recipe.check(model, given=weights)
    windows = evaluation.tokens(tokenizer) if evaluation else None
    batches = calibration.batches(model, tokenizer)
    dense = perplexity(model, windows, progress=True) if evaluation else None
    ranks = None
    if budget != Budget():
        ranks = plan_ranks(model, collect_statistics(model, batches), recipe, budget, weights=weights)
    notes = asdict(calibration) | (about or {})
    report = compress_model(
        model, batches, **asdict(recipe), ranks=ranks, folder=output, calibration=notes, weights=weights
    )
    if evaluation:
        report.perplexity = {"dense": dense, "compressed": perplexity(model, windows, progress=True)}
        write_report(output, report)
    print(report)
    print(f"wrote {output}: try  eora-lab generate {output} 'The capital of France is'")
