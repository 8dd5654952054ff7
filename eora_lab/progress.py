"""How far a long computation is: a bar for people, the same numbers for who watches, and places where it can stop.

Bars are tqdm's; in a notebook they are lines of text that go when they are done. tqdm's own notebook bars are widgets:
closed ones leave "Error displaying widget" behind when a page is loaded again.
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm.std import tqdm as Bar

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """Raised by who watches: the computation ends there, as by Ctrl-C. What it kept so far stays."""


@dataclass(frozen=True)
class Step:
    """Where a computation is."""

    what: str  # it does, such as "statistics"
    done: int = 0
    total: int | None = None
    unit: str = ""  # of both, such as "block"

    def __str__(self) -> str:
        if self.total is None:
            return self.what
        return f"{self.what}, {self.unit} {min(self.done + 1, self.total)} of {self.total}"


Watch = Callable[[Step], object]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)
_last: ContextVar[Step | None] = ContextVar("last", default=None)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Hand every step of what is computed within, in this thread, to a function, which may raise Stopped."""
    token, last = _watch.set(watch), _last.set(None)
    try:
        yield
    finally:
        _watch.reset(token)
        _last.reset(last)


def at(what: str, done: int = 0, total: int | None = None, unit: str = "") -> None:
    """Tell who watches where the computation is."""
    if watch := _watch.get():
        step = Step(what, done, total, unit)
        _last.set(step)
        watch(step)


def pause() -> None:
    """A place between two steps where a computation can be stopped."""
    if (watch := _watch.get()) and (last := _last.get()):
        watch(last)


def each(things: Iterable[T], what: str, unit: str, progress: bool = True) -> Iterator[T]:
    """The things one after another, each a step. progress: show a bar, too."""
    total = len(things) if isinstance(things, Sized) else None
    for done, thing in enumerate(tqdm(things, desc=what, unit=unit, disable=not progress, leave=False)):
        at(what, done, total, unit)
        yield thing
    if total:
        at(what, total, total, unit)


class CellBar(Bar):
    """A bar in the output of a notebook's cell."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"file": io.StringIO(), "ncols": 80} | options)

    @staticmethod
    def status_printer(_: object) -> Callable[[str], None]:
        """A function that shows a text in the place of the one before."""
        from IPython.display import display

        handle = display(display_id=True)
        handle.display({"text/plain": ""}, raw=True)
        return lambda text: handle.update({"text/plain": text}, raw=True)


def tqdm(*arguments: Any, **options: Any) -> Bar:
    """A bar of tqdm, with its arguments, in the form that this terminal or notebook takes."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return (CellBar if hasattr(shell, "kernel") else Bar)(*arguments, **options)
