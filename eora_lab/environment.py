"""What numbers were made with: versions, the commit, the machine, and the memory that was used."""

import os
import platform
import resource
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

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
