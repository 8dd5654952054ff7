"""2:4 weights in 16 bits with a low-rank path: y = x W^ᵀ + (x Aᵀ) Bᵀ + bias, of every four weights at most two kept.

Few rows go through `sparse24_kernel`, which reads 9 bits a weight; for many rows the weight is made dense, as always
on the CPU. Quantised 2:4 weights need nothing of this: see `repack.fused_weight`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.triton_kernels.backend import choose_backend
from eora_lab.triton_kernels.op import rows
from eora_lab.triton_kernels.repack import TILE, tile_table

BLOCK = 256  # channels; K is padded to whole blocks
DECODE_ROWS = 64


@dataclass(frozen=True)
class Sparse24Weight:
    """A 2:4 layer as the kernel reads it. K, N: padded in_, out_features; a four is four consecutive channels.

    values: the first and the second kept weight of each four. places: row 16 b + i holds the fours 64 b + 16 f + i,
    f = 0 .. 3, in 4 bits each from the lowest up: the channel within the four of both values, 2 bits each.
    """

    values: Float[Tensor, "2 fours N"]
    places: Shaped[Tensor, "words N"]  # int16
    A: Float[Tensor, "rank in"]
    Bt: Float[Tensor, "rank N"]
    tiles: Shaped[Tensor, "tiles 4"]  # as in FusedWeight
    bias: Float[Tensor, " N"] | None
    out_features: int

    def to(self, device: torch.device | str) -> "Sparse24Weight":
        """The same on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def pack24(
    weight: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Sparse24Weight:
    """Pack a dense matrix whose zeros follow 2:4. Raises EoraLabError when they do not, or on another dtype."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise EoraLabError(f"the 2:4 kernel computes in float16 or bfloat16, not {dtype}; use the torch backend")
    out_features, in_features = weight.shape
    pad = 0, -in_features % BLOCK, 0, -out_features % TILE
    fours = torch.nn.functional.pad(weight.to(dtype), pad).unflatten(1, (-1, 4))  # (N, fours, 4)
    kept = fours != 0
    if (kept.sum(-1) > 2).any():
        raise EoraLabError("more than two of four consecutive weights are not zero: this is no 2:4 weight")
    place = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = fours.gather(-1, place).permute(2, 1, 0).contiguous()  # (2, fours, N)
    nibble = (place[..., 0] | place[..., 1] << 2).T.reshape(-1, 4, 16, fours.shape[0])  # (blocks, f, i, N)
    words = sum(nibble[:, f].to(torch.int32) << (4 * f) for f in range(4)).reshape(-1, fours.shape[0])
    words = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16).contiguous()

    def columns(matrix: Tensor) -> Tensor:  # (out, rows) -> (rows, N)
        return torch.nn.functional.pad(matrix.to(dtype), (0, 0, 0, pad[3])).T.contiguous()

    bias = None if bias is None else columns(bias[:, None])[0]
    return Sparse24Weight(values, words, A.to(dtype).contiguous(), columns(B), tile_table(B), bias, out_features)


def unpack24(weight: Sparse24Weight) -> Float[Tensor, "out in"]:
    """The inverse of `pack24`, in the dtype of the values."""
    words, N = weight.places.to(torch.int32), weight.places.shape[1]
    fields = torch.stack([(words >> (4 * f)) & 15 for f in range(4)])  # (f, 16 blocks, N)
    nibble = fields.view(4, -1, 16, N).transpose(0, 1).reshape(-1, N)  # (fours, N)
    place = torch.stack([nibble & 3, nibble >> 2], -1).long()
    fours = weight.values.new_zeros(*nibble.shape, 4).scatter_(-1, place, weight.values.permute(1, 2, 0))
    return fours.transpose(0, 1).flatten(1)[: weight.out_features, : weight.A.shape[1]]


@torch.library.custom_op("eora_lab::sparse24_linear", mutates_args=(), device_types=("cpu", "cuda"))
def sparse24_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    A: Tensor,
    Bt: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """x (..., in) -> (..., out). The other arguments are the fields of `Sparse24Weight`."""
    weight, flat = Sparse24Weight(values, places, A, Bt, tiles, bias, out_features), rows(x, None)
    if 0 < len(flat) <= DECODE_ROWS and choose_backend(x.device, x.dtype) == "triton":
        from eora_lab.triton_kernels.configs import choose
        from eora_lab.triton_kernels.launch import sparse_decode

        config = choose(len(flat), places.shape[1], flat.shape[1], 16, 0, len(A), str(x.dtype), x.device.index)
        y = sparse_decode(flat, weight, config)
    else:
        bias = None if bias is None else bias[:out_features]
        y = torch.nn.functional.linear(flat, unpack24(weight), bias)
        y = y.addmm_(flat @ A.T, Bt[:, :out_features])
    return y.view(*x.shape[:-1], out_features)


@sparse24_linear.register_fake
def shape_only(x, values, places, A, Bt, tiles, bias, out_features):
    """The shape of its output, for torch.compile."""
    return x.new_empty(*x.shape[:-1], out_features)
