"""What to do to a model: the settings of a compression pass, checked when they are made.

This file does not import torch, nor what needs it before a recipe is made: commands show these settings.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import fields
from inspect import signature
from typing import TYPE_CHECKING, Literal

from eora_lab.errors import EoraLabError, at_least, check_pattern, meant, settings, unknown

if TYPE_CHECKING:
    import torch


@settings
class BaseSettings:
    """How weights are compressed: all that W^ depends on beside the weight and its statistics."""

    compressor: str = "gptq"
    """how weights are compressed: rtn (round to nearest), gptq, or a pruner: magnitude, wanda, sparsegpt"""
    bits: int | None = None
    """bits of a weight, 2 to 8, of which kernels and checkpoints of other tools take 2, 3, 4 and 8; with a pruner also
    16, which quantises nothing. None: 4, or those of the format"""
    group_size: int | None = None
    """input channels that share a grid; -1: one grid per output row. None: 64, or those of the format"""
    grid: str = "integer"
    """what weights are rounded to: integer (points at equal distances), or as a format does: nf4, mxfp4, nvfp4, fp8,
    q4_0, q8_0"""
    sym: bool = False
    """symmetric grids (zero point in the middle)"""
    mse: bool = False
    """shrink every grid as far as that lowers the squared error of its weights"""
    zero_point: Literal["float", "integer"] = "float"
    """of asymmetric grids: float keeps each group's smallest and largest weight; integer keeps zero weights zero"""
    scale_dtype: Literal["float32", "float16"] = "float32"
    """type of a grid's scale and offset; float16 saves half a bit a weight at groups of 64"""
    sparsity: str = ""
    """what a pruner leaves: n of every m inputs such as 2:4, or the share that goes, such as 0.5"""
    desc_act: bool = True
    """gptq: inputs with the largest activations first, on grids of the original weights"""


@settings
class Selection:
    """Which linears are compressed at all; the others stay as they are. Patterns are searched in full module names."""

    skip: str = ""
    """regular expression; linears whose name it matches stay as they are, such as 'down_proj|layers[.]0[.]'"""
    only: str = ""
    """regular expression; all others stay as they are. Routers, indexers and linears of one output stay by themselves;
    they are compressed where this names them, such as 'mlp[.]gate$'"""
    keep_first: int = 0
    """decoder blocks at the start that stay as they are"""
    keep_last: int = 0
    """decoder blocks at the end that stay as they are"""


@settings
class PathSettings:
    """How the error is compensated: all that the low-rank path depends on beside the residual and its statistics."""

    method: str = "eora"
    """how the error is compensated: none, svd, act_s, lqer, qera_approx, eora (or qera_exact, the same optimum), or
    eora_fisher, which weighs an output error by what it costs the model (one backward pass over the calibration texts);
    act_s_released and eora_paper follow the released code and the paper to the letter"""
    rank: int = 64
    """rank of the compensation in every layer; a layer that allows less gets the highest that it does, and one that no
    layer allows is refused"""
    factor_bits: int = 16
    """bits of A and B: 16, or 2 to 8 on a grid"""
    shared_factors: bool = False
    """layers that read one input (q, k and v; gate and up) share A, which is stored and counted once (GlowQ, arXiv
    2603.25385); a budget then spends what paths of the same rank with an A each would take"""
    refit: bool = True
    """round A and B to few bits as GPTQ does, so that the output error grows least, and not to nearest"""
    shrink: bool = False
    """mix S with the identity, as much as the held-out samples ask for; with eora_fisher also choose its damping"""
    labels: Literal["model", "text"] = "model"
    """eora_fisher: whose loss the backward pass takes: of tokens drawn from the model's own predictions, or of the next
    tokens of the text"""


@settings
class PassSettings:
    """Where the statistics come from that a block is compressed and compensated with."""

    inputs: Literal["compensated", "original", "drift"] = "compensated"
    """where a block's calibration inputs come from: the blocks before it as compressed and compensated, or the
    original model; drift: as compensated, and every layer aims at the outputs of the original model, to make good what
    was lost before it, as far as that helps on held-out samples (QEP, arXiv 2504.09629)"""
    true_sequential: bool = False
    """measure the inputs of o after q, k and v are compressed and compensated, and so on through each block"""
    held_out: float = 0.0
    """share of the calibration samples that is kept apart, for the report to judge by"""
    distil: bool = False
    """after all that, let every low-rank path make one bounded step that brings the predictions of the whole model
    closer to the original's, as far as that holds on held-out samples; needs two backward passes"""


