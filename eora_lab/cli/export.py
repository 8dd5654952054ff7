"""`eora-lab export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.model import Dtype


@dataclass(frozen=True)
class Export:
    """Write a run as a model folder that other tools load.

    gptq and gptq_v2: a GPTQ checkpoint. It holds no low-rank path; that is the adapter in the run folder. Needs grids
    made with --zero-point integer --scale-dtype float16. Asymmetric ones may need gptq_v2.
    compressed-tensors: for vLLM, SGLang and transformers, also without the path. Grids nvfp4, mxfp4 and fp8 as they
    are; integers in 2, 4 or 8 bits, made with --zero-point integer --scale-dtype float16.
    gguf: a GGUF file for llama.cpp, also without the path. W^ of a mended GGUF file, or of --grid q4_0, q8_0 or mxfp4;
    all else is taken from another GGUF file of the model.
    dense: an ordinary folder with dequantised weights; pruned ones are zeros. merged: with the low-rank path added.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """run folder to read"""
    output: Annotated[Path, tyro.conf.Positional]
    """folder to write; a .gguf file with --format gguf"""
    format: str = "gptq"
    """gptq, gptq_v2, gguf, compressed-tensors, dense or merged"""
    dtype: Dtype = "float16"
    """type of the tensors that are not quantised"""
    like: Path | None = None
    """with --format gguf: a GGUF file of the same model, for its tokenizer and all that is not compressed; by default
    the one that was mended"""
    base: str | None = None
    """the base model of the run, where it is no longer in its place"""

    def run(self) -> None:
        import torch

        from eora_lab.errors import EoraLabError, unknown
        from eora_lab.files import check_empty, check_place
        from eora_lab.formats import FORMATS
        from eora_lab.run.folder import load_run
        from eora_lab.run.stored import mended_file

        written = {name: one.write for name, one in FORMATS.items() if one.write}
        if self.format not in written:
            raise unknown("format", self.format, written)
        more = {}
        if self.format == "gguf":
            check_place(self.output, (".gguf",))
            if self.output.exists():
                raise EoraLabError(f"{self.output} is there already: choose another name")
            more = {"like": self.like or mended_file(self.run_folder)}
        elif self.like:
            raise EoraLabError("--like is of --format gguf: the others take all from the run and its base model")
        else:
            check_empty(self.output)
        model, tokenizer, _ = load_run(self.run_folder, model=self.base)
        what = written[self.format](self.output, model, tokenizer, getattr(torch, self.dtype), **more)
        print(f"wrote {self.output}: {what}; the low-rank path alone is in {self.run_folder / 'adapter'}")
