"""What is timed side by side: every peer as a function of x, made from one random layer and checked against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eora_lab.layer.triton_kernels import FusedLinear, FusedWeight, repack
from kernels.merge import merge

GROUP = 128


@dataclass(frozen=True)
class Layer:
    """A random layer in bits: codes, zero points 2^(bits-1), scales, factors, and the float64-exact dense weight."""

    codes: Tensor
    scales: Tensor
    bits: int
    A: Tensor
    B: Tensor

    @classmethod
    def random(cls, N: int, K: int, bits: int, rank: int, device: torch.device, dtype: torch.dtype) -> "Layer":
        codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
        scales = (0.5 + torch.rand(N, K // GROUP, device=device)).mul(2**-bits / K**0.5).to(dtype)
        A = (torch.randn(rank, K, device=device) / K**0.5).to(dtype)
        return cls(codes, scales, bits, A, (0.1 * torch.randn(N, rank, device=device)).to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    def dense(self) -> Tensor:
        centred = (self.codes.float() - 2 ** (self.bits - 1)).unflatten(1, (-1, GROUP))
        return (centred * self.scales.float()[..., None]).flatten(1).to(self.dtype)

    def fused(self, rank: int | None = None) -> FusedWeight:
        offsets = torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=self.codes.device)
        scales = self.scales
        A, B = self.A[:rank], self.B[:, :rank]
        return repack(self.codes, scales, offsets, self.bits, A, B, dtype=self.dtype)

    def exact(self, x: Tensor) -> Tensor:
        """x W^ᵀ + (x Aᵀ) Bᵀ in float64."""
        centred = (self.codes.double() - 2 ** (self.bits - 1)).unflatten(1, (-1, GROUP))
        W = (centred * self.scales.double()[..., None]).flatten(1)
        return x.double() @ W.T + x.double() @ self.A.double().T @ self.B.double().T


def dense16(layer: Layer) -> Callable[[Tensor], Tensor]:
    W = layer.dense()
    return lambda x: F.linear(x, W)


def torch_int4(layer: Layer) -> Callable[[Tensor], Tensor]:
    """torch's own int4 product (bfloat16, symmetric): its zero is code 8."""
    codes = layer.codes
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    grid = torch.stack([layer.scales, torch.zeros_like(layer.scales)], -1).transpose(0, 1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid)


def with_low_rank(base: Callable[[Tensor], Tensor], layer: Layer) -> Callable[[Tensor], Tensor]:
    """Unfused: the product, then two small ones onto it."""
    At, Bt = layer.A.T, layer.B.T
    return lambda x: base(x).addmm_(x @ At, Bt)


def ours(layer: Layer) -> Callable[[Tensor], Tensor]:
    return FusedLinear(layer.fused())


def ours_without(layer: Layer) -> Callable[[Tensor], Tensor]:
    return FusedLinear(layer.fused(rank=0))


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
