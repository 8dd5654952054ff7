"""One right factor for layers that share an input: A x is computed once, and A is stored and counted once.

Row under row the layers are one layer with the input x that they share, and what they lose is its low-rank problem:

    min over A and B_i of Σ_i tr(F_i (R_i - B_i A) S (R_i - B_i A)ᵀ),  F_i = L_i L_iᵀ,

is the solver's own one for R = [L_1ᵀ R_1; L_2ᵀ R_2; ...], whose B is cut into the L_iᵀ B_i: no other A that the layers
share leaves less, at any rank. Paths of their own leave no more at the same rank r, and no less at ranks r_i with
Σ r_i = r; they take another number of parameters at either.

F_i is that of the gradients where a method looks at them. Else it is I / E|W_i x|², so that every layer's error counts
relative to its output. GlowQ (An, Suh and Kim, arXiv 2603.25385) stacks errors as they are: F_i = I.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate import LowRank, needs_outputs, solve
from eora_lab.compensate.shrinkage import solve_shrunk
from eora_lab.errors import EoraLabError

QUIET = 1e-3  # of the others' gradients, that a layer without any counts as


class StackedOutputs(OutputStatistics):
    """Statistics of the outputs of several layers as those of one: F = diag(F_1, F_2, ...), each damped by itself.

    parts: of the layers, in the order of their rows. F itself is formed only where it is asked for.
    """

    def __init__(self, parts: Sequence[OutputStatistics]):
        super().__init__(sum(one.out_features for one in parts), parts[0].device, parts[0].name)
        self.parts, self.tokens = list(parts), max(one.tokens for one in parts)
        held_out = [one.held_out for one in parts if one.held_out]
        self.held_out = StackedOutputs(held_out) if len(held_out) == len(parts) else None
        sizes = [one.second_moment.diagonal().mean().item() ** 0.5 for one in parts]
        lowest = min((size for size in sizes if size), default=1.0)
        self._times = [1.0 if size else QUIET * lowest for size in sizes] if any(sizes) else [1.0] * len(sizes)

    @property  # type: ignore[misc]
    def second_moment(self) -> Float[Tensor, "out out"]:
        """F, with zeros between the layers."""
        return torch.block_diag(*(one.second_moment for one in self.parts))

    @property
    def seen(self) -> bool:
        """Whether there was any gradient."""
        return any(one.seen for one in self.parts)

    def damped(self, damping: float) -> "StackedOutputs":
        """The same F with another damping."""
        return StackedOutputs([one.damped(damping) for one in self.parts])

    def root(self) -> Float[Tensor, "out out"]:
        """L, with zeros between the layers."""
        return torch.block_diag(*(times * one.root() for times, one in zip(self._times, self.parts, strict=True)))

    def forget(self) -> None:
        """Drop all roots."""
        for one in self.parts:
            one.forget()

    def whitened(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Lᵀ D, float64."""
        parts = zip(self._times, self.parts, self._cut(error), strict=True)
        return torch.cat([times * one.whitened(rows) for times, one, rows in parts])

    def unwhitened(self, B: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"]:
        """L^-T B, float64."""
        parts = zip(self._times, self.parts, self._cut(B), strict=True)
        return torch.cat([one.unwhitened(rows) / times for times, one, rows in parts])

    def cost(self, error: Float[Tensor, "out in"], metric: Float[Tensor, "*in in"]) -> float:
        """tr(F D S Dᵀ), the sum over layers."""
        return sum(one.cost(rows, metric) for one, rows in zip(self.parts, self._cut(error), strict=True))

    def _cut(self, stacked: Float[Tensor, "out columns"]) -> tuple[Tensor, ...]:
        return stacked.split([one.out_features for one in self.parts])


class RelativeErrors:
    """Errors of stacked layers, each relative to its layer's output: rows divided by the root of E|W x|².

    signals: E|W x|² of the layers; 1 where there is no output. sizes: rows of each.
    """

    def __init__(self, signals: Sequence[float], sizes: Sequence[int]):
        roots = [one**0.5 or 1.0 for one in signals]
        self._scale = torch.tensor(roots, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))[:, None]

    def whitened(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The rows so divided, float64."""
        return error.double() / self._scale.to(error.device)

    def unwhitened(self, B: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"]:
        """The rows multiplied again, float64."""
        return B.double() * self._scale.to(B.device)


Rows = OutputStatistics | RelativeErrors  # what an error of the weight is measured in, on the side of the output


def solve_in_rows(
    method: str,
    residual: Float[Tensor, "out in"],
    statistics: InputStatistics,
    rank: int,
    rows: Rows | None = None,
    shrink: bool = False,
) -> tuple[LowRank, float]:
    """`solve`, or `solve_shrunk`, with what the rows are measured in; and the shrinkage that was chosen."""
    scaled = rows if isinstance(rows, RelativeErrors) else None
    error = scaled.whitened(residual).to(residual.dtype) if scaled else residual
    outputs = rows if isinstance(rows, OutputStatistics) else None
    if shrink:
        answer, amount = solve_shrunk(method, error, statistics, rank, outputs)
    else:
        answer, amount = solve(method, error, statistics, rank, outputs), 0.0
    if scaled:
        answer = replace(answer, B=scaled.unwhitened(answer.B).to(answer.B.dtype))
    return answer, amount


def solve_shared(
    method: str,
    residuals: Sequence[Float[Tensor, "_ in"]],
    statistics: InputStatistics,
    rank: int,
    signals: Sequence[float] | None = None,
    outputs: Sequence[OutputStatistics] | None = None,
) -> list[LowRank]:
    """Compensate the residuals R_i = W_i - W^_i of layers that share an input, with one A at the given rank.

    method:  a name in SOLVERS. statistics: of the input that they share.
    signals: E|W_i x|² that errors are relative to, for methods that look at inputs alone; None: 1 each, as GlowQ.
    outputs: of the gradients at each layer's output, for methods that need them.
    The answers share A and the spectrum, whose entries are what each rank removes of the sum.
    Raises EoraLabError as `solve`, and where these are not as many as there are layers.
    """
    stacked, sizes = torch.cat(list(residuals)), [len(one) for one in residuals]
    given = outputs if needs_outputs(method) else signals
    if given is not None and len(given) != len(sizes):
        raise EoraLabError(f"{len(sizes)} layers share an input, and {len(given)} signals or outputs are given")
    rows: Rows | None = RelativeErrors(signals, sizes) if signals else None
    if needs_outputs(method):
        rows = StackedOutputs(outputs) if outputs else None
    answer, _ = solve_in_rows(method, stacked, statistics, rank, rows)
    return [replace(answer, B=B.contiguous()) for B in answer.B.split(sizes)]
