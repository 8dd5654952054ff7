"""Who multiplies: the backends of a compressed layer, the first that takes it computes. Each says why it does not.

A backend makes the product of a whole layer, y = W^ x + B (A x) + bias, from what the layer holds packed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from eora_lab.compress import Compressed, GridWeight, zero_points
from eora_lab.errors import EoraLabError, unknown
from eora_lab.layer.cpu_kernels import few_rows, many_rows, pack_grid, why_not_packed
from eora_lab.layer.row_paths import RowPaths
from eora_lab.layer.triton_kernels import FusedLinear, fused_rows, rows_at_once, why_not_fused, why_not_triton

AUTO = "auto"
TILE = 2**18  # weights that are dense at once, on the CPU; they stay in its cache
CPU_ROWS = 16  # tokens up to which the fused CPU kernel beats its own tiles
INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = range(5, 33)  # tokens for which torch's int4 product beats the CPU kernel
NOT_KEPT = "W^ is kept dense only while a model is measured"

Product = Callable[["PackedLayer", Tensor], Tensor]  # the layer, x (..., in) -> y (..., out)


class PackedLayer(nn.Module, ABC):
    """What a backend may use of a layer."""

    in_features: int
    out_features: int
    rank: int
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    bias: Tensor | None
    keep_dense: bool  # W^ may stay dense for a while
    row_paths: RowPaths | None  # of a batch whose texts have a path each; the layer's own is then of rank 0
    made: dict[str, Any]  # what backends made of W^ alone, by their names: it stays when the path changes

    @property
    @abstractmethod
    def compressed(self) -> Compressed:
        """W^, unpacked."""

    @property
    @abstractmethod
    def sample(self) -> Compressed:
        """The first row of W^: its kind of storage, bits and groups."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Compressed:
        """Some rows of W^, unpacked."""

    @abstractmethod
    def rest(self) -> None:
        """Let W^ as it is stored wait in the memory of the host: a backend holds it in its own order."""

    @abstractmethod
    def stored_weight(self) -> dict[str, Tensor]:
        """W^ as a file holds it."""


class Backend(ABC):
    """One way to multiply."""

    name: str
    by_row = False  # whether its product adds the paths of `row_paths`; else the layer does

    @abstractmethod
    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        """What keeps it from computing this layer for such an x; None: nothing."""

    def slower(self, layer: PackedLayer, rows: int) -> bool:
        """Whether a later backend is faster for so many rows of x. Asked where none is forced, and not again until the
        rows pass a power of two."""
        return False

    @abstractmethod
    def prepare(self, layer: PackedLayer) -> Product:
        """The product of the layer as it is now; asked for again when the layer changes. It does not hold the layer."""


class Triton(Backend):
    """The fused kernels for NVIDIA GPUs, for any number of rows. W^ lies on the GPU in their order alone."""

    name = "triton"
    by_row = True

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        if missing := why_not_triton(layer.lora_A.device, layer.lora_A.dtype):
            return f"it needs {missing}"
        return "it has no backward pass" if gradients else why_not_fused(layer.sample, layer.lora_A.dtype)

    def prepare(self, layer: PackedLayer) -> Product:
        if self.name not in layer.made:
            step, stop = rows_at_once(layer.in_features), layer.out_features
            parts = (layer.rows(start, min(start + step, stop)) for start in range(0, stop, step))
            nothing = layer.lora_A[:0], layer.lora_B[:, :0]
            layer.made[self.name] = fused_rows(parts, *nothing, layer.bias, layer.lora_A.dtype)
            layer.rest()
        rows = layer.row_paths
        paths = rows.paths if rows and rows.paths else ((layer.lora_A, layer.lora_B),)
        fused = FusedLinear(layer.made[self.name].with_paths(paths))
        return lambda layer, x: fused(x, layer.row_paths.of_rows(x) if layer.row_paths else None)


class Int4(Backend):
    """torch's int4 product on the CPU, which is fast in bfloat16 only. It holds W^ once more, its grids in bfloat16."""

    name = "int4"

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        weight = layer.sample
        if not layer.lora_A.is_cpu or x.dtype != torch.bfloat16:
            return "it needs bfloat16 on a CPU"
        plain = isinstance(weight, GridWeight) and weight.mask is None and weight.g_idx is None
        if not isinstance(weight, GridWeight) or not plain or weight.bits != 4:
            return "it reads 4-bit grids of neighbouring channels, without a mask"
        if layer.out_features % 16 or weight.group_size not in INT4_GROUPS:
            return f"it needs outputs divisible by 16 and groups of {', '.join(map(str, INT4_GROUPS))}"
        return None if hasattr(torch, "_weight_int4pack_mm_for_cpu") else "this torch does not have it"

    def slower(self, layer: PackedLayer, rows: int) -> bool:
        return rows not in INT4_ROWS

    def prepare(self, layer: PackedLayer) -> Product:
        if self.name not in layer.made:
            weight = layer.compressed
            assert isinstance(weight, GridWeight)
            scales = weight.scales.float()
            middle = (8 - zero_points(weight.scales, weight.offsets)) * scales  # the weight of code 8
            grids = torch.stack([scales, middle], dim=-1).transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
            packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
            layer.made[self.name] = packed, weight.group_size, grids
        made = layer.made[self.name]
        return with_path(lambda _, x: torch._weight_int4pack_mm_for_cpu(x.contiguous(), *made))


