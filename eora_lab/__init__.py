"""EoRA Lab: compress a large language model without training, and compensate it.

model, tokenizer = load_model("smollm2-135m")
batches = calibration_batches(tokenizer, "pydoc", nsamples=32, seqlen=512)
report = compress_model(model, batches, compressor="rtn", bits=3, method="eora", rank=64)
"""

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate import LowRank, solve
from eora_lab.errors import EoraLabError
from eora_lab.measure.evaluate import perplexity
from eora_lab.model.load import load_model
from eora_lab.run.adapters import Adapters
from eora_lab.run.folder import load_run
from eora_lab.run.pipeline import compress_model
from eora_lab.run.report import Report
from eora_lab.run.task_adapter import solve_adapter
from eora_lab.text.tokens import calibration_batches, token_windows

__all__ = [
    "Adapters",
    "EoraLabError",
    "InputStatistics",
    "LowRank",
    "Report",
    "calibration_batches",
    "collect_statistics",
    "compress_model",
    "load_model",
    "load_run",
    "perplexity",
    "solve",
    "solve_adapter",
    "token_windows",
]
