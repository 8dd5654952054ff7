"""Optimal brain surgeon in one sweep: compress column by column, each column's error moved to those still open.

The common part of GPTQ (Frantar et al., arXiv 2210.17323) and SparseGPT (Frantar and Alistarh, arXiv 2301.00774).
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eora_lab.errors import EoraLabError

BLOCK = 32  # columns between two updates of all the rest; a matter of speed only
SMALL = 64  # half of the columns of a triangle that is inverted as a whole; the same


def column_sweep(
    columns: Float[Tensor, "in out"],
    factor: Float[Tensor, "in in"],
    compress: Callable[[int], Float[Tensor, " out"]],
    *looks_ahead: int,
) -> None:
    """Replace every column of W by its compressed form, in order, and adjust the columns after it in place.

    columns:     Wᵀ, so that a column of W is a contiguous row.
    factor:      from `inverse_factor`, its columns in the same order.
    compress:    column number -> the compressed column. It reads `columns`.
    looks_ahead: periods; at their multiples, all later columns are up to date when `compress` is called.
    """
    in_features = len(columns)
    steps = factor / factor.diagonal()[:, None]
    starts = sorted({start for period in (BLOCK, *looks_ahead) for start in range(0, in_features, period)})
    errors = torch.empty_like(columns)
    rows, error_rows = columns.unbind(), errors.unbind()
    for start, stop in zip(starts, [*starts[1:], in_features], strict=True):
        for i in range(start, stop):
            compressed = compress(i)
            torch.sub(rows[i], compressed, out=error_rows[i])
            rows[i].copy_(compressed)
            columns[i + 1 : stop].addr_(steps[i, i + 1 : stop], error_rows[i], alpha=-1)
        columns[stop:].addmm_(steps[start:stop, stop:].T, errors[start:stop], alpha=-1)


class _Kept(NamedTuple):
    """A factor, and what it was made of."""

    of: weakref.ref  # S; the factor goes when S does
    state: tuple  # how often S was changed in place; damping
    order: Int[Tensor, " in"] | None
    factor: Float[Tensor, "in in"]


_last: list[_Kept] = []  # the one made last: q, k and v, gate and up, and rounds ask for the same one in turn


def inverse_factor(
    second_moment: Float[Tensor, "in in"], damp_percent: float, order: Int[Tensor, " in"] | None = None
) -> Float[Tensor, "in in"]:
    """`factor_of` S with its channels in that order, made once for layers that ask for it one after the other."""
    state = (None if second_moment.is_inference() else second_moment._version, damp_percent)
    for kept in _last:
        same = order is kept.order if order is None or kept.order is None else torch.equal(order, kept.order)
        if kept.of() is second_moment and kept.state == state and same and state[0] is not None:
            return kept.factor
    ordered = second_moment if order is None else second_moment[order][:, order]
    factor = factor_of(ordered, damp_percent)
    _last[:] = [_Kept(weakref.ref(second_moment, lambda _: _last.clear()), state, order, factor)]
    return factor


def factor_of(second_moment: Float[Tensor, "in in"], damp_percent: float) -> Float[Tensor, "in in"]:
    """The upper Cholesky factor U of H^-1, H = S with a damped diagonal (step 3 of GPTQ; the factor 2 cancels).

    Row i over U_ii is what a unit error in column i moves into each later column while the columns before it stay
    fixed, and e² / U_ii² is what an error e in column i costs once the later columns have made up for it. With
    H = V Vᵀ and V upper triangular, U = V^-1, so H itself is never inverted. damp_percent: share of S's mean diagonal
    that is added to the diagonal; it grows by 0.01 until the factorisation succeeds. Raises EoraLabError when it
    never does.
    """
    hessian = second_moment.double().flip(0, 1)  # the Cholesky factor of the reversed matrix, reversed, is V
    diagonal = hessian.diagonal()
    dead = (diagonal == 0).double()
    for step in range(100):
        damped = hessian + torch.diag((damp_percent + 0.01 * step) * diagonal.mean() + dead)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            return inverse_of(lower.flip(0, 1)).float()
    raise EoraLabError("the second moment is too far from positive semi-definite for GPTQ and SparseGPT")


def inverse_of(V: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The inverse of an upper triangular matrix by halves: [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]].

    Two thirds of the work of solving for the identity, nearly all of it in products, and as exact (Higham, Accuracy and
    Stability of Numerical Algorithms, chapter 14).
    """
    half = len(V) // 2
    if half < SMALL:
        return torch.linalg.solve_triangular(V, torch.eye(len(V), dtype=V.dtype, device=V.device), upper=True)
    found, A, C = torch.zeros_like(V), inverse_of(V[:half, :half]), inverse_of(V[half:, half:])
    found[:half, :half], found[half:, half:] = A, C
    found[:half, half:] = -(A @ V[:half, half:] @ C)
    return found
