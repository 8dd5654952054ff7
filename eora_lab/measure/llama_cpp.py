"""The real llama.cpp in this process, from the wheel `xllamacpp`: logits of a GGUF file, with a LoRA beside it or not.

The wheel's own interface is a server, which gives no logits of a text, and so no perplexity; the C functions that it
carries do. Their settings are structures that grow with every release: they are handed on as they come, and only fields
whose places are certain are set.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.progress import each
from eora_lab.text.batches import Batches

SETTINGS = 2048  # bytes, more than any of the structures has
FLASH, CACHE = 13, 26  # places of flash_attn_type and of type_k, type_v in the settings of a context
AUTO, F32, F16 = 2**32 - 1, 0, 1


class _Settings(ctypes.Structure):
    """Of a model or a context, as llama.cpp fills them."""

    _fields_ = (("numbers", ctypes.c_uint32 * (SETTINGS // 4)),)


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []  # what llama.cpp reported lately


@_Log
def _note(level: int, text: bytes, _: object) -> None:
    if level >= 3:  # warnings and errors
        _said.append(text.decode(errors="replace").strip())
        del _said[:-5]


@cache
def library() -> Any:
    """The functions of llama.cpp. Raises EoraLabError where the wheel is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise EoraLabError("llama.cpp is not installed: pip install xllamacpp") from error
    place = next(Path(xllamacpp.__file__).parent.glob("*.so"))
    found, pointer, text = ctypes.CDLL(str(place)), ctypes.c_void_p, ctypes.c_char_p
    for name, result, *arguments in (
        ("llama_backend_init", None),
        ("llama_log_set", None, _Log, pointer),
        ("llama_model_default_params", _Settings),
        ("llama_context_default_params", _Settings),
        ("llama_model_load_from_file", pointer, text, _Settings),
        ("llama_model_free", None, pointer),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", ctypes.c_int32, pointer),
        ("llama_init_from_model", pointer, pointer, _Settings),
        ("llama_free", None, pointer),
        ("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32),
        ("llama_adapter_lora_init", pointer, pointer, text),
        ("llama_set_adapters_lora", ctypes.c_int32, pointer, pointer, ctypes.c_size_t, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, ctypes.c_bool),
        ("llama_batch_init", _Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", ctypes.c_int32, pointer, _Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int),
        ("ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer),
    ):
        if not hasattr(found, str(name)):
            raise EoraLabError(f"this release of xllamacpp has no {name}: install 2026.10")
        function = getattr(found, str(name))
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_note, None)
    found.llama_backend_init()
    return found


class LlamaCpp:
    """A GGUF file as llama.cpp computes it.

    adapter: LoRA in a GGUF file beside it. window: tokens at most. threads: of the CPU; None: those of torch.
    exact:   keys and values are kept in float32 and not in float16, for comparison with other programs.
    Raises EoraLabError where a file cannot be loaded, with what llama.cpp says.
    """

    def __init__(
        self,
        path: Path | str,
        adapter: Path | str | None = None,
        window: int = 512,
        threads: int | None = None,
        exact: bool = False,
    ):
        llama, self.window = library(), window
        self._model = self._context = None
        for file in (path, adapter):
            if file is not None and not Path(file).is_file():
                raise EoraLabError(f"no file {file}")
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise EoraLabError(f"llama.cpp cannot load {path}: {_reason()}")
        settings = llama.llama_context_default_params()
        settings.numbers[0] = settings.numbers[1] = settings.numbers[2] = window  # n_ctx, n_batch, n_ubatch
        if exact:
            if [settings.numbers[place] for place in (FLASH, CACHE, CACHE + 1)] != [AUTO, F16, F16]:
                raise EoraLabError("this release of xllamacpp has other settings: install 2026.10")
            settings.numbers[FLASH] = settings.numbers[CACHE] = settings.numbers[CACHE + 1] = (
                F32  # 0 also turns flash off
            )
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise EoraLabError(f"llama.cpp cannot run {path}: {_reason()}")
        self._batch = llama.llama_batch_init(window, 0, 1)
        count = threads or torch.get_num_threads()
        llama.llama_set_n_threads(self._context, count, count)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        if adapter is not None:
            loaded = llama.llama_adapter_lora_init(self._model, str(adapter).encode())  # freed with the model
            if not loaded:
                raise EoraLabError(f"llama.cpp cannot use {adapter} beside {path}: {_reason()}")
            adapters, scales = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if llama.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise EoraLabError(f"llama.cpp cannot use {adapter} beside {path}: {_reason()}")

    def close(self) -> None:
        """Give the memory back. The object is of no use afterwards."""
        if self._context:
            library().llama_batch_free(self._batch)
            library().llama_free(self._context)
        if self._model:
            library().llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def logits(self, tokens: Sequence[int] | Tensor) -> Float32[Tensor, "tokens vocabulary"]:
        """Of what follows each of the tokens, in one pass: (tokens, vocabulary).

        Raises EoraLabError on more tokens than the window has, and on those beyond the vocabulary.
        """
        ids = [int(token) for token in tokens]
        if not 0 < len(ids) <= self.window:
            raise EoraLabError(f"{len(ids)} tokens do not fit into a window of {self.window}")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise EoraLabError(f"a token is beyond the {self.vocabulary} of the GGUF file: take its own tokenizer")
        llama, batch = library(), self._batch
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        return self._run(llama, batch, ids, 0, every=True)

    def _run(self, llama: Any, batch: _Batch, ids: list[int], start: int, every: bool) -> Tensor:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        if code := llama.llama_decode(self._context, batch):
            raise EoraLabError(f"llama.cpp fails with code {code}: {_reason()}")
        rows = len(ids) if every else 1
        found = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (rows, self.vocabulary))
        return torch.from_numpy(found.copy())

    def window_losses(self, token_windows: Batches, progress: bool = False) -> Float[Tensor, " n"]:
        """Mean negative log-likelihood a token (nats) of every window, as `measure.evaluate.window_losses`."""
        windows = each(list(token_windows), "llama.cpp", "window", progress)
        losses = []
        for window in windows:
            tokens = torch.as_tensor(window).long()
            losses.append(torch.nn.functional.cross_entropy(self.logits(tokens)[:-1], tokens[1:]).item())
        return torch.tensor(losses, dtype=torch.float64)

    def perplexity(self, token_windows: Batches, progress: bool = False) -> float:
        """exp of the mean loss of all windows, as `measure.evaluate.perplexity`."""
        return self.window_losses(token_windows, progress).mean().exp().item()

    def continue_greedily(self, tokens: Sequence[int], count: int) -> list[int]:
        """The most likely tokens after these, one by one with the cache. Raises EoraLabError as `logits`."""
        llama, found = library(), [int(self.logits(tokens)[-1].argmax())]
        while len(found) < min(count, self.window - len(tokens)):
            place = len(tokens) + len(found) - 1
            found.append(int(self._run(llama, self._batch, found[-1:], place, every=False)[-1].argmax()))
        return found[:count]


def quantise(
    weight: Float32[Tensor, "rows in"], kind: str, importance: Float32[Tensor, " in"] | None = None
) -> UInt8[Tensor, "rows bytes"]:
    """Rows of a weight in a GGUF type (Q2_K, IQ3_XXS, ...) as llama-quantize makes them of it.

    importance: E[x²] of the input channels (an imatrix). Raises EoraLabError where the rows fill no whole blocks, the
    type is none, or is made by an imatrix only.
    """
    import gguf

    if kind not in gguf.GGMLQuantizationType.__members__:
        raise EoraLabError(f"{kind} is no type of GGUF")
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    if columns % block:
        raise EoraLabError(f"{columns} channels fill no blocks of {block}, as {kind} has them")
    if importance is None and library().ggml_quantize_requires_imatrix(int(number)):
        raise EoraLabError(f"{kind} is made with the importance of the input channels only (an imatrix): give it")
    source, made = weight.contiguous().float().numpy(), np.empty((rows, columns // block * size), np.uint8)
    scale = None if importance is None else importance.contiguous().float().numpy()
    place = None if scale is None else scale.ctypes.data
    library().ggml_quantize_chunk(int(number), source.ctypes.data, made.ctypes.data, 0, rows, columns, place)
    return torch.from_numpy(made)


def _reason() -> str:
    return "; ".join(_said[-2:]) or "it does not say why"
