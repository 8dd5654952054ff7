"""`eora-lab mend`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.compress import of_name, run_pass
from eora_lab.model import Dtype
from eora_lab.run.best import Named
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import PassSettings, PathSettings
from eora_lab.text.settings import Calibration, Evaluation


@dataclass(frozen=True)
class Mend:
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
    named: Annotated[Named, tyro.conf.arg(name="recipe")] = "given"
    """given: the settings below; best: those of all parts together that lose less in the same bytes, but for settings
    that differ from their defaults, which stay"""
    path: Annotated[PathSettings, tyro.conf.arg(name="")] = field(default_factory=PathSettings)
    measured: Annotated[PassSettings, tyro.conf.arg(name="")] = field(default_factory=PassSettings)
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    evaluate: bool = True
    """measure the perplexity before and after"""
    imatrix: Path | None = None
    """importance matrix of the original model, of llama-imatrix or `eora-lab imatrix`: nothing is measured, and the
    method has to be one that looks at channels alone, such as qera_approx"""
    dtype: Dtype = "float32"
    """type that the model is held in; in that of its files, mostly bfloat16, the model may be larger than memory"""
    hidden_states: Literal["memory", "disk"] = "memory"
    """where the hidden states of the calibration texts are between two blocks: memory, or disk, which is for more texts
    than memory holds; they then lie in the run folder until the run is finished, and an interrupted run goes on from
    them without running its finished blocks again"""
    device: str = "cpu"
    """cpu or cuda"""

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
                recipe, budget = of_name(self.named, settings, self.budget)
            run_pass(
                self.model,
                recipe,
                self.output,
                budget=budget,
                calibration=self.calibration,
                evaluation=self.evaluation if self.evaluate else None,
                imatrix=self.imatrix,
                dtype=self.dtype,
                device=device,
                hidden_states=self.hidden_states,
                weights=checkpoint,
                reround=self.reround,
            )
