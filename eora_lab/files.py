"""Files of our own: a kill, a power loss or a full disk leaves the old file or the new one, never half of one."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import filelock
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eora_lab.errors import EoraLabError, WriteError, as_setting, one_line

LOCK = ".lock"  # in a folder that one process at a time may work in
PARTIAL = (".*.partial", ".tmp??????")  # what a process that was killed may leave: ours, and that of safetensors
CHECKSUM = "sha256"  # in the metadata of a safetensors file
PAGE = 4096  # bytes of a file that are read together at the least


class DamagedError(EoraLabError):
    """A file of ours is not as it was written."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there. Raises EoraLabError when it cannot."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        make_folder(path.parent)
        write(partial)
        synced(partial)
        os.replace(partial, path)
        synced(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {error}") from error
    finally:
        if partial.exists():
            partial.unlink()


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, that a power loss does not take away."""
    new = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in new:
        synced(one.parent)


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: renamed before, a file may come back empty."""
    place = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot do it for a folder
            os.fsync(place)
    finally:
        os.close(place)


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
        make_folder(folder)
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
    """Write tensors. The same ones with the same metadata give the same bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata=metadata)
        _sort_metadata(partial)
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors narrows it to the owner

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that differs from time to time."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if header["__metadata__"] and len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def check_empty(path: Path) -> None:
    """Raise EoraLabError unless a folder can be written there: there is none yet, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise EoraLabError(f"{path} is not an empty folder: choose another output folder")


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, then move it there. Raises EoraLabError when `path` is taken."""
    check_empty(path)
    path, partial = path.resolve(), None  # a link to a folder stays one
    try:
        make_folder(path.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        write(partial)
        mode = path.parent.stat().st_mode
        for entry in (partial, *partial.iterdir()):  # temporary folders and safetensors files are the owner's alone
            entry.chmod(mode & (0o777 if entry.is_dir() else 0o666))
            synced(entry)
        os.replace(partial, path)
        synced(path.parent)
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


def write_checked(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors with a checksum of what the file holds, for `read_checked`."""
    write_safetensors(path, tensors, metadata | {CHECKSUM: _checksum(tensors, metadata)})


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped into memory, and metadata of a file of `write_checked`; files of older versions have no checksum.

    Raises DamagedError when it is not as it was written, and EoraLabError when it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise EoraLabError(f"cannot read {path}: {one_line(error)}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path} is damaged ({one_line(error)})") from error
    if (checksum := metadata.pop(CHECKSUM, "")) and checksum != _checksum(tensors, metadata):
        raise DamagedError(f"{path} is damaged (its checksum does not agree)")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    found = hashlib.sha256("".join(metadata[key] for key in sorted(metadata)).encode())
    for name in sorted(tensors):
        add_tensor(found, name, tensors[name])
    return found.hexdigest()


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


def read_ahead(tensors: Iterable[Shaped[Tensor, "..."]]) -> Thread:
    """Read what lies in mapped files from the disk, in a thread of its own that is returned, while others compute.

    The pages stay those of the files: the system takes them back where it has no room for them.
    """
    places = [one.detach().flatten().view(torch.uint8).numpy() for one in tensors if one.is_cpu and one.is_contiguous()]

    def touch() -> None:
        for place in places:
            place[::PAGE].max(initial=0)

    thread = Thread(target=touch, daemon=True)
    thread.start()
    return thread
