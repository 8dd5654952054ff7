"""What to do to a model: the settings of a compression pass, checked before anything is changed."""

from collections.abc import Container
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.blocks import block_linears
from eora_lab.compensate import SOLVERS, LowRank, solve
from eora_lab.compensate.factors import check_factor_bits
from eora_lab.compensate.shrinkage import solve_shrunk
from eora_lab.compress import COMPRESSORS, CompressedWeight
from eora_lab.compress.grid import ScaleDtype, ZeroPoint, check_grid
from eora_lab.errors import EoraLabError
from eora_lab.linear import CompensatedLinear
from eora_lab.statistics import InputStatistics


@dataclass(frozen=True)
class Recipe:
    """Settings of a compression pass."""

    compressor: str = "rtn"
    """how weights are compressed: rtn (round to nearest) or gptq"""
    bits: int = 3
    """bits of a weight, 2 to 8"""
    group_size: int = 64
    """input channels that share a grid; -1: one grid per output row"""
    sym: bool = False
    """symmetric grids (zero point in the middle)"""
    zero_point: ZeroPoint = "float"
    """of asymmetric grids: float keeps each group's smallest and largest weight; integer keeps zero weights zero"""
    scale_dtype: ScaleDtype = "float32"
    """type of a grid's scale and offset; float16 saves half a bit a weight at groups of 64"""
    method: str = "eora"
    """how the error is compensated: none, svd, act_s, qera_approx or eora"""
    rank: int = 64
    """rank of the compensation in every layer"""
    factor_bits: int = 16
    """bits of A and B: 16, or 2 to 8 on a grid"""
    refit: bool = True
    """after A was rounded to few bits, fit B to it again"""
    held_out: float = 0.0
    """share of the calibration samples that is kept apart, for the report to judge by"""
    shrink: bool = False
    """mix S with the identity, as much as the held-out samples ask for"""
    inputs: str = "compensated"
    """where a block's calibration inputs come from: the blocks before it as compressed and compensated, or the
    original model"""

    def check(self, model: nn.Module, ranks: dict[str, int] | None = None, given: Container[str] | None = None) -> None:
        """Raise EoraLabError when a setting is unknown or does not fit a layer of the model.

        given: the layers that come compressed, so that the compressor and its grid do not matter.
        """
        if any(isinstance(module, CompensatedLinear) for module in model.modules()):
            raise EoraLabError("this model is compressed already: load the original one")
        for kind, name, known in (
            ("compressor", self.compressor, COMPRESSORS),
            ("method", self.method, SOLVERS),
            ("inputs", self.inputs, ("compensated", "original")),
        ):
            if name not in known:
                raise EoraLabError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
        if self.rank < 0:
            raise EoraLabError(f"rank must be 0 or more, not {self.rank}")
        if not 0 <= self.held_out < 1:
            raise EoraLabError(f"the held-out share must be at least 0 and below 1, not {self.held_out}")
        if self.shrink and not self.held_out:
            raise EoraLabError("shrinkage is chosen on held-out samples: hold out a share, such as 0.25")
        check_factor_bits(self.factor_bits)
        for name, linear in block_linears(model).items():
            if given is None:
                check_grid(linear.in_features, self.bits, self.group_size)
            elif name not in given:
                continue
            smaller = min(linear.in_features, linear.out_features)
            rank = self.rank if ranks is None else ranks.get(name, 0)
            if self.method != "none" and rank > smaller:
                raise EoraLabError(f"rank {rank} is larger than {name} allows: at most {smaller}")

    def compress(self, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> CompressedWeight:
        """Compress one weight with these settings."""
        return COMPRESSORS[self.compressor](
            weight,
            statistics,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            zero_point=self.zero_point,
            scale_dtype=self.scale_dtype,
        )

    def compensate(
        self, residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        """Compensate one residual with these settings. Returns the answer and the shrinkage that was chosen."""
        if self.shrink:
            return solve_shrunk(self.method, residual, statistics, rank)
        return solve(self.method, residual, statistics, rank), 0.0
