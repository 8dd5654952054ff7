"""Compressors: a weight and its input statistics in, a `CompressedWeight` out. One compressor a file."""

from eora_lab.compress.gptq import gptq
from eora_lab.compress.rtn import rtn
from eora_lab.compress.weight import CompressedWeight

COMPRESSORS = {
    "rtn": rtn,
    "gptq": gptq,
}

__all__ = ["COMPRESSORS", "CompressedWeight", "gptq", "rtn"]
