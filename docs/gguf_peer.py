"""The real llama.cpp for `docs.gguf`, through the C interface in the wheel of xllamacpp: run by a Python that has both.

python gguf_peer.py quantise IN.npz OUT.npz TYPE            float32 matrices -> their bytes, by ggml's own quantiser
python gguf_peer.py losses MODEL.gguf ADAPTER TOKENS.npy OUT.npy THREADS    loss of every next token; ADAPTER: or -
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import xllamacpp

LIBRARY = ctypes.CDLL(next(map(str, Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))


class Params(ctypes.Structure):
    """Any struct of parameters: of no more bytes than this, of which the first are whole numbers."""

    _fields_ = [("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_char * 2032)]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def function(name: str, result: object, *arguments: object):
    """A function of the C interface."""
    found = getattr(LIBRARY, name)
    found.restype, found.argtypes = result, arguments
    return found


def quantise(source: str, target: str, kind: str) -> None:
    """All matrices of a file, row by row."""
    chunk = function(
        "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        *[ctypes.c_int64] * 3, ctypes.c_void_p,
    )  # fmt: skip
    found = {}
    for name, values in np.load(source).items():
        values, room = np.ascontiguousarray(values, np.float32), np.empty(values.size * 4, np.uint8)
        written = chunk(int(kind), values.ctypes.data, room.ctypes.data, 0, *values.shape, None)
        found[name] = room[:written].reshape(len(values), -1)
    np.savez(target, **found)


def losses(model: str, adapter: str, tokens: str, target: str, threads: str) -> None:
    """-log p of every token but the first of each window, each window by itself."""
    pointer, quiet = ctypes.c_void_p, ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    keep = quiet(lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level == 4 else None)
    function("llama_log_set", None, quiet, pointer)(keep, None)
    function("llama_backend_init", None)()
    loaded = function("llama_model_load_from_file", pointer, ctypes.c_char_p, Params)(
        model.encode(), function("llama_model_default_params", Params)()
    )
    windows = np.load(tokens).astype(np.int32)
    settings = function("llama_context_default_params", Params)()
    length = settings.first[0] = settings.first[1] = settings.first[2] = windows.shape[1]
    context = function("llama_init_from_model", pointer, pointer, Params)(loaded, settings)
    function("llama_set_n_threads", None, pointer, ctypes.c_int32, ctypes.c_int32)(context, int(threads), int(threads))
    if adapter != "-":
        path = function("llama_adapter_lora_init", pointer, pointer, ctypes.c_char_p)(loaded, adapter.encode())
        assert path, f"llama.cpp refuses {adapter}"
        used, scale = (pointer * 1)(path), (ctypes.c_float * 1)(1.0)
        put = function("llama_set_adapters_lora", ctypes.c_int32, pointer, pointer, ctypes.c_size_t, pointer)
        assert put(context, used, 1, scale) == 0
    batch = function("llama_batch_init", Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)(length, 0, 1)
    decode = function("llama_decode", ctypes.c_int32, pointer, Batch)
    logits_of = function("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer)
    memory = function("llama_get_memory", pointer, pointer)(context)
    clear = function("llama_memory_clear", None, pointer, ctypes.c_bool)
    found = []
    for window in windows:
        clear(memory, True)
        batch.n_tokens = length
        for place, token in enumerate(window.tolist()):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        assert decode(context, batch) == 0
        raw = np.ctypeslib.as_array(logits_of(context), (length * VOCABULARY,)).reshape(length, VOCABULARY)
        logits = raw[:-1].astype(np.float64)
        top = logits.max(1)
        own = logits[np.arange(length - 1), window[1:]]
        found.append(np.log(np.exp(logits - top[:, None]).sum(1)) + top - own)
    np.save(target, np.stack(found))


VOCABULARY = 49152  # of SmolLM2


if __name__ == "__main__":
    {"quantise": quantise, "losses": losses}[sys.argv[1]](*sys.argv[2:])
