"""Which path and which block sizes for a shape: a file of tuned choices for this GPU and Triton, else a rule."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eora_lab.layer.triton_kernels.ptx import LANES, PLANES

TUNED = Path(__file__).with_name("tuned")  # <gpu>-triton<version>.json, written by `python -m kernels.tune`
SPLITS = (1, 2, 4, 8, 16)
SERIAL = 1024  # channels that a program of decoding reads one after another, at the most
ENDING = 4  # what the beginning and the end of a program cost, in blocks of K


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

    def shared(self, bits: int, group: int) -> int:
        """Bytes of shared memory of a program: codes, x and grids of the blocks that are on their way.

        In decoding these are scales alone. On 9.x and 10.x prefill needs more, and there is more.
        """
        block = 16 * PLANES[bits]
        codes, x = LANES[bits] * 16 * self.block_n * 2, block * self.block_m * 2
        grids = (2 if self.path == "prefill" else 1) * self.block_n * 4 * (block // group if group else 0)
        return (self.num_stages - 1) * (codes + x + grids)


@dataclass(frozen=True)
class Gpu:
    """capability: 10 major + minor. shared: bytes of shared memory of a processor, all its programs together."""

    processors: int
    capability: int
    shared: int

    def resident(self, config: Config, bits: int, group: int) -> int:
        """Programs of decoding that run at the same time; each takes 1 KB of shared memory for itself.

        Of 16 warps, at 128 registers a thread, nobody has more.
        """
        return self.processors * max(min(self.shared // (config.shared(bits, group) + 1024), 16 // config.num_warps), 1)


GPUS = {  # some that there are, for what is worked out without one
    "A100": Gpu(108, 80, 167936),
    "RTX 3090": Gpu(82, 86, 102400),
    "RTX 4090": Gpu(128, 89, 102400),
    "H200": Gpu(132, 90, 233472),
    "B200": Gpu(148, 100, 233472),
    "RTX 5090": Gpu(170, 120, 102400),
}


def bucket(rows: int) -> int:
    """Rows rounded up to a power of two, 16 at least: shapes that share a choice."""
    return max(16, 1 << (rows - 1).bit_length())


def key(rows: int, columns: int, channels: int, bits: int, group: int, rank: int, dtype: str) -> str:
    """The name of a shape's choice in the file of tuned ones."""
    rank = -(-rank // 64) * 64
    return f"m{bucket(rows)} n{columns} k{channels} w{bits} g{group} r{rank} {dtype}"


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


def rule(rows: int, columns: int, channels: int, bits: int, group: int, gpu: Gpu) -> Config:
    """A choice by arithmetic: decoding for few rows, then prefill tiles, then cuBLAS.

    Not measured; the thresholds follow from counts of bytes and operations. On Blackwell (10.x) the prefill kernel's
    chain of small products costs more than making W^ dense.
    """
    major = gpu.capability // 10
    if rows > 512 or (rows > 64 and major == 10):
        return Config("cublas")
    if rows > 64:
        tiles = -(-rows // 64) * -(-columns // 128)
        config = Config("prefill", 64, 128 if tiles >= gpu.processors else 64)
        return config if config.shared(bits, group) + 1024 <= gpu.shared else replace(config, num_stages=2)
    return decoding(rows, columns, channels, bits, group, gpu)


def decoding(rows: int, columns: int, channels: int, bits: int, group: int, gpu: Gpu) -> Config:
    """Decoding with the split of K that ends soonest, none of whose programs reads more than SERIAL channels.

    A program is a chain of waits, so what counts is how many blocks it reads and how many rounds of programs there are.
    With many rows x costs more than W^, so that a program has more columns for it; 64 rows at once would spill.
    """
    block_n, warps = (64, 2) if rows <= 16 else (128, 4)
    block_m, stages = min(bucket(rows), 32), 4 if gpu.shared > 2**17 else 3
    blocks = -(-channels // (16 * PLANES[bits]))
    tiles = -(-columns // block_n) * -(-rows // block_m)
    splits = [split for split in SPLITS if split <= blocks]

    def config(split: int) -> Config:
        return Config("decode", block_m, block_n, split, num_warps=warps, num_stages=stages, pdl=gpu.capability >= 90)

    def cost(split: int) -> tuple[bool, float]:
        serial = -(-blocks // split)
        rounds = -(-tiles * split // gpu.resident(config(split), bits, group))
        return serial * 16 * PLANES[bits] > SERIAL, rounds * (serial + ENDING) + split / 4

    return config(min(splits, key=cost))


@functools.cache
def choose(rows: int, columns: int, channels: int, bits: int, group: int, rank: int, dtype: str, device: int) -> Config:
    """The choice for CUDA device number `device`; rows as `bucket` gives them, so that choices are few."""
    import triton

    choices = tuned(torch.cuda.get_device_name(device), triton.__version__)
    found = choices.get(key(rows, columns, channels, bits, group, rank, dtype))
    return found or rule(rows, columns, channels, bits, group, gpu_of(device))


def gpu_of(device: torch.device | int) -> Gpu:
    """A CUDA device's sizes."""
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Gpu(properties.multi_processor_count, capability, properties.shared_memory_per_multiprocessor)
