"""The run folder of a pass that several processes share: the first one writes, and all read what it wrote."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from eora_lab.calibrate.processes import Processes
from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.folder import HIDDEN, RunFolder, open_folder, read_config
from eora_lab.run.report import LayerReport, Report


@contextmanager
def open_shared(
    path: Path | str, settings: dict, blocks: int, processes: Processes, keeps_hidden: bool = False
) -> Iterator[RunFolder]:
    """`open_folder` for all processes at once, on a file system that all of them see. Raises EoraLabError in all alike.

    blocks: of the model.
    """
    with ExitStack() as stack:
        run = None
        with processes.agree():
            if not processes.rank:
                run = stack.enter_context(open_folder(path, settings, keeps_hidden))
        if processes.count == 1:
            assert run
            yield run
            return
        done = processes.first(lambda: [index for index in range(blocks) if run and run.has_block(index)])
        yield SharedFolder(Path(path), run, done, processes, keeps_hidden)


class SharedFolder(RunFolder):
    """A `RunFolder` as each of the processes has it. run: that of the first one, which alone writes.

    But for hidden states: each keeps its own, for as many processes to go on from.
    """

    def __init__(
        self, path: Path, run: RunFolder | None, done: list[int], processes: Processes, keeps_hidden: bool = False
    ):
        self.path, self._run, self._done, self._processes = path, run, set(done), processes
        own = f"process-{processes.rank}-of-{processes.count}"
        self.hidden = path / HIDDEN / own if keeps_hidden else None
        with processes.agree():
            try:
                self.settings = read_config(path)["settings"]
            except EoraLabError as error:
                raise EoraLabError(f"{path} is not seen here: choose a folder that all processes see") from error

    def _write(self, write: Callable[[RunFolder], object]) -> None:
        with self._processes.agree():
            if self._run:
                write(self._run)

    def planned(self, plan: Callable[[], dict[str, int]]) -> dict[str, int]:
        """As of a run folder; all processes plan together."""
        known = self._processes.first(lambda: self._run and self._run.has_plan)
        ranks = {} if known else plan()
        return self._processes.first(lambda: self._run.planned(lambda: ranks) if self._run else {})

    def has_block(self, index: int) -> bool:
        """As the first process found it."""
        return index in self._done

    def save_block(self, index: int, modules: dict[str, CompensatedLinear], layers: list[LayerReport]) -> None:
        """Store a finished block."""
        self._write(lambda run: run.save_block(index, modules, layers))

    def drop_hidden(self) -> None:
        """Hidden states are not needed any more, of no process."""
        self._write(lambda run: run.drop_hidden())

    def load_block(self, index: int, model: nn.Module) -> list[LayerReport]:
        """As of a run folder, in all processes."""
        with self._processes.agree():
            return super().load_block(index, model)

    def finish(self, report: Report, model: nn.Module) -> None:
        """Write the adapter and the report."""
        self._write(lambda run: run.finish(report, model))
