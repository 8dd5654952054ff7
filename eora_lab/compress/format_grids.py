"""The grids of formats that are deployed: levels of their own, groups of their own, scales as the format stores them.

Each rounds as the format's own tools do, to the bit: bitsandbytes for NF4, compressed-tensors for NVFP4 and FP8, gguf
for Q4_0, Q8_0 and (but for weights right between two levels) MXFP4. All can hold a weight of 0.

nf4     quantiles of a normal distribution, groups of 64, scale max|w| in float32 (QLoRA, arXiv 2305.14314, appendix E)
mxfp4   E2M1, groups of 32, scale a power of two (OCP Microscaling Formats v1.0, section 6.3)
nvfp4   E2M1, groups of 16, scale in E4M3, and one float32 number for the tensor
fp8     E4M3, one float32 scale an output row
q4_0    4-bit integers, groups of 32, float16 scale
q8_0    8-bit integers, groups of 32, float16 scale
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from eora_lab.compress.codebook_weight import CodebookWeight
from eora_lab.compress.grid import SHRINKS, Grid, RoundingGrid, check_grid
from eora_lab.errors import EoraLabError, unknown

INTEGER = "integer"  # the name of the grids that are no format's: those of `Grid`
BYTES = torch.arange(256, dtype=torch.uint8)
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*HALF, *(-level for level in HALF)])
E4M3 = BYTES.view(torch.float8_e4m3fn).float().nan_to_num(0)  # its two NaN are no levels
E4M3_MAX = 448.0
SMALLEST = 1e-38  # scale that has a reciprocal
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


Groups = Float[Tensor, "out groups"]
Weights = Float[Tensor, "*weight"]
Codes = Shaped[Tensor, "*weight"]


@dataclass(frozen=True)
class FormatGrid(RoundingGrid):
    """W^ = levels[code] * scale / tensor_scale. It is fitted as the scales, before they are stored.

    reciprocal: weights are multiplied by 1 / scale before they are rounded, and not divided by the scale.
    mse: see `Grid`; ranges larger than that of the weights are tried, too.
    tensor_scale: see `CodebookWeight`; None: the format has none.
    """

    levels: ClassVar[Tensor]
    bits = 4
    group_size = 32
    reciprocal = False
    shrinks = (2.0, 1.5, *SHRINKS)

    mse: bool = False
    tensor_scale: Float32[Tensor, "1"] | None = None

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], mse: bool) -> "FormatGrid":
        """The grid for a whole weight."""
        return cls(mse)

    @abstractmethod
    def scale(self, peak: Groups) -> Groups:
        """What a group is divided by whose weight of largest magnitude is given."""

    @abstractmethod
    def code(self, x: Weights) -> Codes:
        """The codes of the nearest levels. x: weights over their scale."""

    def stored(self, scales: Groups) -> Shaped[Tensor, "out groups"]:
        """Scales in the type that the format stores."""
        return scales

    def ends(self, groups: Float[Tensor, "out groups group_size"]) -> tuple[Groups]:
        """The weight of largest magnitude, with its sign."""
        return (groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0],)

    def span(self, peak: Groups) -> tuple[Groups]:  # type: ignore[override]
        """The scales for weights of largest magnitude."""
        scales = self.scale(peak)
        if not (peak.isfinite().all() and self.stored(scales).float().isfinite().all()):
            raise EoraLabError("weights are not finite, or too large for the scales of this format")
        return (scales,)

    def ready(self, scales: Groups) -> tuple[Groups, Groups]:  # type: ignore[override]
        """What a weight is divided or multiplied by to be rounded, and what a level is multiplied by."""
        scale = self.stored(scales).float()
        if self.tensor_scale is not None:
            scale = scale / self.tensor_scale
        return 1 / torch.where(scales.abs() < SMALLEST, SMALLEST, scales) if self.reciprocal else scale, scale

    def nearest(self, weight: Weights, unit: Shaped[Tensor, "*groups"], _: Tensor) -> Codes:  # type: ignore[override]
        """The codes of the nearest levels."""
        return self.code(weight * unit if self.reciprocal else weight / unit)

    def points(self, codes: Codes, _: Tensor, scale: Shaped[Tensor, "*groups"]) -> Weights:  # type: ignore[override]
        """What codes stand for."""
        return self.levels.to(scale.device)[codes.int()] * scale

    def store(  # type: ignore[override]
        self, codes: Shaped[Tensor, "out in"], scales: Groups, mask: Bool[Tensor, "out in"] | None = None
    ) -> CodebookWeight:
        """Codes with their scales. No format has a place for a mask."""
        assert mask is None
        group_size = check_grid(codes.shape[1], self.bits, self.group_size)
        codes = codes.to(torch.uint8).contiguous()
        return CodebookWeight(codes, self.levels, self.stored(scales), self.bits, group_size, self.tensor_scale)


def middles(levels: Float[Tensor, " levels"], up: Bool[Tensor, "..."]) -> Float[Tensor, " pairs"]:
    """Bounds for `torch.bucketize` between rising levels. up: where a weight in the very middle takes the upper one."""
    middle = (levels[:-1] + levels[1:]) / 2
    return torch.where(up, middle.nextafter(torch.tensor(-torch.inf)), middle)


class NF4(FormatGrid):
    """Quantiles of a normal distribution. Groups end with a row, as those of bitsandbytes do where 64 divides it."""

    group_size = 64
    levels = NF4_LEVELS
    reciprocal = True
    bounds = middles(NF4_LEVELS, up=torch.tensor(False))

    def scale(self, peak: Groups) -> Groups:
        """max|w|."""
        return peak.abs()

    def code(self, x: Weights) -> Codes:
        """Of two levels that are as near, the lower one."""
        return torch.bucketize(x, self.bounds.to(x.device), out_int32=True)


class FP4(FormatGrid):
    """The levels of E2M1, with the sign in the highest bit of a code."""

    levels = E2M1
    rising = torch.tensor([*range(15, 8, -1), *range(8)])  # the codes in the order of their levels
    bounds = middles(E2M1[rising], up=rising[1:] % 2 == 0)

    def code(self, x: Weights) -> Codes:
        """Of two levels that are as near, that with an even code."""
        return self.rising.to(x.device)[torch.bucketize(x, self.bounds.to(x.device))]


class MXFP4(FP4):
    """The scale brings the largest weight of a group between 4 and 8; what is beyond 6 becomes 6."""

    def scale(self, peak: Groups) -> Groups:
        """2^(floor(log2 max|w|) - 2), as far as the exponent's byte reaches."""
        exponent = (peak.abs().frexp().exponent - 1 - 2).clamp(-127, 127).masked_fill(peak == 0, -127)
        return torch.ldexp(torch.ones_like(peak), exponent)

    def stored(self, scales: Groups) -> Shaped[Tensor, "out groups"]:
        """The exponents alone, in E8M0."""
        return (scales.frexp().exponent - 1 + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


class NVFP4(FP4):
    """The tensor's scale brings those of the groups into the range of E4M3."""

    group_size = 16

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], mse: bool) -> "NVFP4":
        """tensor_scale = 448 * 6 / max|w|, down to a power of two: so that linears which a server fuses, and which must
        then have one, can be given it without a change of their weights (`eora_lab.formats`)."""
        largest = E4M3_MAX * 6 / weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        exponent = torch.nan_to_num(largest, nan=1.0, posinf=1.0).frexp().exponent - 1
        return cls(mse, torch.ldexp(torch.ones(1, device=weight.device), exponent.reshape(1)))

    def scale(self, peak: Groups) -> Groups:
        """tensor_scale * max|w| / 6, rounded to E4M3; 0.125 in place of 0."""
        assert self.tensor_scale is not None
        scales = self.stored(self.tensor_scale * (peak.abs() / 6)).float()
        return torch.where(scales == 0, 0.125, scales)

    def stored(self, scales: Groups) -> Shaped[Tensor, "out groups"]:
        """In E4M3."""
        return scales.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)


