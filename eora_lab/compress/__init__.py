"""Compressors: a weight and its input statistics in, packed storage out. One compressor a file."""

from torch import Tensor

from eora_lab.compress.gptq import gptq
from eora_lab.compress.magnitude import magnitude
from eora_lab.compress.prune import Compressed
from eora_lab.compress.rtn import rtn
from eora_lab.compress.sparse_weight import SparseWeight
from eora_lab.compress.sparsegpt import sparsegpt
from eora_lab.compress.wanda import wanda
from eora_lab.compress.weight import CompressedWeight

QUANTISERS = {"rtn": rtn, "gptq": gptq}
PRUNERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}  # these take a sparsity, and 16 bits
COMPRESSORS = QUANTISERS | PRUNERS

__all__ = [
    "COMPRESSORS",
    "PRUNERS",
    "QUANTISERS",
    "Compressed",
    "CompressedWeight",
    "SparseWeight",
    "gptq",
    "magnitude",
    "rtn",
    "sparsegpt",
    "wanda",
    "weight_from_state_dict",
]


def weight_from_state_dict(state: dict[str, Tensor]) -> Compressed:
    """Read back what a compressor returned. Raises KeyError when a tensor is missing."""
    return (SparseWeight if "values" in state else CompressedWeight).from_state_dict(state)
