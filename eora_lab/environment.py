"""What numbers were made with: versions, the commit, the machine, and the memory and time that were used."""

import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

OTHER = "other"  # of `timed`: time in no step
PACKAGES = ("eora-lab", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def environment() -> dict:
    """What the numbers were made with: versions, the commit of this package's repository, and the kind of machine."""
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    machine["threads"] = torch.get_num_threads()
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"versions": versions(), "commit": commit(), "machine": machine}


@lru_cache(maxsize=1)
def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit that this package is at, with "+" where tracked files differ from it; empty outside a repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the GPU that holds the model, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def own_memory() -> int:
    """Bytes of this process that the system cannot take back: without pages of files, which it can read again.

    0 where the system does not say (it is not Linux).
    """
    return _said_in(Path("/proc/self/status"), "RssAnon:") or 0


class OwnMemory:
    """The most `own_memory` within this context, looked at every 20 ms. The kernel keeps no such mark."""

    def __init__(self):
        self.peak = own_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, own_memory())

    def __enter__(self) -> "OwnMemory":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()


class _Steps:
    """Seconds by step; one step runs at a time."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.now, self._since = OTHER, time.perf_counter()

    def switch(self, step: str) -> str:
        """Begin a step; returns the one that was running."""
        now, before = time.perf_counter(), self.now
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self.now, self._since = step, now
        return before


_steps: ContextVar[_Steps | None] = ContextVar("steps", default=None)


@contextmanager
def timed() -> Iterator[None]:
    """Every `step` within this context is timed; within another one, that goes on. See `seconds_by_step`."""
    if _steps.get():
        yield
        return
    token = _steps.set(_Steps())
    try:
        yield
    finally:
        _steps.reset(token)


def seconds_by_step() -> dict[str, float]:
    """Step -> seconds so far, in the outermost `timed`. What a GPU does counts where it is waited for."""
    steps = _steps.get()
    if not steps:
        return {}
    steps.switch(steps.now)
    return dict(steps.seconds)


@contextmanager
def step(name: str) -> Iterator[None]:
    """What runs within this context, or is decorated by it, is that step, but for steps within it."""
    if steps := _steps.get():
        before = steps.switch(name)
        try:
            yield
        finally:
            steps.switch(before)
    else:
        yield


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still get on a device, or None when the system does not say.

    On the CPU that is what the machine has left, and no more than the limits of the control groups that it is in.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_said_in(Path("/proc/meminfo"), "MemAvailable:")]
    for group in _control_groups():
        for limit, used in (("memory.max", "anon "), ("memory.limit_in_bytes", "total_rss ")):
            try:
                most = int((group / limit).read_text())
            except (OSError, ValueError):  # it is of the other version, or there is no limit
                continue
            left.append(max(most - (_said_in(group / "memory.stat", used, unit=1) or 0), 0))
    return min((one for one in left if one is not None), default=None)


def _control_groups() -> list[Path]:
    """The folders of the memory control groups that this process is in, those around its own included."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "" or "memory" in kinds.split(","):
            root = Path("/sys/fs/cgroup", *(["memory"] if kinds else []))
            own = Path(path.lstrip("/"))
            found += [root / one for one in (own, *own.parents)]
    return list(dict.fromkeys(found))


def _said_in(path: Path, key: str, unit: int = 1024) -> int | None:
    """The number behind a key in a file of the kernel, in bytes; None where there is none."""
    try:
        lines = path.read_text().splitlines()
        return next(unit * int(line.removeprefix(key).split()[0]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None
