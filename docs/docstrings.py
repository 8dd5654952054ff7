"""A Sphinx extension: docstrings are plain text; `names` become links, and columns of parameters a list of them."""

import importlib
import re
from functools import cache

from sphinx.application import Sphinx

ROOMS = ("compress", "compensate", "formats", "experiment", "plots", "widgets")
PUBLIC = ("eora_lab", *(f"eora_lab.{room}" for room in ROOMS))
FIELD = re.compile(r"^([A-Za-z_]\w*(?:, \w+)*|[\w.]+ or [\w.]+):\s+(\S.*)$")
MARKED = re.compile(r"`+([^`]+)`+")
SPECIAL = re.compile(r"([\\*|]|_(?!\w)|(?<=\w)_(?=\W|$))")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this package in reStructuredText."""
    found: list[str] = []
    field = code = False
    for line in lines:
        if not line.strip():
            field = code = False
            found.append("")
        elif line.startswith("    ") and not field:  # code or a formula, as it stands
            if not code:
                found += ["", "::", ""]
            code = True
            found.append(f"    {line}")
        elif match := FIELD.match(line):
            if not field:
                found.append("")
            field = True
            name, text = match.groups()
            found += [f"*{name}*", f"    {_inline(text)}"]
        elif field and line.startswith((" ", "\t")):
            found.append(f"    {_inline(line.strip())}")
        else:
            if field or code:
                found.append("")
            field = code = False
            found.append(_inline(line.strip()))
    return found


@cache
def targets() -> dict[str, str]:
    """What is public -> its full name, in the room where it is described."""
    rooms = {name: importlib.import_module(name).__all__ for name in PUBLIC}
    return {one: f"{room}.{one}" for room, names in rooms.items() for one in names}


def _inline(text: str) -> str:
    """A line whose names are links where they are known, and whose other signs mean nothing."""
    parts = MARKED.split(text)  # plain, marked, plain, ...
    plain = [SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    known = {one: targets().get(one.removesuffix("()")) for one in parts[1::2]}
    marked = [f":py:obj:`{one} <{known[one]}>`" if known[one] else f"``{one}``" for one in parts[1::2]]
    out = plain[0]
    for before, after in zip(marked, plain[1:], strict=True):
        gap = "\\ " if out and not out[-1].isspace() and out[-1] not in "([{-/:" else ""
        out += gap + before + ("\\ " if after and (after[0].isalnum() or after[0] == "_") else "") + after
    return out


def process(*event) -> None:
    """What autodoc calls for every docstring, whose lines come last, to be changed in place."""
    event[-1][:] = as_rst(event[-1])


def setup(app: Sphinx) -> dict:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
