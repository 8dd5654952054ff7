"""What cells are doing now, in files of their store, for who looks on from another process or machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from eora_lab.errors import EoraLabError, WriteError
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.store import CELL, ResultStore
from eora_lab.files import read_json, write_json
from eora_lab.progress import Step, Watch, watching

FOLDER = "running"  # of the store
EVERY = 1.0  # seconds between two notes
FORGOTTEN = 3600.0  # seconds without one, after which a cell counts as killed


@dataclass(frozen=True)
class Running:
    """A cell, where it is, and when it began and was last heard of, in seconds since 1970."""

    cell: Cell
    step: Step
    began: float
    heard: float


@contextmanager
def noted(store: ResultStore, config: dict, watch: Watch | None = None) -> Iterator[None]:
    """Note in the store where the cell is that is computed within. watch: who is told of every step besides."""
    path = note_of(store.folder, config)
    began, last = time.time(), 0.0

    def note(step: Step) -> None:
        nonlocal last
        if watch:
            watch(step)
        if time.time() - last >= EVERY:
            last = time.time()
            with suppress(WriteError):  # it is only news
                write_json(path, {"config": config, "step": asdict(step), "began": began, "heard": last})

    try:
        with watching(note):
            yield
    finally:
        path.unlink(missing_ok=True)


def note_of(store: Path, config: dict) -> Path:
    """The file of a running cell, there or not."""
    return store / FOLDER / ResultStore(store).path(config).name


def running(store: ResultStore) -> list[Running]:
    """The cells that run now, the longest first."""
    found = []
    for path in (store.folder / FOLDER).glob(CELL):
        with suppress(EoraLabError, KeyError, TypeError, ValueError):  # gone meanwhile, or none of ours
            note = read_json(path)
            one = Running(
                Cell.from_config(note["config"]), Step(**note["step"]), float(note["began"]), float(note["heard"])
            )
            if time.time() - one.heard < FORGOTTEN:
                found.append(one)
    return sorted(found, key=lambda one: one.began)
