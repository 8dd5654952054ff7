"""Measure what EoRA gives back to GGUF files, in llama.cpp itself: `python -m docs.gguf`, an hour on two cores.

It writes data/measured/gguf.csv, a line a file and adapter; those that stand there already are not measured again.
`difference` is how far the loss of a token is from that of transformers with the same W^ + B A, in the mean over two
windows: llama.cpp rounds activations.

The model is the embedded one. The blocks of k- and i-types have 256 weights, which its rows of 576 are no multiple of;
llama.cpp would take other types in their place. So it is widened to 768 channels first: the same function, with zeros
in the others. Types of linears are those of llama-quantize without an imatrix, the embedding is Q8_0 everywhere.
"""

import argparse
import csv
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from docs.records import MEASURED
from eora_lab import (
    Adapters,
    InputStatistics,
    LlamaCpp,
    Recipe,
    block_linears,
    collect_statistics,
    compress_model,
    load_model,
    token_windows,
)
from eora_lab.formats import read_checkpoint, read_imatrix, write_gguf, write_gguf_adapter, write_imatrix
from eora_lab.formats.gguf_names import GgufNames
from eora_lab.layer.linear import compensated, unpacked
from eora_lab.measure.llama_cpp import quantise

RECORD = MEASURED / "gguf.csv"
MIXTURES = {  # file type -> types of its linears, by the beginning of the name; "": all others
    "F32": {"": "F32"},
    "Q4_K_S": {"": "Q4_K"},
    "Q4_0": {"": "Q4_0"},
    "Q3_K_S": {"": "Q3_K"},
    "IQ3_XXS": {"attn_q": "IQ2_S", "attn_k": "IQ2_S", "attn_v": "IQ3_S", "attn_o": "IQ3_S", "ffn_down": "Q3_K"}
    | {"": "IQ3_XXS"},
    "Q2_K": {"attn_v": "Q3_K", "attn_o": "Q3_K", "ffn_down": "Q3_K", "": "Q2_K"},
}
EARLY = {  # file type -> (linear, type in the first blocks, how many of them)
    "IQ3_XXS": [("ffn_down", "Q4_K", 3)],
    "Q4_K_S": [("ffn_down", "Q5_K", 3), ("attn_v", "Q5_K", 4)],
}
AS_IT_IS = ("F32", "Q4_K_S")  # file types that others are compared with: not mended
Made = tuple[str, int, str]  # method, rank, type of the factors
Files = tuple[Path, Path | None]  # base, adapter
RANK = 64
LINES: tuple[Made, ...] = (
    ("none", 0, ""),
    ("eora", 64, "F16"),
    ("eora", 16, "F16"),
    ("eora", 8, "F16"),
    ("eora", 64, "Q8_0"),
    ("qera_approx", 64, "F16"),
    ("reround", 0, ""),
)
NARROW, WIDE, HEADS, KV_HEADS = 576, 768, 12, 4
FIELDS = ("type", "bits", "method", "rank", "factors", "mbytes", "perplexity", "difference")


@torch.no_grad()
def widened(model: Any) -> nn.Module:
    """The same function with 768 channels: zeros in those beyond 576, and in three heads more.

    A root mean square over more channels is smaller; the weights and the epsilon of norms make good for it.
    """
    config = transformers.LlamaConfig(**model.config.to_dict() | {"hidden_size": WIDE, "num_attention_heads": HEADS}
                                      | {"num_key_value_heads": KV_HEADS})  # fmt: skip
    config.rms_norm_eps = model.config.rms_norm_eps * NARROW / WIDE
    wide = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    given = dict(model.named_parameters())
    for name, parameter in wide.named_parameters():
        parameter.zero_()
        narrow = given[name]
        factor = (NARROW / WIDE) ** 0.5 if narrow.ndim == 1 else 1.0
        parameter[tuple(slice(size) for size in narrow.shape)] = narrow * factor
    return wide


def write_base(path: Path, model: Any, kind: str) -> None:
    """A GGUF file of the model, without a tokenizer."""
    names, config, linears = GgufNames(model), model.config, block_linears(model)
    own = {names.of(name): names.permuted(names.of(name), one.weight).contiguous() for name, one in linears.items()}
    types = {name: type_of(kind, name) for name in own}
    arrays = {name: (w if types[name] == "F32" else quantise(w, types[name])).numpy() for name, w in own.items()}
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for key, parameter in model.named_parameters():
        module = key.removesuffix(".weight")
        name = names.of(module)
        if module in linears:
            raw = None if kind == "F32" else gguf.GGMLQuantizationType[types[name]]
            writer.add_tensor(f"{name}.weight", arrays[name], raw_dtype=raw)
        elif parameter.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{name}.weight", parameter.numpy())
        else:
            add(writer, f"{name}.weight", parameter, "Q8_0")
    close(writer)


