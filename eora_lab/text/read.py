"""From the name of a source to its texts: a registered name, a file, a column of a file, or a mix of these."""

import hashlib
import json
import os
from functools import partial
from typing import NamedTuple

from eora_lab.errors import EoraLabError, one_line
from eora_lab.model.start import start_text
from eora_lab.text.sources import SOURCES
from eora_lab.text.table import read_column, read_text


class Texts(NamedTuple):
    """Texts, what joins them, and how sequences are cut out of them (see `SOURCES`)."""

    texts: list[str]
    join: str
    packing: str


def parts_of(source: str | os.PathLike) -> list[str]:
    """The sources of a mix, all known ones. A file whose name holds a plus sign is one source."""
    parts = split(source)
    for part in parts:
        if not (part == "self" or registered(part) or file_of(part)):
            raise EoraLabError(
                f"unknown source {part!r}: no such file, and the names are {', '.join(sorted(SOURCES))}, self "
                "(name:split for another split, file:column for a column of a table, a+b for a mix)"
            )
    return parts


def split(source: str | os.PathLike) -> list[str]:
    """The sources of a mix, known or not."""
    source = os.fspath(source)
    return [source] if file_of(source) else [part.strip() for part in source.split("+")]


def registered(part: str) -> str:
    """The name in `SOURCES` that a source begins with; empty where it is none. It comes before a file of that name."""
    name = part.partition(":")[0]
    return name if name in SOURCES else ""


def file_of(part: str) -> tuple[str, str] | None:
    """The file that a source names, and its column (empty: none is named). A file of the whole name comes first."""
    for end in (len(part), *(place for place in reversed(range(len(part))) if part[place] == ":")):
        if os.path.isfile(part[:end]) and "+" not in part[end:]:
            return part[:end], part[end + 1 :]
    return None


def files_in(source: str) -> list[str]:
    """The files that a mix names."""
    return [found[0] for part in split(source) if not registered(part) and (found := file_of(part))]


def with_column(source: str, column: str) -> str:
    """The source, with a column at every file that names none."""

    def named(part: str) -> str:
        found = None if registered(part) else file_of(part)
        return f"{part}:{column}" if found and not found[1] else part

    return "+".join(map(named, split(source)))


def read_source(part: str, tokenizer=None) -> Texts:
    """What one source of a mix holds. Chats go through the tokenizer's template; without one they stay JSON.

    Raises EoraLabError when there is no text, or none that can be read.
    """
    if name := registered(part):
        module = SOURCES[name]
        found = Texts(module.texts(part.partition(":")[2] or module.DEFAULT_SPLIT), module.JOIN, module.PACKING)
    else:
        path, column = file_of(part) or (part, "")
        found = _read_file(path, column, tokenizer)
    if not any(text.strip() for text in found.texts):
        raise EoraLabError(f"{part} holds no text: use another source or fill it")
    return found


def _read_file(path: str, column: str, tokenizer) -> Texts:
    if not column:
        return Texts([read_text(path)], "", "running")
    as_json = partial(json.dumps, sort_keys=True, default=str)
    texts, chats = read_column(path, column, partial(render_chat, tokenizer) if tokenizer else as_json)
    return Texts(texts, "", "examples") if chats else Texts(texts, "\n\n", "running")


def render_chat(tokenizer, messages: list[dict]) -> str:
    """A chat as the tokenizer's template writes it, without the BOS token that the sequence begins with anyway.

    Raises EoraLabError when there is no template, or it fails, or it writes nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EoraLabError("a chat, but the model's tokenizer has no chat template: name a column of plain text")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and may fail in any way
        raise EoraLabError(f"the model's chat template fails on this chat: {one_line(error)}") from error
    if not text.strip():
        raise EoraLabError("the model's chat template makes nothing of this chat: name a column of plain text")
    return text.removeprefix(start_text(tokenizer))


def text_digest(source: str | os.PathLike) -> str:
    """A hash of all texts that a source is made of, whatever is drawn from them. "self" is its own name.

    Raises EoraLabError as `token_windows` does.
    """
    found = hashlib.sha256()
    for part in parts_of(source):
        if part == "self":
            found.update(b"self")
        else:
            texts, join, packing = read_source(part)
            found.update(f"{join!r} {packing} {len(texts)}".encode())
            for text in texts:
                found.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    return found.hexdigest()
