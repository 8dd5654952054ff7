"""Settings as axes: the same names and help, each with one value or several."""

import ast
import inspect
import itertools
import textwrap
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro


def axes(kind: type, **defaults: tuple) -> type:
    """A dataclass with the fields of `kind`, of which all but switches take several values.

    defaults: of some fields, in place of the one value that `kind` has.
    """
    hints, texts = get_type_hints(kind), field_texts(kind)
    made: list[tuple[str, Any, Any]] = []
    for one in fields(kind):
        help_ = tyro.conf.arg(help=texts[one.name])
        if hints[one.name] is bool:
            made.append((one.name, Annotated[bool, help_], field(default=one.default)))
        else:
            several = tuple[hints[one.name], ...]  # type: ignore[name-defined]
            made.append((one.name, Annotated[several, help_], field(default=defaults.get(one.name, (one.default,)))))
    return make_dataclass(f"{kind.__name__}Axes", made, frozen=True)


def field_texts(kind: type) -> dict[str, str]:
    """Field -> the text that stands under it in the source of its class."""
    found = {}
    for one in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for line, below in itertools.pairwise(body):
            text = getattr(getattr(below, "value", None), "value", None)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, str):
                found[line.target.id] = " ".join(text.split())
    return found
