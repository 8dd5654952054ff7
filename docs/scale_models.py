"""Models of real shapes with random weights, made on the spot: what `docs.scale` measures.

Output channels differ in scale, as those of trained models do: with channels all alike no direction of an error would
stand out, and every solve would take its slowest road. All blocks of a model are alike, so that it is soon made; its
shards are the weights of a Q4_0 file with noise as large as their rounding.
"""

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from eora_lab.files import write_json

HEAD = 128  # channels of a head
EMBEDDING, HEADS = "model.embed_tokens.weight", "lm_head.weight"
LINEARS = {  # name in the model -> in the file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
Q4_0 = gguf.GGMLQuantizationType.Q4_0
INDEX = "model.safetensors.index.json"  # written last


@dataclass(frozen=True)
class Shape:
    """Of a Llama. kv_heads: heads of keys and values, of 128 channels."""

    hidden: int
    ffn: int
    blocks: int
    kv_heads: int
    vocabulary: int

    @property
    def folder(self) -> str:
        """A name for it."""
        return f"{self.hidden}-{self.ffn}-{self.blocks}-{self.kv_heads}-{self.vocabulary}"

    @property
    def config(self) -> transformers.LlamaConfig:
        """Of transformers."""
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // HEAD,
            num_key_value_heads=self.kv_heads,
            dtype="bfloat16",
        )

    def size(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        if "mlp" in name:
            return (self.hidden, self.ffn) if "down" in name else (self.ffn, self.hidden)
        return (HEAD * self.kv_heads if name.endswith(("k_proj", "v_proj")) else self.hidden), self.hidden


def make(folder: Path, shape: Shape) -> None:
    """Write an original model in bfloat16, a shard a block."""
    folder.mkdir(parents=True)
    shape.config.save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(["?", *string.printable.replace("?", "")])}
    by_letter = tokenizers.Tokenizer(tokenizers.models.BPE(letters, merges=[], unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=by_letter, unk_token="?").save_pretrained(folder)
    shards: dict[str, str] = {}

    def keep(shard: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / shard, {"format": "pt"})
        shards.update(dict.fromkeys(tensors, shard))

    for name, weight in _outer(shape):
        keep(f"{name.split('.')[-2]}.safetensors", {name: weight})
    tensors = {f"{name}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16) for name in NORMS}
    for name, _, weight in _linears(shape):
        if name.endswith(("q_proj", "k_proj")):  # the file has the rows of a head in pairs
            weight = weight.unflatten(0, (-1, HEAD // 2, 2)).transpose(1, 2).flatten(0, 2)
        tensors[f"{name}.weight"] = weight.contiguous()
    for block in range(shape.blocks):
        keep(f"block-{block}.safetensors", {f"model.layers.{block}.{key}": one for key, one in tensors.items()})
    keep("norm.safetensors", {"model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)})
    write_json(folder / INDEX, {"metadata": {}, "weight_map": shards})


def make_file(path: Path, shape: Shape) -> None:
    """Write the Q4_0 file of such a model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(shape.hidden // HEAD)
    writer.add_head_count_kv(shape.kv_heads)
    plain = {"output_norm": np.ones(shape.hidden, np.float32)}
    plain |= {{EMBEDDING: "token_embd", HEADS: "output"}[name]: weight.half().numpy() for name, weight in _outer(shape)}
    for name, values in plain.items():
        writer.add_tensor_info(f"{name}.weight", values.shape, values.dtype, values.nbytes)
    for block, (name, inner) in itertools.product(range(shape.blocks), LINEARS.items()):
        rows, columns = shape.size(name)
        stored = rows, columns // 32 * 18
        writer.add_tensor_info(f"blk.{block}.{inner}.weight", stored, np.dtype(np.uint8), rows * stored[1], Q4_0)
    for block, name in itertools.product(range(shape.blocks), NORMS.values()):
        writer.add_tensor_info(f"blk.{block}.{name}.weight", (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in plain.values():
        writer.write_tensor_data(values)
    codes = [codes for _, codes, _ in _linears(shape)]
    for _, one in itertools.product(range(shape.blocks), codes):
        writer.write_tensor_data(one)
    for _ in range(shape.blocks * len(NORMS)):
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    writer.close()


def _outer(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Embedding and head."""
    random = np.random.default_rng(1)
    for name, scale in ((EMBEDDING, 1.0), (HEADS, shape.hidden**-0.5)):
        values = random.standard_normal((shape.vocabulary, shape.hidden), np.float32)
        yield name, torch.from_numpy(values).mul_(scale).bfloat16()


def _linears(shape: Shape) -> Iterator[tuple[str, np.ndarray, Tensor]]:
    """Name of a linear, blocks of its Q4_0 weight, and the weight that they could be a rounding of, in bfloat16."""
    random = np.random.default_rng(0)
    for name in LINEARS:
        rows, columns = shape.size(name)
        codes = random.integers(0, 256, (rows, columns // 32, 18), np.uint8)
        spread = np.exp(random.standard_normal((rows, 1, 1), np.float32) - 1)  # mean square 1
        scale = np.repeat((0.2 * columns**-0.5 * spread).astype(np.float16), columns // 32, axis=1)
        codes[..., :2] = scale.view(np.uint8)
        codes = codes.reshape(rows, -1)
        weight = gguf.quants.dequantize(codes, Q4_0)
        weight += scale[:, 0] * (random.random((rows, columns), np.float32) - 0.5)
        yield name, codes, torch.from_numpy(weight).bfloat16()