@settings
class Recipe(Selection, PassSettings, PathSettings, BaseSettings):
    """Settings of a compression pass. Raises EoraLabError when one is unknown, of another type, or out of range."""

    rounds: int = 1
    """how often at most: compress what the low-rank path leaves of the weight, compensate again (LoftQ's alternation,
    arXiv 2310.08659, judged by the output error), and keep the best; above 1, the compressed weight is of use with its
    path only"""
    preserve: bool = False
    """try whether it helps to keep the largest part of the weight from the compressor, in as many of the ranks as
    leave least by prediction (SRR, arXiv 2602.02001); the compressed weight is then of use with its path only"""

    def check(self) -> None:
        """Raise EoraLabError when a value is unknown or does not go with the others."""
        self._check_base()
        self._check_path()
        check_pattern(self.skip)
        check_pattern(self.only)
        at_least(0, keep_first=self.keep_first, keep_last=self.keep_last)
        if self.rounds < 1:
            raise EoraLabError(f"rounds must be 1 or more, not {self.rounds}")
        if not 0 <= self.held_out < 1:
            raise EoraLabError(f"the held-out share must be at least 0 and below 1, not {self.held_out}")
        if self.inputs == "drift" and not self.held_out:
            raise EoraLabError("what drift may ask for is chosen on held-out samples: hold out a share, such as 0.125")
        if self.distil and (self.method == "none" or not self.rank):
            raise EoraLabError("only a low-rank path can be distilled: take a method and a rank, or leave distil out")
        if self.distil and not self.held_out:
            raise EoraLabError("how far to distil is found on held-out samples: hold out a share, such as 0.125")
        if self.distil and self.shared_factors:
            raise EoraLabError(
                "a step of distillation moves every layer's A by itself: leave distil or shared_factors out"
            )
        if self.true_sequential and self.inputs == "original":
            raise EoraLabError(
                'inputs measured within a block are those of the compressed one: use inputs="compensated"'
            )

    def _check_base(self) -> None:
        from eora_lab.compress import COMPRESSORS, PRUNERS, Sparsity
        from eora_lab.compress.format_grids import INTEGER, settle
        from eora_lab.compress.grid import check_grid

        if self.compressor not in COMPRESSORS:
            raise unknown("compressor", self.compressor, COMPRESSORS)
        bits, group_size = settle(**self.base_settings())
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", group_size)
        if self.grid != INTEGER and not takes_formats(COMPRESSORS[self.compressor]):
            able = " or ".join(name for name, one in COMPRESSORS.items() if takes_formats(one))
            raise EoraLabError(f"{self.compressor} cannot round to {self.grid}: use {able}, or leave grid out")
        if self.prunes != bool(self.sparsity):
            raise EoraLabError(
                f"{self.compressor} needs a sparsity, such as 2:4"
                if self.prunes
                else f"{self.compressor} does not prune: leave sparsity out, or use one of {', '.join(PRUNERS)}"
            )
        if self.prunes:
            Sparsity.parse(self.sparsity)
        if self.quantises:
            check_grid(1, bits, group_size)

    def _check_path(self) -> None:
        from eora_lab.compensate import SOLVERS
        from eora_lab.compensate.factors import check_factor_bits

        if self.method not in SOLVERS:
            raise unknown("method", self.method, SOLVERS)
        if self.rank < 0:
            raise EoraLabError(f"rank must be 0 or more, not {self.rank}")
        if self.shrink and not self.held_out:
            raise EoraLabError("shrinkage is chosen on held-out samples: hold out a share, such as 0.25")
        check_factor_bits(self.factor_bits)
        if self.preserve and SOLVERS[self.method] not in (SOLVERS["eora"], SOLVERS["eora_fisher"]):
            raise EoraLabError(
                "what is preserved is judged by the output error: take eora or eora_fisher, or leave preserve out"
            )

    @property
    def prunes(self) -> bool:
        """Whether the compressor drops weights."""
        from eora_lab.compress import PRUNERS

        return self.compressor in PRUNERS

    @property
    def quantises(self) -> bool:
        """Whether the weights that are kept go onto a grid."""
        return not (self.prunes and self.bits == 16)

    @property
    def shares(self) -> bool:
        """Whether layers that read one input share A."""
        return self.shared_factors and self.method != "none"

    @property
    def base(self) -> str:
        """The compressed model that is compensated, in short."""
        integer = f"{self.bits}-bit g{self.group_size}" if self.bits != 16 else ""
        quantised = integer if self.grid == "integer" else self.grid
        rounds = f"x{self.rounds}" if self.rounds > 1 else ""
        preserved = "preserved" if self.preserve else ""
        stays = [f"{name.replace('_', ' ')} {value}" for name, value in self.selection().items() if value]
        return " ".join(part for part in (self.compressor, self.sparsity, quantised, preserved, rounds, *stays) if part)

    def base_settings(self) -> dict:
        """The fields of `BaseSettings`."""
        return {field.name: getattr(self, field.name) for field in fields(BaseSettings)}

    def selection(self) -> dict:
        """The fields of `Selection`."""
        return {field.name: getattr(self, field.name) for field in fields(Selection)}

    def left(self, model: "torch.nn.Module", given: Container[str] | None = None) -> dict[str, str]:
        """Module name -> why it stays as it is by choice, see `left_by_choice`, which says what is raised.

        given: the layers that come compressed: then these are the choice.
        """
        from eora_lab.model.leave import left_by_choice

        if given is not None:
            return {name: reason for name, reason in left_by_choice(model).items() if name not in given}
        return left_by_choice(model, **self.selection())

    def check_fit(
        self, model: "torch.nn.Module", ranks: Mapping[str, int] | None = None, given: Container[str] | None = None
    ) -> None:
        """Raise EoraLabError when a setting does not fit a layer of the model.

        ranks: module name -> rank, where they are not the recipe's own.
        given: the layers that come compressed, so that the compressor and its grid do not matter.
        """
        from eora_lab.compress import Sparsity
        from eora_lab.layer.linear import compensated
        from eora_lab.model.structure import block_linears, check_experts

        if compensated(model):
            raise EoraLabError("this model is compressed already: load the original one")
        check_experts(model)
        linears = block_linears(model)
        if strangers := [name for name in ranks or {} if name not in linears]:
            hint = meant(strangers[0], linears)
            raise EoraLabError(f"a rank is given for {strangers[0]}, which is no linear in the decoder blocks{hint}")
        left = self.left(model, given)
        chosen = {name: linear for name, linear in linears.items() if name not in left}
        for name, linear in chosen.items():
            if given is None and self.prunes:
                Sparsity.parse(self.sparsity).check(linear.in_features)
            if self.method != "none" and ranks and not 0 <= ranks.get(name, 0) <= highest_rank(linear):
                raise EoraLabError(f"rank {ranks[name]} is larger than {name} allows: at most {highest_rank(linear)}")
        highest = max(map(highest_rank, chosen.values()))
        if self.method != "none" and ranks is None and self.rank > highest:
            raise EoraLabError(f"rank {self.rank} is larger than any layer allows: at most {highest}")

    def ranks(self, model: "torch.nn.Module", left: Container[str] | None = None) -> dict[str, int]:
        """Module name -> rank of every linear in the decoder blocks that is compressed.

        left: names of those that are not, where that is known.
        """
        from eora_lab.model.structure import block_linears

        left = self.left(model) if left is None else left
        linears = {name: linear for name, linear in block_linears(model).items() if name not in left}
        return {name: min(self.rank, highest_rank(linear)) for name, linear in linears.items()}


def takes_formats(compressor: Callable) -> bool:
    """Whether a compressor names the grid among its settings."""
    grid = signature(compressor).parameters.get("grid")
    return grid is not None and grid.kind is not grid.VAR_KEYWORD


def highest_rank(linear: "torch.nn.Linear") -> int:
    """The rank at which a low-rank path can be any matrix of the layer's shape."""
    return min(linear.in_features, linear.out_features)
