"""`eora-lab export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.options import Dtype


@dataclass(frozen=True)
class Export:
    """Write a run as a model folder that other tools load.

    gptq and gptq_v2: a GPTQ checkpoint. It holds no low-rank path; that is the adapter in the run folder. Needs grids
    made with --zero-point integer --scale-dtype float16. Asymmetric ones may need gptq_v2.
    dense: an ordinary folder with dequantised weights; pruned ones are zeros.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """run folder to read"""
    output: Annotated[Path, tyro.conf.Positional]
    """folder to write"""
    format: Literal["gptq", "gptq_v2", "dense"] = "gptq"
    """what to write"""
    merge: bool = False
    """dense only: add the low-rank path to the weights"""
    dtype: Dtype = "float16"
    """type of the tensors that are not quantised"""

    def run(self) -> None:
        import torch

        from eora_lab.errors import EoraLabError
        from eora_lab.formats.dense import write_dense
        from eora_lab.formats.gptq_checkpoint import write_checkpoint
        from eora_lab.run.folder import load_run

        if self.merge and self.format != "dense":
            raise EoraLabError("a low-rank path cannot be added to codes: --merge goes with --format dense")
        model, tokenizer, _ = load_run(self.run_folder)
        dtype = getattr(torch, self.dtype)
        if self.format == "dense":
            write_dense(self.output, model, tokenizer, dtype, self.merge)
            merged = "with" if self.merge else "without"
            print(f"wrote {self.output}: dense weights, {merged} the low-rank path")
        else:
            config = write_checkpoint(self.output, model, tokenizer, self.format, dtype)
            print(
                f"wrote {self.output}: {self.format}, {config.bits} bits, groups of {config.group_size}, "
                f"sym={config.sym}, desc_act={config.desc_act}; the low-rank path is in {self.run_folder / 'adapter'}"
            )
