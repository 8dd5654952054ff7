"""EoRA Lab: compress a large language model without training, and compensate it.

model, tokenizer = load_model("smollm2-135m")
batches = calibration_batches(tokenizer, "pydoc", nsamples=32, seqlen=512)
report = compress_model(model, batches, Recipe("rtn", bits=3, method="eora", rank=64))

What is public is here, and in `compress`, `compensate`, `formats`, `experiment`, `plots` and `widgets`. Names are
imported when they are asked for; `__init__.pyi` says the same to tools that do not run code.
"""

import importlib
from typing import Any

PLACES = {
    "Adapters": "run.adapters",
    "Budget": "run.budget",
    "Calibration": "text.settings",
    "CompensatedLinear": "layer.linear",
    "EoraLabError": "errors",
    "Evaluation": "text.settings",
    "Exploration": "measure.explore",
    "InputStatistics": "calibrate.statistics",
    "LensReading": "measure.lens",
    "LlamaCpp": "measure.llama_cpp",
    "LowRank": "compensate",
    "OutputStatistics": "calibrate.output_statistics",
    "Recipe": "run.recipe",
    "Report": "run.report",
    "ResidualStream": "measure.residual_stream",
    "SOURCES": "text.sources",
    "best_recipe": "run.best",
    "block_linears": "model.structure",
    "calibration_batches": "text.tokens",
    "collect_output_statistics": "calibrate.outputs",
    "collect_statistics": "calibrate.stream",
    "compress_model": "run.pipeline",
    "embedded_gguf": "model.embedded",
    "generate": "model.generate",
    "head_errors": "measure.heads",
    "head_outputs": "measure.heads",
    "load_model": "model.load",
    "load_plugin": "run.plugins",
    "load_run": "run.folder",
    "output_energy": "calibrate.statistics",
    "perplexity": "measure.evaluate",
    "plan_ranks": "run.ranks",
    "read_lens": "measure.lens",
    "residual_stream": "measure.residual_stream",
    "solve": "compensate",
    "solve_adapter": "run.task_adapter",
    "solve_shared": "compensate.shared",
    "stream_errors": "measure.residual_stream",
    "token_losses": "measure.evaluate",
    "token_windows": "text.tokens",
    "versions": "environment",
    "window_losses": "measure.evaluate",
}
__all__ = ["__version__", *PLACES]


def __getattr__(name: str) -> Any:
    """A public name, from the room where it lives."""
    if name in PLACES:
        return getattr(importlib.import_module(f"eora_lab.{PLACES[name]}"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("eora-lab")
    raise AttributeError(f"module 'eora_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
