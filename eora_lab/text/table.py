"""Texts in files: plain ones, and columns of JSON Lines, JSON, CSV and Parquet tables; packed with gzip or not.

A file is a table by its name, or by what it holds: JSON under another name is not taken for prose.
"""

import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eora_lab.errors import EoraLabError, naming, one_line

JSON, PARQUET = ("jsonl", "ndjson", "json"), ("parquet", "pq")
SEPARATORS = {"csv": ",", "tsv": "\t"}
LIKELY = ("text", "messages", "conversations", "content")  # names of the column that is meant
CHAT_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
SHOWN = 20  # columns in a message


@dataclass(frozen=True)
class Table:
    """Names of the columns, and the values of one: a row each, None where a row has none."""

    columns: list[str]
    values: Callable[[str], Sequence[Any]]


def read_text(path: str) -> str:
    """A plain text, whole. Raises EoraLabError when it is not UTF-8, or is a table: then with the columns it has."""
    found = _open(path)
    if isinstance(found, str):
        return found
    if not found.columns:
        raise EoraLabError(f"{path} is a table without rows: use another source or fill it")
    likely = next((name for name in LIKELY if name in found.columns), found.columns[0])
    raise EoraLabError(f"{path} is a table of {_names(found)}: name the column to read, such as {path}:{_line(likely)}")


def read_column(path: str, column: str, render: Callable[[list[dict]], str]) -> tuple[list[str], bool]:
    """The texts of a column, a row each, and whether chats are among them. Blank rows are left out, with a warning.

    render: makes a text of a chat, which is a list of messages, each with role and content.
    Raises EoraLabError, with the row, on anything that is neither text nor chat.
    """
    table = _open(path)
    if isinstance(table, str):
        raise EoraLabError(f"{path} is plain text, which has no columns: leave the column {column!r} out")
    if column not in table.columns:
        raise EoraLabError(f"{path} has no column {column!r}; it has {_names(table)}")
    texts: list[str] = []
    blank: list[int] = []
    chats = False
    for row, value in enumerate(table.values(column), 1):
        with naming(f"row {row} of {path}"):
            if is_chat(value):
                text, chats = render(value), True
            else:
                text = _checked(value, column)
        if text.strip():
            texts.append(text)
        else:
            blank.append(row)
    if blank:
        rows = f"{len(blank)} rows are blank in {column} (the first is row {blank[0]})"
        warnings.warn(f"{path}: {rows}; they are left out", stacklevel=2)
    return texts, chats


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages with role and content."""
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages)


def _checked(value: object, column: str) -> str:
    """The value if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        null = value is None or value != value  # NaN: a short row of a CSV file
        shown = "null" if null else "a list that is no chat of role and content" if isinstance(value, list) else None
        raise EoraLabError(f"{column} is {shown or repr(value)[:60]}, not text: mend the row or leave it out")
    if CHAT_AS_TEXT.match(value):  # all that CSV can hold of one
        raise EoraLabError(f"{column} is a chat written as text: keep chats as lists, in a JSONL or Parquet file")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EoraLabError(f"{column} holds half a character (a lone surrogate): mend the row") from error
    return value


def _names(table: Table) -> str:
    more = f" and {len(table.columns) - SHOWN} more" if len(table.columns) > SHOWN else ""
    return f"the columns {', '.join(map(_line, table.columns[:SHOWN]))}{more}"


def _line(name: str) -> str:
    return " ".join(name.split())[:60]


def _open(path: str) -> str | Table:
    """A table, or else the text."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            kind = Path(path.removesuffix(".gz")).suffix.lower().removeprefix(".")
            if magic == b"PAR1" or kind in PARQUET:
                return _parquet(path)
            data = magic + file.read()
        if data[:2] == b"\x1f\x8b" or path.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EoraLabError(f"cannot unpack {path} ({one_line(error)}): pack or fetch it again") from error
    except OSError as error:
        raise EoraLabError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise EoraLabError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if kind in SEPARATORS:
        return _csv(path, text, SEPARATORS[kind])
    return _json(path, text) if kind in JSON or _looks_like_json(text) else text


def _parquet(path: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    def values(column: str) -> list:
        try:
            return pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
        except (OSError, ValueError, LookupError, pyarrow.ArrowException) as error:
            raise EoraLabError(f"cannot read {path}: {one_line(error)}; fetch it again") from error

    try:
        return Table(pyarrow.parquet.read_schema(path).names, values)
    except (OSError, pyarrow.ArrowException) as error:
        raise EoraLabError(f"cannot read {path}: {one_line(error)}; fetch it again") from error


def _csv(path: str, text: str, separator: str) -> Table:
    import pandas

    try:  # every value as it stands: no numbers, and no word that means null
        frame = pandas.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except pandas.errors.EmptyDataError:
        return Table([], lambda _: [])
    except (ValueError, pandas.errors.ParserError) as error:
        raise EoraLabError(f"cannot read {path} as a table: {one_line(error)}") from error
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas took the first column for names of the rows
        raise EoraLabError(f"the rows of {path} have more fields than its first line has names")
    return Table([str(name) for name in frame], lambda column: frame[column].tolist())


def _json(path: str, text: str) -> Table:
    """A list of objects, or an object a line."""
    if not text.strip():
        return Table([], lambda _: [])
    try:
        found = json.loads(text)
        rows = found if isinstance(found, list) else [found]
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise EoraLabError(f"{path} is no JSON ({one_line(error)})") from error
        rows = _json_lines(path, text)
    for row, one in enumerate(rows, 1):
        if not isinstance(one, dict):
            raise EoraLabError(f"row {row} of {path} is no object with columns, but {repr(one)[:60]}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(columns, lambda column: [row.get(column) for row in rows])


def _json_lines(path: str, text: str) -> list:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise EoraLabError(f"line {number} of {path} is no JSON ({one_line(error)})") from error
    return rows


def _looks_like_json(text: str) -> bool:
    """Whether a text is a JSON object, a list of them, or has one in each of its first two lines."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        lines = [line for line in text.split("\n") if line.strip()][:2]
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return False
    rows = found if isinstance(found, list) else [found]
    return bool(rows) and all(isinstance(row, dict) for row in rows)
