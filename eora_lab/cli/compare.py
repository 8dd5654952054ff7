"""`eora-lab compare`."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.early import check_cells, check_figure
from eora_lab.cli.options import axes, say_start
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation

RecipeAxes = axes(Recipe, method=("none", "svd", "qera_approx", "eora"))


@dataclass(frozen=True)
class Compare:
    """Print the perplexity of several methods, ranks and bits, same texts for all: every setting may have many values.

    With --inputs original, one calibration pass serves all rows, and rows that differ in the path share their base.
    """

    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    recipe: Annotated[RecipeAxes, tyro.conf.arg(name="")] = field(default_factory=RecipeAxes)  # type: ignore[valid-type]
    budget: tuple[Literal["uniform", "relative", "absolute", "nats"], ...] = ("uniform",)
    """how the parameters of that rank are spread over layers: the same rank in each, or where they remove most output
    error (relative to each layer's output, or absolute, or in nats of the model's loss with eora_fisher)"""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    store: Path | None = None
    """keep results there, one file a row, and take from there what it has (as eora-lab sweep does)"""
    figure: Path | None = None
    """draw the table as .png and .svg, with its numbers beside as .csv"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.experiment.compare import compare, format_row, header
        from eora_lab.experiment.store import ResultStore
        from eora_lab.experiment.sweep import expand
        from eora_lab.files import check_table, write_atomically

        check_figure(self.figure)
        if self.figure:
            check_table(self.figure.with_suffix(".csv"), ("model", "text", "base", "method"))
        judged = {"model": self.model} | asdict(self.evaluation)
        several = asdict(self.recipe) | {"budget": self.budget}
        several = {name: list(value) if isinstance(value, tuple) else value for name, value in several.items()}
        cells = expand([judged | {"compressor": "dense"}, judged | asdict(self.calibration) | several])
        check_cells(cells)
        texts, calibration = list(self.evaluation.perplexity), self.calibration
        print(
            f"{self.model}, {' and '.join(several['inputs'])} inputs: {calibration.nsamples} x {calibration.seqlen} "
            f"tokens of {calibration.text}; perplexity on {self.evaluation.windows or 'all'} x "
            f"{self.evaluation.window_length} of {', '.join(texts)}"
        )
        print(header(texts), flush=True)
        rows = []
        with tempfile.TemporaryDirectory(prefix="eora-lab-") as folder:
            store = ResultStore(self.store or folder)
            for row in compare(cells, store, self.device):
                rows.append(row)
                print(format_row(row, texts), flush=True)
            kept = store.get(cells[0].config())
            say_start(kept["result"].get("bos", "") if kept else "")
        if self.figure:
            from eora_lab.experiment.compare import table
            from eora_lab.plots import plot_comparison, save

            frame, numbers = table(rows, self.model), self.figure.with_suffix(".csv")
            write_atomically(numbers, lambda to: frame.to_csv(to, index=False))
            for path in (numbers, *save(plot_comparison(frame), self.figure)):
                print(f"wrote {path}")
