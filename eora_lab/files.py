"""Files of our own: a kill or a full disk leaves the old file or the new one, never half of one; damage is told."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eora_lab.errors import EoraLabError, WriteError, as_setting, one_line

LOCK = ".lock"  # in a folder that one process at a time may work in
PARTIAL = ".*.partial"  # what a process that was killed may leave


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there. Raises EoraLabError when it cannot."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {error}") from error
    finally:
        if partial.exists():
            partial.unlink()


def check_place(path: Path, suffixes: Sequence[str] | None = None) -> None:
    """What can be known to be wrong with the place of an output before there is one. Raises EoraLabError.

    suffixes: that the name of a file may have; None: the output is a folder.
    """
    above = path.parents if suffixes is not None else (path, *path.parents)
    if file := next((one for one in above if one.exists() and not one.is_dir()), None):
        raise EoraLabError(f"cannot write {path}: {file} is a file, not a folder")
    if suffixes is None:
        return
    if path.is_dir() or not path.name:
        raise EoraLabError(f"cannot write {path}: it is a folder; give the name of a file in it")
    if path.suffix not in suffixes:
        raise EoraLabError(f"cannot write {path}: the name must end in {', '.join(filter(None, suffixes))}")


def check_table(path: Path, columns: Iterable[str]) -> None:
    """Raise EoraLabError when there is a file that is no table with these columns: it is somebody else's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    head = content if path.suffix == ".parquet" else b"\n".join(content.splitlines()[:5])
    if content and not all(column.encode() in head for column in columns):
        raise EoraLabError(f"{path} holds something else, which would be lost: choose another name, or delete it")


def write_json(path: Path, data: object) -> None:
    """Write JSON, indented."""
    write_atomically(path, lambda partial: partial.write_text(json.dumps(data, indent=1) + "\n"))


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value of that kind, by default an object, in a file.

    Raises EoraLabError, with the file's name, when it cannot be read or holds anything else.
    """
    try:
        return as_setting(kind, json.loads(path.read_text(encoding="utf-8")), "its content")
    except OSError as error:
        raise EoraLabError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise EoraLabError(f"{path} is damaged (it is not UTF-8 text; save it again as that)") from error
    except (ValueError, RecursionError, EoraLabError) as error:
        raise EoraLabError(f"{path} is damaged ({one_line(error)})") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one at work in a folder, which is made. However a process ends, the system frees its folder.

    Raises EoraLabError while another one is at work there, and when the folder cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise EoraLabError(f"somebody is at work in {folder}: wait until that has ended, or choose another") from error
    except OSError as error:
        raise EoraLabError(f"cannot write {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors narrows it to the owner

    write_atomically(path, write)


def check_empty(path: Path) -> None:
    """Raise EoraLabError unless a folder can be written there: there is none yet, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise EoraLabError(f"{path} is not an empty folder: choose another output folder")


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, then move it there. Raises EoraLabError when `path` is taken."""
    check_empty(path)
    path, partial = path.resolve(), None  # a link to a folder stays one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        write(partial)
        mode = path.parent.stat().st_mode
        for entry in (partial, *partial.iterdir()):  # temporary folders and safetensors files are the owner's alone
            entry.chmod(mode & (0o777 if entry.is_dir() else 0o666))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {error}") from error
    finally:
        if partial and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def digest(data: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def add_tensor(found: Any, name: str, tensor: Shaped[Tensor, "..."]) -> None:
    """Add a tensor to a hash of hashlib: its name, type, size and bytes."""
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def set_aside(path: Path, folder: Path, reason: str = "") -> None:
    """Move a file out of the way, under a name that is free. With a reason why it cannot be used, warn."""
    folder.mkdir(parents=True, exist_ok=True)
    target, count = folder / path.name, 1
    while target.exists():
        target, count = folder / f"{path.name}.{count}", count + 1
    try:
        os.replace(path, target)
    except FileNotFoundError:
        return
    if reason:
        warnings.warn(f"{path} cannot be used ({reason}); it was moved to {target}", stacklevel=3)
