"""`eora-lab compress`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.passes import Pass
from eora_lab.run.recipe import Recipe


class Asked(Recipe):
    """Settings of a recipe that are checked once `--recipe` has filled them up, by `of_name`."""

    def check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Compress(Pass):
    """Compress a model, compensate it, and keep the result in a run folder.

    The folder holds the packed weights, the low-rank path as a PEFT adapter, the configuration and the report. An
    interrupted run resumes when it is started again with the same settings.

    `eora-lab compress runs/best --recipe best` is there to lose less in the same bytes, and takes longer: errors count
    as what they cost the model, by gradients, ranks are spread by that, and every layer aims at the outputs of the
    original model, as far as that helps on the eighth of the samples that is held out. Each of these has a setting of
    its own: --method, --budget.objective, --inputs with --true-sequential.

    Not all linears need to be compressed: `eora-lab compress runs/part --skip "o_proj|down_proj" --keep-first 1` leaves
    two linears of every block and the whole first block as they are, `--only mlp` all outside the MLPs. The report says
    what was left, and why.

    `torchrun --nproc-per-node 4 -m eora_lab.cli compress runs/first` shares the pass among four processes, each with a
    GPU of its own where --device is cuda; the files are those of one process.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="", constructor=Asked)] = field(default_factory=Asked)

    def run(self) -> None:
        from eora_lab.calibrate.processes import group
        from eora_lab.environment import timed

        with timed(), group(self.device) as device:
            self.make(self.model, self.output, asdict(self.recipe), device)
