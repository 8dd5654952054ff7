"""A whole decoder with random weights, shaped like LLaMA: tokens a second in a CUDA graph, and peak memory."""

import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eora_lab.layer.triton_kernels import FusedLinear
from kernels.merge import merge
from kernels.peers import Layer
from kernels.shapes import MERGED, MODELS, Dimensions
from kernels.timing import median_us

CONTEXT = 1024  # tokens in the key-value cache
VARIANTS = ("dense16", "unfused", "fused", "fused_merged")


class Unfused(nn.Module):
    """The quantised product, then two small ones onto it."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.base = FusedLinear(layer.without_path().fused())
        self.register_buffer("At", layer.A.T)
        self.register_buffer("Bt", layer.B.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).addmm_(x @ self.At, self.Bt)


class Dense(nn.Module):
    """One 16-bit matrix, the low-rank path added into it."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.register_buffer("weight", (layer.dense() + layer.B.float() @ layer.A.float()).to(layer.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Together(nn.Module):
    """Layers with the same input: one launch where they are merged, else one after another."""

    def __init__(self, layers: list[Layer], variant: str):
        super().__init__()
        if variant == "fused_merged":
            self.merged = FusedLinear(merge([layer.fused() for layer in layers]))
        else:
            self.parts = nn.ModuleList(linear(layer, variant) for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if hasattr(self, "merged"):
            return self.merged.split(self.merged(x))
        return tuple(part(x) for part in self.parts)


def linear(layer: Layer, variant: str) -> nn.Module:
    if variant == "dense16":
        return Dense(layer)
    return Unfused(layer) if variant == "unfused" else FusedLinear(layer.fused())


class Block(nn.Module):
    """Attention over a key-value cache of CONTEXT tokens, then the gated feed-forward; x is (tokens, hidden)."""

    def __init__(self, dimensions: Dimensions, make: Callable[[str], Layer], variant: str, context: int):
        super().__init__()
        self.dimensions = dimensions
        layers = {name: make(name) for name in dimensions.linears}
        self.qkv = Together([layers[name] for name in MERGED["qkv"]], variant)
        self.gate_up = Together([layers[name] for name in MERGED["gate_up"]], variant)
        self.o, self.down = linear(layers["o"], variant), linear(layers["down"], variant)
        like = layers["o"].A
        ones = torch.ones(dimensions.hidden, dtype=like.dtype, device=like.device)
        self.register_buffer("norm", ones)
        cache = 1, dimensions.kv_heads, context, dimensions.head_dim
        self.register_buffer("keys", torch.randn(cache, device=like.device).to(like.dtype))
        self.register_buffer("values", torch.randn(cache, device=like.device).to(like.dtype))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """One new token at the end of the cache. turn: (2, head_dim), cosines and sines of its position."""
        size, head = self.dimensions, self.dimensions.head_dim
        q, k, v = self.qkv(F.rms_norm(x, (size.hidden,), self.norm, 1e-5))
        q, k = (rotate(t.view(1, -1, 1, head), turn) for t in (q, k))
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = v.view(1, -1, 1, head)
        mixed = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        x = x + self.o(mixed.reshape(1, -1))
        gate, up = self.gate_up(F.rms_norm(x, (size.hidden,), self.norm, 1e-5))
        return x + self.down(F.silu(gate) * up)


def rotate(t: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding, halves swapped."""
    low, high = t.chunk(2, -1)
    return t * turn[0] + torch.cat([-high, low], -1) * turn[1]


class Decoder(nn.Module):
    """Token in, logits out; embedding and head stay in 16 bits."""

    def __init__(
        self, dimensions: Dimensions, bits: int, rank: int, variant: str, device, dtype=torch.float16, context=CONTEXT
    ):
        super().__init__()

        def make(name: str) -> Layer:
            return Layer.random(*dimensions.linears[name], bits, rank, device, dtype)

        self.blocks = nn.ModuleList(Block(dimensions, make, variant, context) for _ in range(dimensions.layers))
        table = torch.randn(dimensions.vocabulary, dimensions.hidden, device=device, dtype=dtype)
        self.register_buffer("embedding", table)
        angle = context / 500000 ** torch.linspace(0, 1, dimensions.head_dim // 2, device=device).repeat(2)
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]).to(dtype))

    def forward(self, token: Tensor) -> Tensor:
        x = self.embedding[token]
        for block in self.blocks:
            x = block(x, self.turn)
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.embedding)


@torch.no_grad()
def time_stack(model: str, rank: int, device: torch.device) -> list[dict]:
    """Every variant at 4 and 3 bits: microseconds of a token and of its linear layers alone, peak bytes."""
    found, token = [], torch.zeros(1, dtype=torch.long, device=device)
    for bits, variant in [(16, "dense16")] + [(bits, v) for bits in (4, 3) for v in VARIANTS[1:]]:
        gc.collect()
        torch.cuda.empty_cache()
        decoder = Decoder(MODELS[model], min(bits, 4), rank, variant, device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        whole = median_us([lambda decoder=decoder: decoder(token)])
        linears = median_us([lambda decoder=decoder: only_linears(decoder)])
        row = {"model": model, "bits": bits, "rank": 0 if bits == 16 else rank, "variant": variant, "context": CONTEXT}
        row |= {"us": whole, "tokens_per_s": 1e6 / whole, "linears_us": linears}
        found.append(row | {"peak_bytes": torch.cuda.max_memory_allocated()})
        del decoder
    return found


def only_linears(decoder: Decoder) -> None:
    """The linear layers of a token in their order, nothing between them."""
    size = decoder.blocks[0].dimensions
    table = decoder.embedding
    x = table[:1]
    wide = table.new_ones(1, size.intermediate)
    mixed = table.new_ones(1, size.heads * size.head_dim)
    for block in decoder.blocks:
        block.qkv(x)
        block.o(mixed)
        block.gate_up(x)
        block.down(wide)