class Numba(Backend):
    """The fused kernel for CPUs, which reads W^ as it is stored and computes a few rows in float32; and for more rows,
    tiles of W^ that it unpacks."""

    name = "numba"

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        if not layer.lora_A.is_cpu:
            return f"it needs a CPU, and the layer is on {layer.lora_A.device}"
        if x.dtype == torch.float64:
            return "it computes in float32"
        if not find_spec("numba"):
            return "numba is not installed"
        return "it has no backward pass" if gradients else why_not_packed(layer.sample)

    def slower(self, layer: PackedLayer, rows: int) -> bool:
        return layer.keep_dense and rows > CPU_ROWS

    def prepare(self, layer: PackedLayer) -> Product:
        if self.name not in layer.made:
            weight = layer.compressed
            assert isinstance(weight, GridWeight)
            layer.made[self.name] = pack_grid(weight, layer.stored_weight()["codes"])
        packed = layer.made[self.name]
        few = few_rows(packed, layer.lora_A, layer.lora_B, layer.bias)
        tiled = many_rows(packed)
        many = with_path(lambda _, x: tiled(x))
        return lambda layer, x: few(x) if x.numel() <= CPU_ROWS * layer.in_features else many(layer, x)


class Merged(Backend):
    """W^ in full with the path added to it, for a layer that may keep it so while many products are taken: a path of
    rank 64 takes a quarter of the time of narrow layers. In 16 bits the sum would lose what the path gives back."""

    name = "merged"

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        if not layer.keep_dense:
            return NOT_KEPT
        if layer.lora_A.dtype.itemsize < 4:
            return "the path would be lost in the rounding of its sum with W^"
        return "it has no backward pass" if gradients else None

    def prepare(self, layer: PackedLayer) -> Product:
        W = torch.addmm(layer.compressed.dense(layer.lora_A.dtype), layer.lora_B, layer.lora_A)
        return lambda layer, x: F.linear(x, W, layer.bias)


class Dense(Backend):
    """W^ in full, for a layer that may keep it so while many products are taken."""

    name = "dense"

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        return None if layer.keep_dense else NOT_KEPT

    def prepare(self, layer: PackedLayer) -> Product:
        W = layer.compressed.dense(layer.lora_A.dtype)
        return with_path(lambda _, x: x @ W.T)


class Tiles(Backend):
    """Some rows of W^ are made dense at a time. It takes every layer."""

    name = "tiles"

    def why_not(self, layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool) -> str | None:
        return None

    def prepare(self, layer: PackedLayer) -> Product:
        return with_path(in_tiles)


BACKENDS: dict[str, Backend] = {one.name: one for one in (Triton(), Int4(), Numba(), Merged(), Dense(), Tiles())}
KEPT = ("merged", "dense")  # of these, those that hold W^ in full


def check_backend(name: str) -> None:
    """Raise EoraLabError unless it is a backend's name, or AUTO."""
    if name not in (AUTO, *BACKENDS):
        raise unknown("backend", name, [AUTO, *BACKENDS])


def choose(layer: PackedLayer, x: Shaped[Tensor, "... in"], gradients: bool, wanted: str = AUTO) -> Backend:
    """The backend that computes a layer for such an x. Raises EoraLabError when the wanted one does not take it."""
    check_backend(wanted)
    if wanted != AUTO:
        if reason := BACKENDS[wanted].why_not(layer, x, gradients):
            raise EoraLabError(f"the {wanted} backend cannot take this layer: {reason}; use another one, or {AUTO}")
        return BACKENDS[wanted]
    rows = x.numel() // max(x.shape[-1], 1)
    fit = (one for one in BACKENDS.values() if not one.why_not(layer, x, gradients) and not one.slower(layer, rows))
    return next(fit, BACKENDS["tiles"])


def reasons(layer: PackedLayer, rows: int = 1) -> dict[str, str]:
    """Backend -> why it does not compute this layer for some rows of x; empty for the one that does."""
    x = layer.lora_A.new_empty(rows, layer.in_features)
    chosen, found = choose(layer, x, False), {}
    for name, one in BACKENDS.items():
        why = one.why_not(layer, x, False) or f"slower than {chosen.name} for {rows} rows"
        found[name] = "" if one is chosen else why
    return found


def in_tiles(layer: PackedLayer, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
    """x W^ᵀ, some outputs at a time."""
    y = x.new_empty(len(x), layer.out_features)
    for start, stop in tiles(layer):
        torch.mm(x, layer.rows(start, stop).dense(x.dtype).T, out=y[:, start:stop])
    return y


def with_path(product: Product) -> Product:
    """The whole layer from x W^ᵀ of (tokens, in) alone; gradients reach x, A, B and the bias."""

    def whole(layer: PackedLayer, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = PackedProduct.apply(x, layer, product)
        if layer.rank:
            y = y + F.linear(F.linear(x, layer.lora_A), layer.lora_B)
        return y if layer.bias is None else y + layer.bias

    return whole


class PackedProduct(torch.autograd.Function):
    """x W^ᵀ, with a gradient for x. Nothing is kept for the backward pass: W^ is unpacked again."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "... in"], layer: PackedLayer, product: Product) -> Float[Tensor, "... out"]:
        """x W^ᵀ."""
        ctx.layer = layer
        y = product(layer, x.reshape(-1, layer.in_features))
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], layer.out_features])  # a model may add to it in place

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "... out"]) -> tuple[Float[Tensor, "... in"], None, None]:
        """gradient W^."""
        layer, y = ctx.layer, gradient.reshape(-1, ctx.layer.out_features)
        below = y.new_zeros(len(y), layer.in_features)
        for start, stop in tiles(layer):
            below.addmm_(y[:, start:stop], layer.rows(start, stop).dense(y.dtype))
        return below.view(*gradient.shape[:-1], layer.in_features), None, None


def tiles(layer: PackedLayer) -> list[tuple[int, int]]:
    """Row ranges whose weights are dense at the same time."""
    rows = max(TILE // layer.in_features, 64) if layer.lora_A.is_cpu else layer.out_features
    return [(start, min(start + rows, layer.out_features)) for start in range(0, layer.out_features, rows)]
