"""The choice between Triton and plain torch."""

import importlib.util
from typing import Literal

import torch

from eora_lab.errors import EoraLabError

BACKENDS = ("auto", "torch", "triton")


def choose_backend(
    device: torch.device | str, dtype: torch.dtype = torch.float16, backend: str = "auto"
) -> Literal["torch", "triton"]:
    """What computes on `device` in `dtype`. "auto" takes Triton where it runs, else torch.

    Raises EoraLabError when Triton is asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise EoraLabError(f'unknown backend {backend!r}; use "auto", "torch" or "triton"')
    if backend == "torch":
        return "torch"
    missing = why_not_triton(torch.device(device), dtype)
    if missing and backend == "triton":
        raise EoraLabError(f'the Triton backend needs {missing}; use backend="torch" or "auto"')
    return "torch" if missing else "triton"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What Triton lacks here, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"an NVIDIA GPU, and the layer is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None
