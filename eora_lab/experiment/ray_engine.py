"""Run cells on Ray: one cell a task, results in the same store. Ray restarts a cell whose worker dies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eora_lab.errors import EoraLabError, WriteError, one_line
from eora_lab.experiment.cache import ContentCache
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.identity import Identities, differences
from eora_lab.experiment.job import run_and_keep
from eora_lab.experiment.running import EVERY, note_of
from eora_lab.experiment.store import ResultStore
from eora_lab.progress import Step, Stopped, Watch
from eora_lab.run.plugins import load_plugin, plugin_files

RETRIES = 3  # of a cell whose worker died
GRACE = 30.0  # seconds in which workers end


def run_on_ray(
    jobs: list[tuple[Cell, int]],
    folder: Path,
    batch_size: int,
    device: str,
    workers: int,
    address: str | None,
    watch: Watch | None = None,
) -> Iterator[str]:
    """The error of each cell (empty for none) as cells finish, in any order.

    folder:  of the store; on a cluster, one that all its machines see.
    address: of a running cluster; None starts one of `workers` processes here, and stops it at the end.
    watch:   is told every second how many cells are done, and stops all workers by raising Stopped.
    Raises EoraLabError when Ray is not installed, the cluster does not answer, or the store cannot be written.
    """
    try:
        import ray
    except ImportError as error:
        raise EoraLabError('the Ray engine needs ray: make ray, or pip install "eora-lab[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        try:
            local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, **local)
        except (ConnectionError, ValueError) as error:
            raise EoraLabError(f"no Ray cluster answers at {address}: {error}") from error

    folder = folder.resolve()
    remote = ray.remote(num_cpus=1, num_gpus=int(device.startswith("cuda")), max_retries=RETRIES)(run_one)
    try:
        plugins = [str(path) for path in plugin_files()]
        waiting = [remote.remote(c.config(), highest, folder, batch_size, device, plugins) for c, highest in jobs]
        while waiting:
            try:
                if watch:
                    watch(Step("cells", len(jobs) - len(waiting), len(jobs), "cell"))
            except Stopped:
                _cancel(waiting, jobs, folder)
                return
            found, waiting = ray.wait(waiting, num_returns=1, timeout=EVERY)
            if not found:
                continue
            try:
                yield ray.get(found[0])
            except ray.exceptions.RayTaskError as error:  # of the task itself: the cell keeps its own
                if isinstance(error.cause, WriteError):
                    raise error.cause from None
                yield one_line(error.cause)
            except ray.exceptions.RayError as error:  # not kept: the worker died every time, mostly for lack of memory
                yield f"the worker died {RETRIES + 1} times ({type(error).__name__}): use fewer --workers"
    finally:
        if ours:
            ray.shutdown()


def _cancel(waiting: list, jobs: list[tuple[Cell, int]], folder: Path) -> None:
    """Kill the workers of cells that are not done, which leave their notes behind."""
    import ray

    for one in waiting:
        ray.cancel(one, force=True)
    ray.wait(waiting, num_returns=len(waiting), timeout=GRACE)
    for cell, _ in jobs:
        note_of(folder, cell.config()).unlink(missing_ok=True)


def run_one(config: dict, highest: int, folder: Path, batch_size: int, device: str, plugins: list[str]) -> str:
    """What a worker does: `run_and_keep`, unless one that died before it had kept the result already."""
    for path in plugins:
        load_plugin(path)
    store, cell, identities = ResultStore(folder), Cell.from_config(config), Identities(hub=True)
    found = store.get(config)
    if found and found["status"] == "done" and not differences(found["identity"], identities.of(cell)):
        return ""
    return run_and_keep(cell, highest, store, ContentCache(folder / "cache"), identities, batch_size, device)
