"""Round a weight again onto the grid that its compressed form has, so that the output suffers less.

min over codes of tr((W - W^) S (W - W^)ᵀ), scales and origins as they are. One column after the other gets the levels
that are best while all others stay (cyclic coordinate descent, as QuantEase, Behdin et al., arXiv 2309.01885), from the
better of the codes that are there and GPTQ's on the same grid. No step raises the loss of a row, so none ends above the
base.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress.feedback import column_sweep, inverse_factor
from eora_lab.compress.storage import Compressed, Lattice
from eora_lab.errors import EoraLabError

SWEEPS = 10  # over all columns, at most
SETTLED = 1e-3  # share of the codes; a sweep that changes fewer is the last
BLOCK = 32  # columns between two updates of all the rest; a matter of speed only
DAMP_PERCENT = 0.01  # as in GPTQ


@torch.no_grad()
def reround(weight: Float[Tensor, "out in"], statistics: InputStatistics, base: Compressed) -> Compressed:
    """W on the grid of `base`, at no more loss in any row.

    weight: what is to be met: the original, or what a low-rank path leaves of it.
    Raises EoraLabError for storage whose levels are not evenly spaced.
    """
    if (lattice := base.lattice()) is None:
        raise EoraLabError(f"a weight stored as {base.kind} cannot be rounded again: its levels are not evenly spaced")
    S, target = statistics.second_moment, weight.float()
    grid, before = _Columns(lattice, target), base.dense()
    swept = grid.swept(S).T
    better = row_losses(target - swept, S) < row_losses(target - before, S)
    found = _descend(grid, torch.where(better[:, None], swept, before).T.contiguous(), S)
    made = base.with_codes(grid.codes(found))
    best = row_losses(target - made.dense(), S) <= row_losses(target - before, S)  # as they are stored
    return made if best.all() else base.with_codes(grid.codes(torch.where(best, found, before.T)))


def row_losses(error: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """E|e x|² of every row."""
    return ((error @ second_moment) * error).sum(1)


class _Columns:
    """The grid as columns see it: everything transposed, so that a column of W is a contiguous row."""

    def __init__(self, lattice: Lattice, target: Float[Tensor, "out in"]):
        self.origin, self.step = lattice.origin.T.contiguous(), lattice.step.T.contiguous()  # (groups, out)
        self.group, self.top = lattice.group.tolist(), lattice.top
        self.kept = None if lattice.kept is None else lattice.kept.T.contiguous()
        self.target = target.T.contiguous()

    def nearest(self, i: int, wanted: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """Of column i: the levels next to what is wanted."""
        origin, step = self.origin[self.group[i]], self.step[self.group[i]]
        code = ((wanted - origin) / step).nan_to_num_().round_().clamp_(0, self.top)  # NaN: all levels are one
        value = origin + step * code
        return value if self.kept is None else value * self.kept[i]

    def codes(self, values: Float[Tensor, "in out"]) -> UInt8[Tensor, "out in"]:
        """Of values on the grid."""
        group = torch.tensor(self.group, device=values.device)
        codes = ((values - self.origin[group]) / self.step[group]).nan_to_num_().round_().clamp_(0, self.top)
        codes = codes if self.kept is None else codes * self.kept
        return codes.to(torch.uint8).T.contiguous()

    def swept(self, S: Float[Tensor, "in in"]) -> Float[Tensor, "in out"]:
        """By GPTQ, the columns with the largest inputs first."""
        order = S.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(S, DAMP_PERCENT, order)
        columns, place = self.target[order].clone(), order.tolist()
        column_sweep(columns, factor, lambda i: self.nearest(place[i], columns[i]))
        found = torch.empty_like(columns)
        found[order] = columns
        return found


def _descend(grid: _Columns, values: Float[Tensor, "in out"], S: Float[Tensor, "in in"]) -> Float[Tensor, "in out"]:
    """Coordinate descent from `values`, on the grid all the way."""
    values, diagonal = values.clone(), S.diagonal().tolist()
    for _ in range(SWEEPS):
        pull = S @ (grid.target - values)  # (in, out): half of the gradient's negative
        changed = 0
        for start in range(0, len(values), BLOCK):
            stop = min(start + BLOCK, len(values))
            before = values[start:stop].clone()
            for i in range(start, stop):
                if diagonal[i] <= 0:
                    continue
                new = grid.nearest(i, values[i] + pull[i] / diagonal[i])
                step = new - values[i]
                values[i] = new
                pull[i + 1 : stop].addr_(S[i + 1 : stop, i], step, alpha=-1)
            moved = values[start:stop] - before
            changed += int(moved.count_nonzero())
            pull[stop:].addmm_(S[stop:, start:stop], moved, alpha=-1)
        if changed <= SETTLED * values.numel():
            break
    return values