class FP8(FormatGrid):
    """E4M3 with one scale an output row."""

    bits = 8
    group_size = -1
    levels = E4M3

    def scale(self, peak: Groups) -> Groups:
        """max|w| / 448; 2^-23 in place of 0."""
        scales = peak.abs() / E4M3_MAX
        return torch.where(scales == 0, torch.finfo(torch.float32).eps, scales)

    def code(self, x: Weights) -> Codes:
        """Of two levels that are as near, that with an even code."""
        return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


class GGUF(FormatGrid):
    """Whole numbers. They are found with the scale as it is before float16 rounds it, as ggml does."""

    reciprocal = True

    def stored(self, scales: Groups) -> Shaped[Tensor, "out groups"]:
        """In float16."""
        return scales.half()


class Q4_0(GGUF):
    """-8 to 7. The weight of largest magnitude becomes -8, so that scales have signs."""

    levels = torch.arange(16.0) - 8

    def scale(self, peak: Groups) -> Groups:
        """The weight of largest magnitude over -8."""
        return peak / -8

    def code(self, x: Weights) -> Codes:
        """Of two levels that are as near, the upper one."""
        return (x + 8.5).floor_().clamp_(0, 15)


class Q8_0(GGUF):
    """-127 to 127."""

    bits = 8
    levels = BYTES.view(torch.int8).float()

    def scale(self, peak: Groups) -> Groups:
        """max|w| / 127."""
        return peak.abs() / 127

    def code(self, x: Weights) -> Codes:
        """Of two levels that are as near, that farther from 0."""
        steps = (x.abs() + 0.5).floor_().clamp_max_(127)
        return steps.copysign_(x).to(torch.int8).view(torch.uint8)


GRIDS: Mapping[str, type[FormatGrid]] = MappingProxyType(
    {"nf4": NF4, "mxfp4": MXFP4, "nvfp4": NVFP4, "fp8": FP8, "q4_0": Q4_0, "q8_0": Q8_0}
)


def settle(grid: str, bits: int | None, group_size: int | None, **settings: Any) -> tuple[int, int]:
    """The bits and the group size of a grid: as asked for, or as the format has them.

    settings: others of `Grid`, which say nothing of a format but mse. Raises EoraLabError on an unknown grid, and on
    settings that contradict its format.
    """
    if grid == INTEGER:
        return 4 if bits is None else bits, 64 if group_size is None else group_size
    if grid not in GRIDS:
        raise unknown("grid", grid, (INTEGER, *GRIDS))
    found = GRIDS[grid]
    for name, asked, has in (("bits", bits, found.bits), ("group_size", group_size, found.group_size)):
        if asked not in (None, has):
            raise EoraLabError(f"{grid} has {name} {has}, not {asked}: leave {name} out, or use grid {INTEGER}")
    for name, default in (("sym", False), ("zero_point", "float"), ("scale_dtype", "float32")):
        if settings.get(name, default) != default:
            raise EoraLabError(f"{grid} has scales and levels of its own: leave {name} out, or use grid {INTEGER}")
    return found.bits, found.group_size


def choose(weight: Float[Tensor, "out in"], grid: str, mse: bool = False, **settings: Any) -> RoundingGrid:
    """The grid of that name for a weight. settings: the others of `Grid`. Raises EoraLabError as `settle`."""
    bits, group_size = settle(grid, settings.pop("bits", None), settings.pop("group_size", None), **settings)
    if grid == INTEGER:
        return Grid(bits, group_size, mse=mse, **settings)
    return GRIDS[grid].of(weight, mse)
