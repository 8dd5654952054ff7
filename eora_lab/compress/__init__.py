"""Compressors: a weight and its input statistics in, packed storage out. One compressor a file."""

from collections import ChainMap
from types import MappingProxyType

from eora_lab.compress.codebook_weight import CodebookWeight
from eora_lab.compress.dense_weight import DenseWeight
from eora_lab.compress.format_grids import GRIDS
from eora_lab.compress.gguf_weight import GgufWeight
from eora_lab.compress.gptq import gptq
from eora_lab.compress.grid import Grid
from eora_lab.compress.grid_weight import GridWeight, zero_points
from eora_lab.compress.hqq_weight import HqqWeight
from eora_lab.compress.magnitude import magnitude
from eora_lab.compress.reround import reround
from eora_lab.compress.residual import residual
from eora_lab.compress.rtn import rtn
from eora_lab.compress.sparse_weight import SparseWeight
from eora_lab.compress.sparsegpt import sparsegpt
from eora_lab.compress.sparsity import Sparsity
from eora_lab.compress.storage import KINDS, Compressed, tagged_state_dict, weight_from_state_dict
from eora_lab.compress.wanda import wanda

KINDS |= {one.kind: one for one in (GridWeight, SparseWeight, CodebookWeight, DenseWeight, GgufWeight, HqqWeight)}
QUANTISERS = {"rtn": rtn, "gptq": gptq}
PRUNERS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}  # these take a sparsity, and 16 bits
COMPRESSORS = MappingProxyType(ChainMap(PRUNERS, QUANTISERS))  # both; what a plugin adds to one of them is in here

__all__ = [
    "COMPRESSORS",
    "GRIDS",
    "KINDS",
    "PRUNERS",
    "QUANTISERS",
    "CodebookWeight",
    "Compressed",
    "DenseWeight",
    "GgufWeight",
    "Grid",
    "GridWeight",
    "HqqWeight",
    "SparseWeight",
    "Sparsity",
    "gptq",
    "magnitude",
    "reround",
    "residual",
    "rtn",
    "sparsegpt",
    "tagged_state_dict",
    "wanda",
    "weight_from_state_dict",
    "zero_points",
]
