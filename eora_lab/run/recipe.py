"""What to do to a model: the settings of a compression pass, checked before anything is changed."""

from collections.abc import Container
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate import SOLVERS, LowRank, solve
from eora_lab.compensate.factors import check_factor_bits
from eora_lab.compensate.shrinkage import solve_shrunk
from eora_lab.compress import COMPRESSORS, PRUNERS, Compressed
from eora_lab.compress.grid import ScaleDtype, ZeroPoint, check_grid
from eora_lab.compress.sparsity import Sparsity
from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import block_linears, check_experts


@dataclass(frozen=True)
class Recipe:
    """Settings of a compression pass."""

    compressor: str = "rtn"
    """how weights are compressed: rtn (round to nearest), gptq, or a pruner: magnitude, wanda, sparsegpt"""
    bits: int = 3
    """bits of a weight, 2 to 8; with a pruner also 16, which quantises nothing"""
    group_size: int = 64
    """input channels that share a grid; -1: one grid per output row"""
    sym: bool = False
    """symmetric grids (zero point in the middle)"""
    mse: bool = False
    """shrink every grid as far as that lowers the squared error of its weights"""
    zero_point: ZeroPoint = "float"
    """of asymmetric grids: float keeps each group's smallest and largest weight; integer keeps zero weights zero"""
    scale_dtype: ScaleDtype = "float32"
    """type of a grid's scale and offset; float16 saves half a bit a weight at groups of 64"""
    sparsity: str = ""
    """what a pruner leaves: n of every m inputs such as 2:4, or the share that goes, such as 0.5"""
    desc_act: bool = True
    """gptq: inputs with the largest activations first, on grids of the original weights"""
    true_sequential: bool = False
    """measure the inputs of o after q, k and v are compressed and compensated, and so on through each block"""
    rounds: int = 1
    """how often at most: compress what the low-rank path leaves of the weight, compensate again (LoftQ's alternation,
    arXiv 2310.08659, in the metric of the method); above 1, the compressed weight is of use with its path only"""
    method: str = "eora"
    """how the error is compensated: none, svd, act_s, qera_approx or eora"""
    rank: int = 64
    """rank of the compensation in every layer; a smaller layer gets the highest that it allows"""
    factor_bits: int = 16
    """bits of A and B: 16, or 2 to 8 on a grid"""
    refit: bool = True
    """round A and B to few bits as GPTQ does, so that the output error grows least, and not to nearest"""
    held_out: float = 0.0
    """share of the calibration samples that is kept apart, for the report to judge by"""
    shrink: bool = False
    """mix S with the identity, as much as the held-out samples ask for"""
    inputs: str = "compensated"
    """where a block's calibration inputs come from: the blocks before it as compressed and compensated, or the
    original model"""

    @property
    def base(self) -> str:
        """The compressed model that is compensated, in short."""
        quantised = f"{self.bits}-bit g{self.group_size}" if self.bits != 16 else ""
        rounds = f"x{self.rounds}" if self.rounds > 1 else ""
        return " ".join(part for part in (self.compressor, self.sparsity, quantised, rounds) if part)

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
        if self.rounds < 1:
            raise EoraLabError(f"rounds must be 1 or more, not {self.rounds}")
        if not 0 <= self.held_out < 1:
            raise EoraLabError(f"the held-out share must be at least 0 and below 1, not {self.held_out}")
        if self.shrink and not self.held_out:
            raise EoraLabError("shrinkage is chosen on held-out samples: hold out a share, such as 0.25")
        check_factor_bits(self.factor_bits)
        check_experts(model)
        if self.true_sequential and self.inputs != "compensated":
            raise EoraLabError(
                'inputs measured within a block are those of the compressed one: use inputs="compensated"'
            )
        prunes = self.compressor in PRUNERS
        if prunes != bool(self.sparsity):
            raise EoraLabError(
                f"{self.compressor} needs a sparsity, such as 2:4"
                if prunes
                else f"{self.compressor} does not prune: leave sparsity out, or use one of {', '.join(PRUNERS)}"
            )
        for name, linear in block_linears(model).items():
            if given is not None and name not in given:
                continue
            if given is None and prunes:
                Sparsity.parse(self.sparsity).check(linear.in_features)
            if given is None and not (prunes and self.bits == 16):
                check_grid(linear.in_features, self.bits, self.group_size)
            if self.method != "none" and ranks and ranks.get(name, 0) > highest_rank(linear):
                raise EoraLabError(f"rank {ranks[name]} is larger than {name} allows: at most {highest_rank(linear)}")
        highest = max(map(highest_rank, block_linears(model).values()))
        if self.method != "none" and ranks is None and self.rank > highest:
            raise EoraLabError(f"rank {self.rank} is larger than any layer allows: at most {highest}")

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """Module name -> rank of every linear in the decoder blocks."""
        return {name: min(self.rank, highest_rank(linear)) for name, linear in block_linears(model).items()}

    def compress(self, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Compressed:
        """Compress one weight with these settings."""
        grid = {name: getattr(self, name) for name in ("bits", "group_size", "sym", "zero_point", "scale_dtype", "mse")}
        own = {"sparsity": self.sparsity} if self.compressor in PRUNERS else {}
        if self.compressor == "gptq":
            own = {"desc_act": self.desc_act}
        return COMPRESSORS[self.compressor](weight, statistics, **grid, **own)

    def compensate(
        self, residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        """Compensate one residual with these settings. Returns the answer and the shrinkage that was chosen."""
        if self.shrink:
            return solve_shrunk(self.method, residual, statistics, rank)
        return solve(self.method, residual, statistics, rank), 0.0


def highest_rank(linear: nn.Linear) -> int:
    """The rank at which a low-rank path can be any matrix of the layer's shape."""
    return min(linear.in_features, linear.out_features)
