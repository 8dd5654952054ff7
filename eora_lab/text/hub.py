"""Rows of a public dataset: from a local mirror in the hub's layout, else from the hub, else one clear error.

The mirror is the folder in the environment variable EORA_LAB_DATA: <owner>/<dataset>/<config>/<split>-*.parquet.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path

from eora_lab.errors import EoraLabError, MachineError

PROBE_SECONDS = 5.0
KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
_mirror_only: ContextVar[bool] = ContextVar("mirror_only", default=False)


def texts(
    form: Callable[[dict], str | None],
    dataset: str,
    config: str,
    split: str,
    columns: Mapping[str, type],
    mirror_configs: Sequence[str] = (),
    hub_id: str | None = None,
    data_file: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """The texts of one split, in the stored order of its rows.

    Args:
        form: the text of a row, None to leave it out. It may raise EoraLabError, which then names file and row.
        dataset, config: owner/name and configuration, as on the hub.
        columns: fields that every row must have, and of which type.
        mirror_configs: folders of the mirror that serve when it has no `config`, first match first ("*": all together).
        hub_id: the name to ask the hub for where it differs from `dataset`.
        data_file: one file of the hub's repository that holds the split, instead of the whole configuration.
        limit: at most this many rows, from the start.

    Raises:
        MachineError: neither place has the split, or a file is damaged.
        EoraLabError: a column is missing, EORA_LAB_DATA is no folder, or a row holds another type.
    """
    files, missing = _mirror_files(dataset, (config, *mirror_configs), split)
    found = _read_parquet(files, limit) if files else None
    if found is None and _mirror_only.get():
        raise MachineError(f"no data for {dataset} in the mirror: {missing}")
    if found is None:
        found, reason = _from_hub(hub_id or dataset, config, split, data_file, limit)
    if found is None:
        raise MachineError(
            f"no data for {dataset} (config {config}, split {split}): {missing}, and the hub gave none ({reason}); "
            f"set EORA_LAB_DATA to a folder with {dataset}/{config}/{split}-*.parquet, "
            "or allow network access to the hub"
        )
    source = f"{dataset} (config {config}, split {split})"
    absent = sorted(set(columns) - set(found[0])) if found else []
    if absent:
        raise EoraLabError(f"{source} lacks the column {', '.join(absent)}")
    made = []
    for index, row in enumerate(found):
        try:
            for column, kind in columns.items():
                expect(row[column], kind, column)
            made.append(form(row))
        except EoraLabError as error:
            raise EoraLabError(f"{source}: row {_place(files, index)}: {error}; fetch the data again") from error
    return [text for text in made if text is not None]


def expect(value: object, kind: type, name: str) -> None:
    """Raise EoraLabError unless a value is of a type."""
    if not isinstance(value, kind):
        raise EoraLabError(f"{name} is {'null' if value is None else repr(value)[:60]}, not {KINDS[kind]}")


def _place(files: list[Path], index: int) -> str:
    """Where a row stands: its number from 1, in which file of the mirror."""
    import pyarrow.parquet

    for file in files:
        count = pyarrow.parquet.read_metadata(file).num_rows
        if index < count:
            return f"{index + 1} of {file}"
        index -= count
    return str(index + 1)


@contextmanager
def mirror_only() -> Iterator[None]:
    """Ask no hub inside: what the mirror lacks raises MachineError at once."""
    token = _mirror_only.set(True)
    try:
        yield
    finally:
        _mirror_only.reset(token)


def mirrored(dataset: str, config: str) -> dict[str, list[dict]]:
    """Every split of a configuration that the mirror has, by name; empty when it has none.

    Raises EoraLabError when a file is damaged, or EORA_LAB_DATA is no folder.
    """
    root = mirror()
    files = sorted((root / dataset / config).glob("*-*.parquet")) if root else []
    names = dict.fromkeys(file.name.partition("-")[0] for file in files)
    return {name: _read_parquet([f for f in files if f.name.partition("-")[0] == name], None) for name in names}


def mirror() -> Path | None:
    """The folder of the mirror; None where there is none. Raises EoraLabError when EORA_LAB_DATA is no folder."""
    root = os.environ.get("EORA_LAB_DATA")
    if root and not Path(root).expanduser().is_dir():
        raise EoraLabError(f"EORA_LAB_DATA is {root}, which is not a folder: give one, or unset it to ask the hub")
    return Path(root).expanduser() if root else None


def _mirror_files(dataset: str, configs: Sequence[str], split: str) -> tuple[list[Path], str]:
    """The mirror's files of the split, and what to say if there are none."""
    root = mirror()
    if root is None:
        return [], "EORA_LAB_DATA is not set"
    splits: dict[str, None] = {}  # a set in the order seen
    for config in configs:
        files = sorted((root / dataset).glob(f"{config}/*-*.parquet"))
        if of_split := [file for file in files if file.name.partition("-")[0] == split]:
            return of_split, ""
        splits.update(dict.fromkeys(file.name.partition("-")[0] for file in files))
    if splits:
        return [], f"the mirror {root} has only the splits {', '.join(splits)}"
    return [], f"the mirror {root} has no {dataset}/{configs[0]}"


def _read_parquet(files: list[Path], limit: int | None) -> list[dict]:
    import pyarrow
    import pyarrow.dataset

    try:
        table = pyarrow.dataset.dataset([str(file) for file in files], format="parquet")
        return (table.to_table() if limit is None else table.head(limit)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise MachineError(f"cannot read {files[0].parent}: {_line(error)}; fetch its files again") from error


def _from_hub(
    hub_id: str, config: str, split: str, data_file: str | None, limit: int | None
) -> tuple[list[dict] | None, str]:
    """Rows from the hub (or its local cache), or None and the reason."""
    import datasets

    what = {"data_files": {split: data_file}} if data_file else {"name": config}
    with asking(hub_id) as unreachable:
        try:
            found = datasets.load_dataset(hub_id, split=split, **what)
            return found.select(range(min(len(found), limit or len(found)))).to_list(), ""
        except Exception as error:  # of many kinds; each means "not from here"
            return None, unreachable or _line(error)


@contextmanager
def asking(hub_id: str) -> Iterator[str]:
    """Load from the hub inside. Where it does not answer, its cache on this machine serves, and the value is why."""
    unreachable = _why_unreachable(hub_id)
    with _offline() if unreachable else nullcontext():
        yield unreachable


def _why_unreachable(hub_id: str) -> str:
    """Empty if the hub answers. One quick question, because load_dataset tries for 24 s on a closed network."""
    import huggingface_hub

    # the libraries read this variable only when imported
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=PROBE_SECONDS)
    except Exception as error:
        return _line(error)
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """Both libraries offline for a while."""
    import datasets.config
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:160]}"
