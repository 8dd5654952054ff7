"""Files of other tools: adapters and what loaders make of them, and checkpoints, each kind one line in `FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eora_lab.errors import EoraLabError, unknown
from eora_lab.formats.adapter_check import Finding, check_adapter, fix_adapter
from eora_lab.formats.awq_checkpoint import AwqCheckpoint
from eora_lab.formats.bitsandbytes_checkpoint import BitsAndBytesCheckpoint
from eora_lab.formats.checkpoint import Checkpoint, quantised_as, quantization
from eora_lab.formats.compressed_tensors_checkpoint import CompressedTensorsCheckpoint
from eora_lab.formats.compressed_tensors_writer import write_compressed_tensors
from eora_lab.formats.dense import write_dense
from eora_lab.formats.fp8_checkpoint import Fp8Checkpoint
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.formats.gguf_checkpoint import GgufCheckpoint, is_gguf
from eora_lab.formats.gguf_file import write_gguf
from eora_lab.formats.gptq_checkpoint import GptqCheckpoint, is_gptq, write_checkpoint
from eora_lab.formats.hqq_checkpoint import HqqCheckpoint, is_hqq
from eora_lab.formats.imatrix import read_imatrix, write_imatrix
from eora_lab.formats.modelopt_checkpoint import ModelOptCheckpoint, is_modelopt
from eora_lab.formats.mxfp4_checkpoint import Mxfp4Checkpoint
from eora_lab.formats.peft import read_adapter, read_files, write_adapter
from eora_lab.formats.torchao_checkpoint import TorchaoCheckpoint

__all__ = [
    "FORMATS",
    "AwqCheckpoint",
    "BitsAndBytesCheckpoint",
    "Checkpoint",
    "CompressedTensorsCheckpoint",
    "Finding",
    "Format",
    "Fp8Checkpoint",
    "GgufCheckpoint",
    "GptqCheckpoint",
    "HqqCheckpoint",
    "ModelOptCheckpoint",
    "Mxfp4Checkpoint",
    "TorchaoCheckpoint",
    "check_adapter",
    "fix_adapter",
    "read_adapter",
    "read_checkpoint",
    "read_files",
    "read_imatrix",
    "write_adapter",
    "write_checkpoint",
    "write_compressed_tensors",
    "write_dense",
    "write_gguf",
    "write_gguf_adapter",
    "write_imatrix",
]


@dataclass(frozen=True)
class Format:
    """One kind of model folder or file. Its functions raise EoraLabError, with what to do.

    about:   what it is, in a line.
    write:   (folder, model, tokenizer, dtype) -> what was written; its text is shown. None: not written.
    read:    folder or file -> the compressed weights in it. None: not read.
    detects: whether a folder or file that is there is of this kind, by what is in it. None: only where it is named.
    """

    about: str
    write: Callable[..., object] | None = None
    read: Callable[[Path], Checkpoint] | None = None
    detects: Callable[[Path], bool] | None = None


FORMATS = {
    "gptq": Format(
        "GPTQ checkpoint, without the low-rank path",
        partial(write_checkpoint, checkpoint_format="gptq"),
        GptqCheckpoint,
        is_gptq,
    ),
    "gptq_v2": Format(
        "the same with zero points as they are, for asymmetric grids",
        partial(write_checkpoint, checkpoint_format="gptq_v2"),
    ),
    "compressed-tensors": Format(
        "checkpoint of compressed-tensors, without the low-rank path: integers, NVFP4, MXFP4 or FP8",
        write_compressed_tensors,
        CompressedTensorsCheckpoint,
        quantised_as("compressed-tensors"),
    ),
    "fp8": Format("FP8 checkpoint, in blocks", read=Fp8Checkpoint, detects=quantised_as("fp8")),
    "awq": Format("AWQ checkpoint", read=AwqCheckpoint, detects=quantised_as("awq")),
    "modelopt": Format("ModelOpt checkpoint, NVFP4 or FP8", read=ModelOptCheckpoint, detects=is_modelopt),
    "bitsandbytes": Format(
        "bitsandbytes checkpoint, of 4 or 8 bits", read=BitsAndBytesCheckpoint, detects=quantised_as("bitsandbytes")
    ),
    "torchao": Format("torchao checkpoint", read=TorchaoCheckpoint, detects=quantised_as("torchao")),
    "hqq": Format("HQQ checkpoint", read=HqqCheckpoint, detects=is_hqq),
    "mxfp4": Format("MXFP4 experts of gpt-oss", read=Mxfp4Checkpoint, detects=quantised_as("mxfp4")),
    "gguf": Format("GGUF file of llama.cpp, without the low-rank path", write_gguf, GgufCheckpoint, is_gguf),
    "dense": Format("W^ in full, pruned weights as zeros", write_dense),
    "merged": Format("W^ + B A in full", partial(write_dense, merge=True)),
}


def read_checkpoint(path: Path | str, format: str | None = None) -> Checkpoint:
    """The compressed weights of a checkpoint, for `compress_model(weights=...)`.

    format: a name in `FORMATS`; by default the first that knows the folder or file as its own.
    Raises EoraLabError where it is none that is read here, or damaged.
    """
    path, readers = Path(path), {name: one for name, one in FORMATS.items() if one.read}
    if format is not None and format not in readers:
        raise unknown("format", format, readers)
    if not path.exists():
        raise EoraLabError(f"no checkpoint {path}: give its folder or file")
    for name, one in readers.items():
        if one.read and (one.detects and one.detects(path) if format is None else name == format):
            return one.read(path)
    said = quantization(path).get("quant_method")
    how = f"it was quantised by {said}" if said else "no quantization_config in a config.json says how it was quantised"
    raise EoraLabError(f"{path} is no compressed checkpoint that is read here ({', '.join(readers)}): {how}")
