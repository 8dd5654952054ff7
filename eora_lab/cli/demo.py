"""`eora-lab demo`."""

from dataclasses import dataclass
from pathlib import Path

from eora_lab.cli.compare import Compare, RecipeAxes


@dataclass(frozen=True)
class Demo:
    """Compress a real language model to 3 bits and compensate it in four ways (some minutes on two cores).

    SmolLM2-135M, round to nearest in groups of 64, then no compensation, SVD, Act-S and EoRA at rank 64, all on the
    same weights and the same text. Prints a table and draws it. Needs no network after the model was fetched once.
    """

    figures: Path = Path("figures")
    """folder for demo.png, demo.svg and demo.csv"""

    def run(self) -> None:
        axes = RecipeAxes(("rtn",), (3,), method=("none", "svd", "act_s", "eora"), inputs=("original",))
        Compare(recipe=axes, figure=self.figures / "demo.png").run()
