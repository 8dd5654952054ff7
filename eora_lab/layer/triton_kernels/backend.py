"""Where Triton runs."""

import functools
import importlib.util

import torch


@functools.cache
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