def type_of(kind: str, name: str) -> str:
    """The type of a linear in the blocks, of which there are 30."""
    _, block, local = name.split(".")
    for early, own, blocks in EARLY.get(kind, []):
        if local == early and int(block) < blocks:
            return own
    return next(own for begin, own in MIXTURES[kind].items() if local.startswith(begin))


def add(writer: gguf.GGUFWriter, name: str, matrix: torch.Tensor, kind: str) -> None:
    """Write a matrix in a type."""
    own = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(matrix.float().contiguous().numpy(), own)
    writer.add_tensor(name, data, raw_dtype=None if kind == "F16" else own)


def close(writer: gguf.GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def losses(logits_of: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> np.ndarray:
    """(windows, seqlen - 1), of every next token."""
    found = [cross_entropy(logits_of(one)[:-1], one[1:], reduction="none") for one in tqdm(windows, leave=False)]
    return torch.stack(found).double().numpy()


def lines_of(kind: str) -> list[Made]:
    """What is measured of a file type: only what can be. Codes of i-types cannot be chosen one by one."""
    if kind in AS_IT_IS:
        return [LINES[0]]
    return [made for made in LINES if made[0] != "reround" or not kind.startswith("IQ")]


def solver_of(kind: str, made: Made) -> str:
    """Who mends the model for a line. What is measured without a path may have one."""
    return "eora" if made == LINES[0] and kind not in AS_IT_IS else made[0]


def solved(narrow: Any, base: Path, method: str, statistics: dict[str, InputStatistics], imatrix: Path) -> nn.Module:
    """The mended model: by the statistics, or by their diagonal from a file, or with other codes and no path."""
    model, given = widened(narrow), statistics
    if method == "qera_approx":
        write_imatrix(imatrix, statistics, model, "wikitext2:validation", 32, 512)
        given = read_imatrix(imatrix, model)
    path = {"method": "none", "rank": 0} if method in ("none", "reround") else {"method": method, "rank": RANK}
    recipe = Recipe(inputs="original", **path)
    weights = read_checkpoint(base)
    compress_model(model, None, recipe, statistics=given, weights=weights, reround=method == "reround")
    return model


def measure(
    kind: str, made: Made, model: Any, files: tuple[Path, Path | None], windows: torch.Tensor
) -> dict[str, str]:
    """A line of the record. files: of the base and the adapter."""
    with LlamaCpp(*files, windows.shape[1]) as llama:
        there = losses(llama.logits, windows)
    with torch.no_grad(), unpacked(model):
        here = losses(lambda one: model(one[None]).logits[0], windows[:2])
    layers = compensated(model).values()
    held = sum(one.nbytes - one.factors.nbytes for one in layers)
    bits = 8 * held / sum(one.in_features * one.out_features for one in layers) if layers else 32.0
    size = 0 if files[1] is None else sum(tensor.n_bytes for tensor in gguf.GGUFReader(files[1]).tensors)
    row = [kind, f"{bits:.4g}", *made, f"{size / 1e6:.2f}", f"{np.exp(there.mean()):.4f}"]
    return dict(zip(FIELDS, map(str, [*row, f"{np.abs(there[:2] - here).mean():.4f}"]), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(MIXTURES), help="of the base")
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens of wikitext2:test")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    narrow, tokenizer = load_model("smollm2-135m")
    windows = token_windows(tokenizer, "wikitext2:test", options.windows, 512)
    batches = token_windows(tokenizer, "wikitext2:validation", 32, 512)
    statistics = None
    done = list(csv.DictReader(options.record.open())) if options.record.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types:
            told = {(row["method"], int(row["rank"]), row["factors"]) for row in done if row["type"] == kind}
            lines = [made for made in lines_of(kind) if made not in told]
            base, adapter, again = (Path(folder) / name for name in ("base.gguf", "adapter.gguf", "again.gguf"))
            if lines:
                write_base(base, widened(narrow), kind)
            for method, some in itertools.groupby(lines, partial(solver_of, kind)):
                if kind != "F32" and statistics is None:
                    statistics = collect_statistics(widened(narrow), batches)
                model: Any = widened(narrow)
                if kind != "F32":
                    model = solved(narrow, base, method, statistics or {}, Path(folder) / "imatrix.gguf")
                paths = Adapters(model) if kind != "F32" else None
                whole = paths.factors() if paths and method not in ("none", "reround") else {}
                for made in some:
                    files: Files = (base, None)
                    if paths:
                        paths.use(None)
                    if paths and made[1]:
                        factors = {name: (A[: made[1]], B[:, : made[1]]) for name, (A, B) in whole.items()}
                        write_gguf_adapter(adapter, factors, model, made[2])
                        paths.add(f"{made}", factors)
                        paths.use(f"{made}")
                        files = base, adapter
                    elif method == "reround":
                        write_gguf(again, model, like=base)
                        files = again, None
                    done.append(measure(kind, made, model, files, windows))
                    print(*done[-1].values(), flush=True)
                    with options.record.open("w", newline="") as file:
                        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                        writer.writeheader()
                        writer.writerows(done)


if __name__ == "__main__":
    main()
