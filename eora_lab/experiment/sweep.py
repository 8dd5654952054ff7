"""Run a grid of experiments into a result store: every cell once, whatever fails or is killed on the way."""

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from eora_lab.errors import EoraLabError, at_least
from eora_lab.experiment.cache import ContentCache
from eora_lab.experiment.cells import DENSE, MEASURED, Cell, load
from eora_lab.experiment.estimate import check_memory, model_shape, seconds
from eora_lab.experiment.identity import Identities, differences
from eora_lab.experiment.job import run_and_keep
from eora_lab.experiment.store import ResultStore
from eora_lab.files import digest
from eora_lab.progress import Step, Stopped, Watch

if TYPE_CHECKING:
    import pandas

FORM = "a grid is a mapping from settings to values, or a list of such mappings"
Ablation = Mapping | list  # field -> value or values; or several such mappings, or cells, one after another


def expand(grid: Ablation) -> list[Cell]:
    """All cells of a grid, each once. The last field varies fastest.

    Raises EoraLabError for an unknown field, a value of a wrong type, or a grid of another form.
    """
    parts = grid if isinstance(grid, list) else [grid]
    cells: dict[str, Cell] = {}
    for part in parts:
        if isinstance(part, Cell):
            cells.setdefault(digest(part.config()), part)
            continue
        if not isinstance(part, Mapping):
            raise EoraLabError(FORM)
        axes = [value if isinstance(value, list) and name not in MEASURED else [value] for name, value in part.items()]
        for values in itertools.product(*axes):
            cell = Cell.from_config(dict(zip(part, values, strict=True)))
            cells.setdefault(digest(cell.config()), cell)
    if not cells:
        raise EoraLabError("the grid is empty")
    return list(cells.values())


def named_grids() -> dict[str, Path]:
    """The ablations that ship with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "grids").glob("*.yaml"))}


def read_grid(path: Path | str) -> Ablation:
    """A grid from a YAML file, or one of `named_grids`. Raises EoraLabError when it cannot be read."""
    import yaml

    if not Path(path).exists():
        path = named_grids().get(str(path), path)
    try:
        grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise EoraLabError(f"cannot read the grid {path}: {reason} (named ones: {', '.join(named_grids())})") from error
    if not isinstance(grid, Mapping | list):
        raise EoraLabError(f"{path} holds no grid: {FORM}")
    return grid


def on_model(grid: Ablation, model: str) -> Ablation:
    """The same grid for another model. Raises EoraLabError when it is no grid."""
    if not all(isinstance(part, Mapping) for part in (grid if isinstance(grid, list) else [grid])):
        raise EoraLabError(FORM)
    return [dict(part) | {"model": model} for part in (grid if isinstance(grid, list) else [grid])]


def highest_ranks(cells: Iterable[Cell]) -> dict[str, int]:
    """Digest of a cell's configuration -> the highest rank of those that differ from it in the rank alone.

    Taken over the whole grid, so that a resumed sweep solves as an undisturbed one does.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        without_rank = {name: value for name, value in cell.config().items() if name not in ("rank", "factor_bits")}
        groups.setdefault(digest(without_rank), []).append(cell)
    return {
        digest(cell.config()): max(other.recipe.rank if other.recipe else 0 for other in group)
        for group in groups.values()
        for cell in group
    }


@dataclass(frozen=True)
class Plan:
    """What a sweep has left to do."""

    todo: list[Cell]
    done: int
    failed: int  # in the store with an error; not run again unless asked for
    stale: int  # of those to run: in the store, but measured with another model, text or code
    changed: tuple[str, ...]  # what is another one there
    seconds: float | None
    basis: str  # what the seconds rest on
    memory: int | None  # bytes
    reasons: tuple[str, ...] = ()  # of those that failed

    def __str__(self) -> str:
        total = len(self.todo) + self.done + self.failed
        line = f"{total} cells: {self.done} done, {self.failed} failed before, {len(self.todo)} to run"
        if self.stale:
            line += f" ({self.stale} of them were measured with other {', '.join(self.changed)})"
        if self.todo and self.seconds is not None:
            line += f", about {self.seconds / 60:.1f} min of one worker ({self.basis})"
        return line + (f", about {self.memory / 1e9:.1f} GB of memory" if self.todo and self.memory else "")


def plan(
    cells: list[Cell], store: ResultStore, retry_failed: bool = False, device: str = "cpu", workers: int = 1
) -> Plan:
    """What is left. Cells that share a calibration pass or a base are put next to each other.

    Raises EoraLabError when the memory of the machine cannot hold a cell.
    """
    model_shape.cache_clear()  # a folder may hold another model by now
    identities = Identities()
    todo: list[Cell] = []
    kept: list[dict] = []
    changed: list[list[str]] = []
    for cell in cells:
        found = store.get(cell.config())
        other = differences(found["identity"], identities.of(cell)) if found else []
        if found is None or other or (retry_failed and found["status"] == "failed"):
            todo.append(cell)
            changed += [other] if other else []
        else:
            kept.append(found)
    todo.sort(key=_kinship)
    time, basis = seconds(todo, list(store.cells()), device)
    what = tuple(sorted({name for names in changed for name in names}))
    memory = check_memory(todo, device, workers)
    reasons = tuple(one["error"] for one in kept if one["status"] == "failed")
    done = len(kept) - len(reasons)
    return Plan(todo, done, len(reasons), len(changed), what, time, basis, memory, reasons)


