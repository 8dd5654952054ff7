"""`eora-lab imatrix`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.model import Dtype
from eora_lab.text.settings import Calibration


@dataclass(frozen=True)
class Imatrix:
    """Measure a model's inputs, and write their mean squares as an importance matrix for llama.cpp.

    llama-quantize takes the file (--imatrix), and so do `eora-lab compress` and `eora-lab mend`.
    """

    model: Annotated[str, tyro.conf.Positional]
    """embedded model, hub id, or folder"""
    output: Annotated[Path, tyro.conf.Positional]
    """.gguf file to write"""
    calibration: Calibration = field(default_factory=Calibration)
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.calibrate.stream import collect_statistics
        from eora_lab.cli.early import check_inputs
        from eora_lab.cli.options import say_start
        from eora_lab.errors import EoraLabError
        from eora_lab.files import check_place
        from eora_lab.formats.gguf_names import GgufNames
        from eora_lab.formats.imatrix import write_imatrix
        from eora_lab.model.load import load_model
        from eora_lab.model.start import start_text

        check_place(self.output, (".gguf",))
        if self.output.exists():
            raise EoraLabError(f"{self.output} is there already: choose another name")
        check_inputs(self.model, (self.calibration.text,))
        model, tokenizer = load_model(self.model, dtype=self.dtype, device=self.device)
        GgufNames(model)  # is it known, before anything is measured
        say_start(start_text(tokenizer))
        batches = self.calibration.batches(model, tokenizer)
        found = collect_statistics(model, batches)
        count = write_imatrix(self.output, found, model, self.calibration.text, *map(int, batches.shape))
        print(f"wrote {self.output}: {count} tensors, on {batches.shape[0]} x {batches.shape[1]} tokens")
