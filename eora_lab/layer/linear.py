"""A linear layer that holds its compressed weight packed, and the low-rank path beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor, nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import CompressedWeight, SparseWeight, weight_from_state_dict
from eora_lab.compress.weight import WHOLE, zero_points
from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels import FusedLinear, choose_backend, fused_weight

TILE = 2**18  # weights that are dense at once, on the CPU; they stay in its cache
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 64  # tokens up to which torch's int4 product beats dense tiles


class CompensatedLinear(nn.Module):
    """y = W^ x + B (A x) + bias, in place of an `nn.Linear` whose bias, dtype and device it keeps.

    The buffers of W^ are the packed tensors that a file holds (`CompressedWeight.state_dict`); the matrix product
    unpacks some rows at a time, and again for gradients, so that W^ is never held dense.

    factors: A and B as stored. lora_A: (rank, in_features); lora_B: (out_features, rank). Rank 0: no path.
    backend: "auto" computes with the fused Triton kernel where it can (3 and 4 bits in 16-bit models on a GPU, without
        gradients; it holds W^ once more, in its own order), else with torch. "torch" or "triton" forces one.
    """

    def __init__(
        self,
        old: nn.Linear,
        compressed: CompressedWeight | SparseWeight,
        factors: StoredFactors,
        backend: str = "auto",
    ):
        super().__init__()
        self.backend = backend
        self.out_features, self.in_features = compressed.shape
        self.bits, self.factors = compressed.bits, factors
        self.group_size = getattr(compressed, "group_size", None)
        state, device, dtype = compressed.state_dict(), old.weight.device, old.weight.dtype
        self.whole = {name: state.pop(name) for name in WHOLE if name in state}  # stays on the CPU
        self._packed = tuple(state)
        for name, tensor in state.items():
            self.register_buffer(name, tensor.to(device))
        for name, tensor in zip(("lora_A", "lora_B"), factors.dense(), strict=True):
            self.register_buffer(name, tensor.to(device, dtype))
        self.register_buffer("bias", old.bias)
        self._forget()

    def _forget(self) -> None:
        """What was made from the buffers for one product is out of date."""
        self._int4: tuple[Tensor, int, Tensor] | None = None
        self._fused: Callable[[Tensor], Tensor] | Literal["torch"] | None = None
        self._dense: Tensor | None = None

    def set_factors(self, factors: StoredFactors) -> None:
        """Put another low-rank path beside the same compressed weight. Of rank 0: none."""
        A, B = factors.dense()
        self.factors, self.lora_A, self.lora_B = factors, A.to(self.lora_A), B.to(self.lora_B)
        self._forget()

    @property
    def rank(self) -> int:
        """Of the low-rank path; 0: there is none."""
        return self.lora_A.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes as stored: packed weight and factors. The bias is not counted; it is never compressed."""
        g_idx = self.whole.get("g_idx")
        packed = sum(getattr(self, name).nbytes for name in self._packed)
        return packed + (0 if g_idx is None else g_idx.nbytes) + self.factors.nbytes

    @property
    def compressed(self) -> CompressedWeight | SparseWeight:
        """W^, unpacked."""
        return self.rows(0, self.out_features)

    def rows(self, start: int, stop: int) -> CompressedWeight | SparseWeight:
        """Some rows of W^, unpacked."""
        packed = {name: getattr(self, name)[start:stop] for name in self._packed}
        return weight_from_state_dict(packed | self.whole)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """W^ as the matrix product sees it, by default in the dtype of the layer."""
        return self.compressed.dense(dtype or self.lora_A.dtype)

    def stored(self) -> dict[str, Tensor]:
        """All that a file must hold."""
        packed = {name: getattr(self, name) for name in self._packed}
        return packed | self.whole | self.factors.state_dict()

    @classmethod
    def from_stored(cls, tensors: dict[str, Tensor], old: nn.Linear, backend: str = "auto") -> "CompensatedLinear":
        """The inverse of `stored`. Raises KeyError when a tensor is missing or of another shape."""
        compressed = weight_from_state_dict(tensors)
        if compressed.shape != old.weight.shape:
            raise KeyError(f"a weight of {tuple(compressed.shape)} for a layer of {tuple(old.weight.shape)}")
        return cls(old, compressed, StoredFactors.from_state_dict(tensors), backend)

    def _apply(self, fn, recurse=True):
        """Move or cast the layer: the packed tensors follow to another device, and keep their dtypes."""
        packed = {name: getattr(self, name) for name in self._packed}
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            setattr(self, name, tensor.to(self.lora_A.device))
        self._forget()
        return self

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Raises EoraLabError when Triton is asked for and cannot compute this layer here."""
        if not (torch.is_grad_enabled() and x.requires_grad) and (fused := self.fused()) != "torch":
            return fused(x)
        y = PackedProduct.apply(x, self)
        if self.rank:
            y = y + F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y if self.bias is None else y + self.bias

    def fused(self) -> Callable[[Tensor], Tensor] | Literal["torch"]:
        """The whole layer as one call of the fused kernel, made when first asked for, or "torch"."""
        if self._fused is None:
            self._fused = "torch"
            device, dtype = self.lora_A.device, self.lora_A.dtype
            if choose_backend(device, dtype, self.backend) == "triton":
                try:
                    weight = fused_weight(self.compressed, self.lora_A, self.lora_B, self.bias, dtype)
                    self._fused = FusedLinear(weight.to(device)).forward
                except EoraLabError:
                    if self.backend == "triton":
                        raise
        return self._fused

    def product(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """x W^ᵀ."""
        if x.dtype == torch.bfloat16 and len(x) <= INT4_ROWS and self.fits_int4:
            return torch._weight_int4pack_mm_for_cpu(x.contiguous(), *self.int4())
        if self._dense is not None:
            return x @ self._dense.T
        y = x.new_empty(len(x), self.out_features)
        for start, stop in self.tiles():
            torch.mm(x, self.rows(start, stop).dense(x.dtype).T, out=y[:, start:stop])
        return y

    @property
    def fits_int4(self) -> bool:
        """Whether torch's int4 product on the CPU takes this weight. It is fast in bfloat16 only."""
        plain = set(self._packed) == {"codes", "offsets", "scales"} and "g_idx" not in self.whole and self.codes.is_cpu
        return plain and self.bits == 4 and self.out_features % 16 == 0 and self.group_size in INT4_GROUPS

    def int4(self) -> tuple[Shaped[Tensor, "..."], int, BFloat16[Tensor, "groups out 2"]]:
        """W^ as that product takes it: codes in its own order, group size, (scale, weight of code 8) of every group.
        Made when first asked for."""
        if self._int4 is None:
            weight = self.compressed
            scales = weight.scales.float()
            middle = (8 - zero_points(weight.scales, weight.offsets)) * scales
            grids = torch.stack([scales, middle], dim=-1).transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
            self._int4 = torch._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1), weight.group_size, grids
        return self._int4

    def product_with_transpose(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens in"]:
        """y W^."""
        x = y.new_zeros(len(y), self.in_features)
        for start, stop in self.tiles():
            x.addmm_(y[:, start:stop], self.rows(start, stop).dense(y.dtype))
        return x

    def tiles(self) -> list[tuple[int, int]]:
        """Row ranges whose weights are dense at the same time."""
        rows = max(TILE // self.in_features, 64) if self.lora_A.is_cpu else self.out_features
        return [(start, min(start + rows, self.out_features)) for start in range(0, self.out_features, rows)]

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, rank={self.rank}"


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep W^ of every `CompensatedLinear` dense within this context: for the many products of a measurement.

    It costs the memory of the dense weights, and saves unpacking them for every batch.
    """
    layers = [module for module in model.modules() if isinstance(module, CompensatedLinear)]
    layers = [layer for layer in layers if layer.fused() == "torch"]
    for layer in layers:
        layer._dense = layer.dense()
    try:
        yield
    finally:
        for layer in layers:
            layer._dense = None


class PackedProduct(torch.autograd.Function):
    """x W^ᵀ, with a gradient for x. Nothing is kept for the backward pass: W^ is unpacked again."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "... in"], layer: CompensatedLinear) -> Float[Tensor, "... out"]:
        """x W^ᵀ."""
        ctx.layer = layer
        return layer.product(x.reshape(-1, layer.in_features)).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "... out"]) -> tuple[Float[Tensor, "... in"], None]:
        """gradient W^."""
        layer = ctx.layer
        below = layer.product_with_transpose(gradient.reshape(-1, layer.out_features))
        return below.view(*gradient.shape[:-1], layer.in_features), None
