"""Run one cell and keep what it gave."""

from eora_lab.errors import EoraLabError, WriteError, machine_error
from eora_lab.experiment.cache import ContentCache
from eora_lab.experiment.cells import Cell, run_cell
from eora_lab.experiment.identity import Identities
from eora_lab.experiment.running import noted
from eora_lab.experiment.store import ResultStore
from eora_lab.progress import Watch, at


def run_and_keep(
    cell: Cell,
    highest: int,
    store: ResultStore,
    cache: ContentCache,
    identities: Identities,
    batch_size: int = 8,
    device: str = "cpu",
    progress: bool = False,
    watch: Watch | None = None,
) -> str:
    """Run a cell and keep its result, or its error, in the store. Returns the error, empty when there was none.

    Where the machine failed (`machine_error`), nothing is kept: that says nothing about the cell, which is run again
    the next time. Only Ctrl-C stops a sweep, a watcher, and a store that cannot be written: WriteError.

    watch: is told of every step, and may raise Stopped: the cell is not kept. What it has in the cache is.
    """
    try:
        with noted(store, cell.config(), watch):
            at("load")
            result, cost = run_cell(cell, cache, highest, batch_size, device, progress)
    except Exception as error:
        failure = machine_error(error)
        if isinstance(failure, WriteError):
            raise failure from error
        if failure:
            return str(failure)
        message = str(error) if isinstance(error, EoraLabError) else f"{type(error).__name__}: {error}"
        store.put(cell.config(), identities.of(cell), error=message or type(error).__name__)
        return message
    store.put(cell.config(), identities.of(cell), result=result, cost=cost)
    return ""
