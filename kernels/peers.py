"""What is timed side by side: every peer as a function of x, made from one random layer and checked against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import FusedLinear, FusedWeight, fused_weight
from kernels.merge import merge

GROUP = 64  # of the default recipe, as are float32 grids with an offset that is no integer


@dataclass(frozen=True)
class Layer:
    """A random layer in bits: a grid with float32 scales and offsets, as the default recipe makes, and factors."""

    grid: GridWeight
    A: Tensor
    B: Tensor

    @classmethod
    def random(
        cls, N: int, K: int, bits: int, rank: int, device: torch.device, dtype: torch.dtype, group: int = GROUP
    ) -> "Layer":
        codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
        scales = (0.5 + torch.rand(N, K // group, device=device)).mul(2**-bits / K**0.5)
        offsets = -scales * (2 ** (bits - 1) + torch.rand_like(scales) - 0.5)
        A = (torch.randn(rank, K, device=device) / K**0.5).to(dtype)
        B = (0.1 * torch.randn(N, rank, device=device)).to(dtype)
        return cls(GridWeight(codes, scales, offsets, bits), A, B)

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    def dense(self) -> Tensor:
        return self.grid.dense(self.dtype)

    def without_path(self) -> "Layer":
        return Layer(self.grid, self.A[:0], self.B[:, :0])

    def fused(self) -> FusedWeight:
        return fused_weight(self.grid, self.A, self.B, dtype=self.dtype)

    def exact(self, x: Tensor) -> Tensor:
        """x W^ᵀ + (x Aᵀ) Bᵀ in float64."""
        codes = self.grid.codes.double().unflatten(1, (-1, self.grid.group_size))
        W = codes * self.grid.scales.double()[..., None] + self.grid.offsets.double()[..., None]
        return x.double() @ W.flatten(1).T + x.double() @ self.A.double().T @ self.B.double().T


def dense16(layer: Layer) -> Callable[[Tensor], Tensor]:
    W = layer.dense()
    return lambda x: F.linear(x, W)


def torch_int4(layer: Layer) -> Callable[[Tensor], Tensor]:
    """torch's own int4 product (bfloat16): its grids are rounded to bfloat16, its zero is code 8."""
    codes, scales = layer.grid.codes, layer.grid.scales
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    grid = torch.stack([scales, layer.grid.offsets + 8 * scales], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, layer.grid.group_size, grid)


def with_low_rank(base: Callable[[Tensor], Tensor], layer: Layer) -> Callable[[Tensor], Tensor]:
    """Unfused: the product, then two small ones onto it."""
    At, Bt = layer.A.T, layer.B.T
    return lambda x: base(x).addmm_(x @ At, Bt)


def ours(layer: Layer) -> Callable[[Tensor], Tensor]:
    return FusedLinear(layer.fused())


def ours_without(layer: Layer) -> Callable[[Tensor], Tensor]:
    return FusedLinear(layer.without_path().fused())


def ours_merged(layers: list[Layer]) -> Callable[[Tensor], Tensor]:
    return FusedLinear(merge([layer.fused() for layer in layers]))


def peers(layer: Layer) -> dict[str, tuple[Callable[[Layer], Callable[[Tensor], Tensor]], bool]]:
    """name: how to make it, and whether the low-rank path is in it."""
    found = {
        "dense16": (dense16, False),
        "unfused": (lambda one: with_low_rank(ours_without(one), one), True),
        "fused": (ours, True),
    }
    if layer.bits == 4 and layer.dtype == torch.bfloat16:
        found["torch_int4"] = (torch_int4, False)
        found["torch_int4_unfused"] = (lambda one: with_low_rank(torch_int4(one), one), True)
    return found
