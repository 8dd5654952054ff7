"""Files of other tools: adapters and what loaders make of them, and checkpoints, each kind one line in `FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eora_lab.formats.adapter_check import Finding, check_adapter, fix_adapter
from eora_lab.formats.checkpoint import Checkpoint
from eora_lab.formats.compressed_tensors_writer import write_compressed_tensors
from eora_lab.formats.dense import write_dense
from eora_lab.formats.gptq_checkpoint import GptqCheckpoint, write_checkpoint
from eora_lab.formats.peft import read_adapter, read_files, write_adapter

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Finding",
    "Format",
    "GptqCheckpoint",
    "check_adapter",
    "fix_adapter",
    "read_adapter",
    "read_files",
    "write_adapter",
    "write_checkpoint",
    "write_compressed_tensors",
    "write_dense",
]


@dataclass(frozen=True)
class Format:
    """One kind of model folder. Raises of both functions: EoraLabError, with what to do.

    about: what it is, in a line.
    write: (folder, model, tokenizer, dtype) -> what was written; its text is shown. None: not written.
    read:  folder -> the compressed weights in it. None: not read.
    """

    about: str
    write: Callable[..., object] | None = None
    read: Callable[[Path], Checkpoint] | None = None


FORMATS = {
    "gptq": Format(
        "GPTQ checkpoint, without the low-rank path",
        partial(write_checkpoint, checkpoint_format="gptq"),
        GptqCheckpoint,
    ),
    "gptq_v2": Format(
        "the same with zero points as they are, for asymmetric grids",
        partial(write_checkpoint, checkpoint_format="gptq_v2"),
    ),
    "compressed-tensors": Format(
        "checkpoint of compressed-tensors, without the low-rank path: integers, NVFP4, MXFP4 or FP8",
        write_compressed_tensors,
    ),
    "dense": Format("W^ in full, pruned weights as zeros", write_dense),
    "merged": Format("W^ + B A in full", partial(write_dense, merge=True)),
}
