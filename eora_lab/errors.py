"""The one error that users see: a sentence that says what is wrong and what to do. Settings raise it when made."""

import difflib
import functools
import numbers
import re
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

T = typing.TypeVar("T")
NO_MEMORY = re.compile("out of memory|(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)  # torch's words
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
    list: "a list",
    dict: "names with values",
    type(None): "nothing",
}


class EoraLabError(Exception):
    """A wrong input, a missing file or an unusable model. The command line prints it as one line."""


class MachineError(EoraLabError):
    """Not the input but the machine failed: no memory, no network, data that is not there. It may work another time."""


class WriteError(MachineError):
    """A file cannot be written: the disk is full, or refuses."""


def machine_error(error: BaseException) -> MachineError | None:
    """An error as one of the machine, if that is what it comes from, however it was wrapped; else None."""
    cause: BaseException | None = error
    while cause is not None:
        message = str(error) if isinstance(error, EoraLabError) else ""
        if isinstance(cause, MachineError):
            return type(cause)(message)
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and NO_MEMORY.search(str(cause))):
            return MachineError(f"out of memory: {message or one_line(cause)}")
        if isinstance(cause, OSError) and cause.errno:
            return MachineError(message or ": ".join(filter(None, (str(cause.filename or ""), cause.strerror))))
        cause = cause.__cause__
    return None


class ToldElsewhere(EoraLabError):
    """Of processes that share their work, the first one says this too: the others need not print it."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of an error raised within by what it is about, such as a layer."""
    try:
        yield
    except EoraLabError as error:
        raise EoraLabError(f"{what}: {error}") from error


def one_line(error: BaseException) -> str:
    """The message of another library's error, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def unknown(kind: str, name: object, known: Iterable[str]) -> EoraLabError:
    """The error for a name that is none of those known. It says which one may be meant."""
    known = list(known)
    return EoraLabError(f"unknown {kind} {name!r}; known: {', '.join(known)}{meant(name, known)}")


def meant(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: which one may be meant. Empty when none is near."""
    near = difflib.get_close_matches(str(name), known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def at_least(lowest: int, **numbers: int | None) -> None:
    """Raise EoraLabError for a whole number below the lowest, by its name. None stands for no limit."""
    for name, value in numbers.items():
        if value is not None and as_setting(int, value, name) < lowest:
            raise EoraLabError(f"{name} must be {lowest} or more, not {value}")


def check_pattern(pattern: str) -> None:
    """Raise EoraLabError for text that is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise EoraLabError(f"{pattern!r} is no regular expression: {error}") from error


def check_seed(seed: int) -> None:
    """Raise EoraLabError for a seed that torch does not take."""
    if not -(2**63) <= as_setting(int, seed, "seed") < 2**64:
        raise EoraLabError(f"seed must be a number of 64 bits, not {seed}")


@typing.dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks the names and types of what it is made from, and then its values, by `check`.

    A whole number does for a float, a list for a tuple, and a single text for a tuple of texts. Raises EoraLabError.
    """
    made: typing.Any = dataclass(frozen=True)(cls)  # type: ignore[call-overload]
    make, names = made.__init__, [field.name for field in fields(made)]

    @functools.wraps(make)
    def __init__(self, *args, **kwargs) -> None:
        for name in kwargs:
            if name not in names:
                raise unknown("setting", name, names)
        if len(args) > len(names):
            raise EoraLabError(f"{made.__name__} has {len(names)} settings, not {len(args)}: {', '.join(names)}")
        make(self, *args, **kwargs)
        hints = _hints(made)
        for name in names:
            object.__setattr__(self, name, as_setting(hints[name], getattr(self, name), name))
        if hasattr(self, "check"):
            self.check()

    made.__init__ = __init__
    return made


_hints = functools.cache(typing.get_type_hints)


def as_setting(hint: typing.Any, value: typing.Any, name: str) -> typing.Any:
    """A value as a setting of that type takes it. Raises EoraLabError when it is of another type."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Literal:
        if value in arguments:
            return value
        raise unknown(name, value, arguments)
    kinds = [kind]
    if kind in (typing.Union, types.UnionType):
        kinds = list(arguments)
        for argument in arguments:
            try:
                return as_setting(argument, value, name)
            except EoraLabError:
                continue
    elif kind is tuple or (kind is list and arguments):
        items = (value,) if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            return kind(as_setting(arguments[0], item, name) for item in items)
    elif kind is dict and arguments and isinstance(value, dict):
        key, item = arguments
        return {as_setting(key, one, name): as_setting(item, value[one], f"{name}.{one}") for one in value}
    elif kind in (int, float):
        if isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool):
            return kind(value)
    elif isinstance(value, kind):
        return value
    wanted = " or ".join(WORDS.get(one, getattr(one, "__name__", str(one))) for one in kinds)
    yaml = "; text such as 2:4 needs quotes in YAML" if str in kinds else ""
    raise EoraLabError(f"{name} must be {wanted}, not {value!r}{yaml}")
