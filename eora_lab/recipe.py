"""What to do to a model: the settings of a compression pass, checked before anything is changed."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.blocks import decoder_blocks, linears
from eora_lab.compensate import SOLVERS
from eora_lab.compress import COMPRESSORS, CompressedWeight
from eora_lab.compress.grid import ZeroPoint, check_grid
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
    method: str = "eora"
    """how the error is compensated: none, svd, act_s, qera_approx or eora"""
    rank: int = 64
    """rank of the compensation in every layer"""
    inputs: str = "compensated"
    """where a block's calibration inputs come from: the blocks before it as compressed and compensated, or the
    original model"""

    def check(self, model: nn.Module) -> None:
        """Raise EoraLabError when a setting is unknown or does not fit a layer of the model."""
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
        for prefix, block in decoder_blocks(model).items():
            for local, linear in linears(block).items():
                check_grid(linear.in_features, self.bits, self.group_size)
                smaller = min(linear.in_features, linear.out_features)
                if self.method != "none" and self.rank > smaller:
                    raise EoraLabError(f"rank {self.rank} is larger than {prefix}.{local} allows: at most {smaller}")

    def compress(self, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> CompressedWeight:
        """Compress one weight with these settings."""
        return COMPRESSORS[self.compressor](
            weight,
            statistics,
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            zero_point=self.zero_point,
        )