def tell_failures(reasons: Iterable[str]) -> None:
    """Print to stderr why cells failed: each reason once, with its count, the commonest first."""
    for reason, count in Counter(reasons).most_common():
        print(f"{count} cell{'s' if count > 1 else ''} failed: {reason}", file=sys.stderr)


def _kinship(cell: Cell) -> tuple:
    """Sorts cells with the same statistics together, and among those the ones with the same base and solve."""
    if cell.recipe is None:
        return (cell.model, DENSE)
    texts = digest([cell.base_source, asdict(cell.calibration), cell.recipe.held_out])
    return (cell.model, "sharing", texts, digest(cell.recipe.base_settings()), cell.recipe.method, -cell.recipe.rank)


def sweep(
    grid: Ablation,
    store: ResultStore | Path | str,
    engine: str = "local",
    workers: int = 1,
    address: str | None = None,
    retry_failed: bool = False,
    batch_size: int = 8,
    device: str = "cpu",
    announce: Callable[[Plan], None] = print,
    until: datetime | None = None,
) -> "pandas.DataFrame":
    """Run the cells of a grid that a store does not have yet. Returns the rows of the grid's cells.

    A cell that raises is kept with its error and the sweep goes on; one that the machine failed (no memory, no data) is
    not kept, and has no row. Stopped in any way, a sweep goes on where it was when it is called again; at most the
    cells that were running are run anew.

    engine:   "local": one cell after another, here. "ray": one cell a task, on `workers` processes of this machine, or
              on the cluster at `address`, which must see the same store folder.
    announce: is handed the plan before the first cell runs, and what is left of it where time ran out.
    until:    the (local) time at which it stops, also within a cell: as if it had been killed, at the next of the steps
              that bars show.
    Why cells failed, now or before, goes to stderr.
    Raises EoraLabError when the grid cannot be understood, before anything runs when the memory is too small, and
    when the store cannot be written.
    """
    from eora_lab.progress import tqdm

    store = store if isinstance(store, ResultStore) else ResultStore(store)
    if engine not in ("local", "ray"):
        raise EoraLabError(f"unknown engine {engine!r}; known: local, ray")
    at_least(1, workers=workers, batch_size=batch_size)
    cells = expand(grid)
    left = plan(cells, store, retry_failed, device, workers if engine == "ray" and not address else 1)
    announce(left)

    def watch(_: Step) -> None:
        if until and datetime.now() >= until:
            raise Stopped

    with tqdm(total=len(left.todo), desc="sweep", unit="cell", disable=not left.todo) as bar:
        reasons = list(left.reasons)
        for error in run_plan(left, cells, store, engine, workers, address, batch_size, device, True, watch):
            bar.update()
            if error:
                reasons.append(error)
                bar.set_postfix_str(f"{len(reasons) - left.failed} failed")
        stopped = bar.n < len(left.todo)
    tell_failures(reasons)
    if stopped:
        announce(plan(cells, store, retry_failed, device))
    return rows(cells, store)


def run_plan(
    left: Plan,
    cells: list[Cell],
    store: ResultStore,
    engine: str = "local",
    workers: int = 1,
    address: str | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    progress: bool = False,
    watch: Watch | None = None,
) -> Iterator[str]:
    """Run what a plan has left, a cell a step: its error, empty when there was none. `sweep` with a hand on the brake.

    Who stops asking for the next cell stops the sweep; the cells that were handed out are in the store.

    cells:    the whole grid that `left` is the rest of. The others as for `sweep`.
    progress: show bars within a cell.
    watch:    is told of every step of a cell (on Ray, every second how many cells are done), and ends the sweep there
              by raising Stopped. What the cell has in the cache stays.
    """
    load.cache_clear()  # a folder may hold another model by now
    highest = highest_ranks(cells)
    jobs = [(cell, highest[digest(cell.config())]) for cell in left.todo]
    if engine == "ray":
        from eora_lab.experiment.ray_engine import run_on_ray

        yield from run_on_ray(jobs, store.folder, batch_size, device, workers, address, watch)
    else:
        cache, identities = ContentCache(store.folder / "cache"), Identities(hub=True)
        try:
            for cell, rank in jobs:
                try:
                    error = run_and_keep(cell, rank, store, cache, identities, batch_size, device, progress, watch)
                except Stopped:
                    return
                yield error
        finally:
            load.cache_clear()


def rows(cells: list[Cell], store: ResultStore) -> "pandas.DataFrame":
    """The rows of some cells of a store, in their order; those that it does not have are left out."""
    import pandas

    from eora_lab.experiment.store import row

    return pandas.DataFrame([row(found) for cell in cells if (found := store.get(cell.config()))])
