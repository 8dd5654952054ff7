"""Compressors: a weight and its input statistics in, a `CompressedWeight` out. One compressor a file."""

from torch import Tensor

from eora_lab.compress.gptq import gptq
from eora_lab.compress.rtn import rtn
from eora_lab.compress.sparse_weight import SparseWeight
from eora_lab.compress.weight import CompressedWeight

COMPRESSORS = {
    "rtn": rtn,
    "gptq": gptq,
}

__all__ = ["COMPRESSORS", "CompressedWeight", "SparseWeight", "gptq", "rtn", "weight_from_state_dict"]


def weight_from_state_dict(state: dict[str, Tensor]) -> CompressedWeight | SparseWeight:
    """Read back what a compressor returned. Raises KeyError when a tensor is missing."""
    return (SparseWeight if "values" in state else CompressedWeight).from_state_dict(state)
