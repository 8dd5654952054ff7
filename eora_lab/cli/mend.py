"""`eora-lab mend`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.passes import Pass
from eora_lab.run.recipe import PassSettings, PathSettings


@dataclass(frozen=True, kw_only=True)
class Mend(Pass):
    """Compensate a compressed model that exists already, and keep the result in a run folder.

    The original model gives the weights that the checkpoint was made from; its own codes stay as they are. An
    interrupted run resumes when it is started again with the same settings. `eora-lab adapter export` then writes the
    adapter for the runtime of the checkpoint.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """the compressed model: a folder, or a .gguf file"""
    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str
    """the original model: embedded model, hub id, or folder"""
    format: str | None = None
    """what the checkpoint is, such as gptq; by default what is in it tells"""
    reround: bool = False
    """give the weights other codes on the grids that they have, so that the outputs suffer less; with --method none for
    runtimes that take no adapter: eora-lab export writes the result"""
    rounds: int = 1
    """with --reround: how often at most, in turn with the low-rank path; above 1 the weights need their path"""
    path: Annotated[PathSettings, tyro.conf.arg(name="")] = field(default_factory=PathSettings)
    measured: Annotated[PassSettings, tyro.conf.arg(name="")] = field(default_factory=PassSettings)

    def run(self) -> None:
        from eora_lab.calibrate.processes import Processes, group
        from eora_lab.environment import timed
        from eora_lab.errors import EoraLabError
        from eora_lab.formats import read_checkpoint

        with timed(), group(self.device) as device:
            with Processes.of_group().agree():
                checkpoint = read_checkpoint(self.checkpoint, self.format)
                if self.rounds > 1 and not self.reround:
                    raise EoraLabError("--rounds is of --reround: without it the weights stay as they are")
            settings = asdict(self.path) | asdict(self.measured) | {"rounds": self.rounds}
            self.make(self.model, self.output, settings, device, checkpoint, self.reround)
