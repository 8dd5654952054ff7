"""Which path and which block sizes for a shape: a file of tuned choices for this GPU and Triton, else a rule."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TUNED = Path(__file__).with_name("tuned")  # <gpu>-triton<version>.json, written by `python -m kernels.tune`


@dataclass(frozen=True)
class Config:
    """path: "decode", "prefill" or "cublas" (W^ made dense, then one library product). split_k, pdl: decode only."""

    path: str
    block_m: int = 16
    block_n: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False

    @property
    def block_r(self) -> int:
        """Ranks a step: few where splits of K share them, and so that registers do not spill."""
        return 16 if self.block_m == 16 else 32


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two, 16 at least: shapes that share a choice."""
    return max(16, 1 << (rows - 1).bit_length())


def key(rows: int, columns: int, channels: int, bits: int, group: int, rank: int, dtype: str) -> str:
    """The name of a shape's choice in the file of tuned ones."""
    return f"m{bucket(rows)} n{columns} k{channels} w{bits} g{group} r{-(-rank // 64) * 64} {dtype}"


def tuned_path(gpu: str, triton_version: str) -> Path:
    """The file of tuned choices for a GPU and a Triton version, there or not."""
    return TUNED / f"{gpu.replace(' ', '-')}-triton{triton_version}.json"


@functools.cache
def tuned(gpu: str, triton_version: str) -> dict[str, Config]:
    """The choices in that file, by `key`; none where there is no file."""
    path = tuned_path(gpu, triton_version)
    if not path.is_file():
        return {}
    return {name: Config(**choice) for name, choice in json.loads(path.read_text())["choices"].items()}


def rule(rows: int, columns: int, channels: int, bits: int, processors: int, capability: int) -> Config:
    """A choice by arithmetic: decode with enough programs to fill the processors twice, prefill tiles, then cuBLAS.

    Not measured; the thresholds follow from counts of bytes and operations.
    """
    if rows > 512:
        return Config("cublas")
    if rows > 64:
        tiles = -(-rows // 64) * -(-columns // 128)
        block_n = 128 if tiles >= processors and capability < 10 else 64
        return Config("prefill", 64, block_n)
    block_m = min(bucket(rows), 32)
    blocks = -(-channels // (128 if bits == 4 else 256))
    tiles = -(-columns // 64) * -(-rows // block_m)
    split = 1
    while tiles * split < 2 * processors and 2 * split <= min(8, blocks):
        split *= 2
    return Config("decode", block_m, 64, split, num_warps=2, num_stages=4, pdl=capability >= 9)


@functools.cache
def choose(rows: int, columns: int, channels: int, bits: int, group: int, rank: int, dtype: str, device: int) -> Config:
    """The choice for CUDA device number `device`."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(device)
    choices = tuned(properties.name, triton.__version__)
    found = choices.get(key(rows, columns, channels, bits, group, rank, dtype))
    return found or rule(rows, columns, channels, bits, properties.multi_processor_count, properties.major)
