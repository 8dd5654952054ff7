"""Read a GGUF file, through transformers, into dense weights."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from eora_lab.errors import EoraLabError, one_line
from eora_lab.model.gguf_whole import check_gguf


def read_gguf(path: Path, dtype: torch.dtype):
    """Read one GGUF file into dense weights: (model, tokenizer).

    Raises EoraLabError if it cannot be read, or not whole (see `check_gguf`).
    """
    import transformers

    extra = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases may leave the weights packed where a GPU kernel exists
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet_transformers():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True, local_files_only=True, **extra
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
    except Exception as error:  # the reader raises whatever it stumbles over in a damaged file
        raise EoraLabError(f"cannot read {path} as the GGUF file of a decoder-only model: {one_line(error)}") from error
    model, found = loaded
    if found["missing_keys"]:
        raise EoraLabError(f"{path} lacks the weights of {', '.join(sorted(found['missing_keys'])[:3])}")
    check_gguf(path, model, found["unexpected_keys"])
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):  # the weights are dense now, and a saved copy must say so
            delattr(owner, name)
    return model, tokenizer


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars and no reports from transformers inside; errors are raised as ever."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
