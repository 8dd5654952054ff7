"""Measure what EoRA gives back to GGUF files, in llama.cpp itself: `python -m docs.gguf`, an hour on two cores.

It needs `EORA_LAB_LLAMACPP=/path/to/python`, a Python that has xllamacpp and numpy. It writes data/measured/gguf.csv, a
line a file and adapter; those that stand there already are not measured again. `difference` is how far the loss of a
token is from that of transformers with the same W^ + B A, in the mean over two windows: llama.cpp rounds activations.

The model is the embedded one. The blocks of k- and i-types have 256 weights, which its rows of 576 are no multiple of;
llama.cpp would take other types in their place. So it is widened to 768 channels first: the same function, with zeros
in the others. Types of linears are those of llama-quantize without an imatrix, the embedding is Q8_0 everywhere.
"""

import argparse
import csv
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import nn

from docs.records import MEASURED
from eora_lab import Recipe, block_linears, collect_statistics, compress_model, load_model, token_windows
from eora_lab.formats import read_checkpoint
from eora_lab.formats.gguf_adapter import gguf_factors
from eora_lab.formats.gguf_names import GgufNames
from eora_lab.formats.names import Factors
from eora_lab.layer.linear import compensated
from eora_lab.run.adapters import Adapters

PEER, RECORD = Path(__file__).with_name("gguf_peer.py"), MEASURED / "gguf.csv"
MIXTURES = {  # file type -> types of its linears, by the beginning of the name; "": all others
    "F32": {"": "F32"},
    "Q4_0": {"": "Q4_0"},
    "Q3_K_S": {"": "Q3_K"},
    "IQ3_XXS": {"attn_q": "IQ2_S", "attn_k": "IQ2_S", "attn_v": "IQ3_S", "attn_o": "IQ3_S", "ffn_down": "Q3_K"}
    | {"": "IQ3_XXS"},
    "Q2_K": {"attn_v": "Q3_K", "attn_o": "Q3_K", "ffn_down": "Q3_K", "": "Q2_K"},
}
EARLY = {"IQ3_XXS": "Q4_K"}  # file type -> the type of ffn_down in the first eighth of the blocks
BARE = ("none", 0, "")
ADAPTERS = (("eora", 64, "F16"), ("eora", 16, "F16"), ("eora", 8, "F16"), ("eora", 64, "Q8_0"))
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


def write_base(path: Path, model: Any, kind: str, work: Path) -> None:
    """A GGUF file of the model, without a tokenizer."""
    names, config, linears = GgufNames(model), model.config, block_linears(model)
    own = {names.of(name): names.permuted(names.of(name), one.weight).contiguous() for name, one in linears.items()}
    arrays, types = {}, {name: type_of(kind, name, config.num_hidden_layers) for name in own}
    for one in sorted(set(types.values())):
        some = {name: weight.numpy() for name, weight in own.items() if types[name] == one}
        if one != "F32":
            np.savez(work / "in.npz", **some)
            peer("quantise", work / "in.npz", work / "out.npz", int(gguf.GGMLQuantizationType[one]))
            some = dict(np.load(work / "out.npz"))
        arrays |= some
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


def type_of(kind: str, name: str, blocks: int) -> str:
    """The type of a linear in the blocks."""
    _, block, local = name.split(".")
    if kind in EARLY and local == "ffn_down" and int(block) < blocks // 8:
        return EARLY[kind]
    return next(own for begin, own in MIXTURES[kind].items() if local.startswith(begin))


def write_adapter(path: Path, model: Any, factors: Factors, kind: str) -> int:
    """An adapter with factors in a type. Returns their bytes."""
    writer = gguf.GGUFWriter(path, GgufNames(model).architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    for name, A, B in gguf_factors(factors, model):
        add(writer, f"{name}.lora_a", A, kind)
        add(writer, f"{name}.lora_b", B, kind)
    close(writer)
    return sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)


def bits_of(model: nn.Module) -> float:
    """Of a weight, in the file."""
    layers = compensated(model).values()
    held = sum(one.nbytes - one.factors.nbytes for one in layers)
    return 8 * held / sum(one.in_features * one.out_features for one in layers)


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


def peer(*arguments: object) -> None:
    """Run llama.cpp."""
    subprocess.run([os.environ["EORA_LAB_LLAMACPP"], "-P", str(PEER), *map(str, arguments)], check=True)


def losses_there(base: Path, adapter: Path | None, tokens: torch.Tensor, work: Path) -> np.ndarray:
    """(windows, seqlen - 1), in llama.cpp."""
    np.save(work / "tokens.npy", tokens.numpy())
    peer("losses", base, adapter or "-", work / "tokens.npy", work / "losses.npy", torch.get_num_threads())
    return np.load(work / "losses.npy")


@torch.no_grad()
def losses_here(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """The same in transformers."""
    found = [model(one[None]).logits[0, :-1].log_softmax(-1).gather(1, one[1:, None])[:, 0] for one in tokens]
    return -torch.stack(found).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(MIXTURES), help="of the base")
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens of wikitext2:test")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    narrow, tokenizer = load_model("smollm2-135m")
    wide = widened(narrow)
    windows, text = token_windows(tokenizer, "wikitext2:test", options.windows, 512), "wikitext2:validation"
    done = list(csv.DictReader(options.record.open())) if options.record.exists() else []

    def keep(kind: str, bits: float, made: tuple, size: int, there: np.ndarray, model: Any) -> None:
        here = losses_here(model, windows[:2])
        row = [kind, f"{bits:.4g}", *made, f"{size / 1e6:.2f}", f"{np.exp(there.mean()):.4f}"]
        row += [f"{np.abs(there[:2] - here).mean():.4f}"]
        done.append(dict(zip(FIELDS, row, strict=True)))
        with options.record.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(done)
        print(*row, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work, statistics, adapter = Path(folder), None, Path(folder) / "adapter.gguf"
        for kind in options.types:
            told = {(row["method"], int(row["rank"]), row["factors"]) for row in done if row["type"] == kind}
            lines = [made for made in (BARE, *ADAPTERS * (kind != "F32")) if made not in told]
            if not lines:
                continue
            base, model, bits = work / f"{kind}.gguf", wide, 32.0
            write_base(base, wide, kind, work)
            if kind != "F32":
                if statistics is None:
                    statistics = collect_statistics(wide, token_windows(tokenizer, text, 32, 512))
                model, recipe = widened(narrow), Recipe(method="eora", rank=64, inputs="original")
                compress_model(model, windows, recipe, statistics=statistics, weights=read_checkpoint(base))
                bits = bits_of(model)
                adapters = Adapters(model)
                whole = adapters.factors()
                adapters.use(None)
            for made in lines:
                size = 0
                if made != BARE:
                    factors = {name: (A[: made[1]], B[:, : made[1]]) for name, (A, B) in whole.items()}
                    size = write_adapter(adapter, model, factors, made[2])
                    adapters.add(f"{made}", factors)
                    adapters.use(f"{made}")
                keep(kind, bits, made, size, losses_there(base, adapter if size else None, windows, work), model)
            base.unlink()


if __name__ == "__main__":
    main()
