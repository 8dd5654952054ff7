"""The top eigenvectors of R S Rᵀ from products alone, with a bound on what they miss.

A block Krylov space of X, M X, M² X, ... (M = R S Rᵀ, X random) holds the leading eigenvectors after a few steps; M is
never formed. Blocks are narrower than the rank: for as many products the space then holds higher powers of M.
Source of the method: Musco and Musco, arXiv 1504.05477; of narrow blocks: Meyer, Musco and Musco, arXiv 2305.02535; of
the bound: the quadratic residual bound for eigenvalues of a block-diagonalised matrix (Mathias 1998; Li and Li 2005).
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 48  # columns; narrower ones make matrix products slow
PANEL = 1024  # rows of a metric that are float64 at once
TOLERANCE = 5e-5  # of the loss that stays; what is really lost is far below the bound


def dimensions(rank: int) -> tuple[int, ...]:
    """Sizes of the space at which its bound is looked at: from 4.5 times the rank, and 10 blocks, to twice that."""
    steps = max(10, -(-9 * rank // (2 * BLOCK)))
    return steps * BLOCK, (steps + steps // 2) * BLOCK, 2 * steps * BLOCK


def worth_it(residual: Float[Tensor, "out in"], rank: int) -> bool:
    """Whether the layer is large enough beside the rank for a Krylov space to pay."""
    return min(residual.shape) >= max(1024, dimensions(rank)[-1])


def top_eigenvectors(
    R: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | Float[Tensor, " in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None:
    """U and the top `rank` eigenvalues of R M Rᵀ, in the dtype of R. None when the error bound stays too large.

    metric: (in, in), or (in,) for a diagonal. Where it has a few huge eigenvalues, as those of massive activations,
    what matters of the rest can be lost in rounding: then once more in float64.
    """
    found, rounding = _search(R, metric, rank)
    if found is None and rounding and R.dtype != torch.float64:
        found, _ = _search(R.double(), metric, rank)
    return None if found is None else (found[0].to(R.dtype), found[1])


def _search(
    R: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | Float[Tensor, " in"], rank: int
) -> tuple[tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None, bool]:
    """`top_eigenvectors` with all products in the dtype of R; and whether its rounding keeps the bound large."""
    generator = torch.Generator(R.device).manual_seed(0)  # the same input gives the same answer

    def through_metric(Y: Float[Tensor, "in columns"]) -> Float[Tensor, "out columns"]:
        if metric.ndim == 1:
            return R @ (metric[:, None] * Y)
        if metric.dtype == Y.dtype:
            return R @ (metric @ Y)
        panels = metric.split(PANEL)  # no copy of all of it
        return R @ torch.cat([panel.to(Y.dtype) @ Y for panel in panels])

    def product(X: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        return through_metric(R.T @ X)

    def random(rows: int) -> Float[Tensor, "rows columns"]:
        return torch.randn(rows, BLOCK, dtype=R.dtype, device=R.device, generator=generator)

    looks, rounding = dimensions(rank), False
    spaces = R.new_empty(2, looks[-1], len(R)).mT  # the basis and its image under M, column by column
    block = through_metric(random(R.shape[1]))
    for size in range(BLOCK, looks[-1] + 1, BLOCK):
        basis, image = spaces[:, :, :size]  # (out, size) each
        for _ in range(2):  # once is not enough in floating point
            block = torch.linalg.qr(outside(basis[:, :-BLOCK], block)).Q
        basis[:, -BLOCK:] = block
        image[:, -BLOCK:] = block = product(block)
        if size not in looks:
            continue
        projected = (basis.T @ image).double()
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        top, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank].to(R.dtype)
        U = basis @ vectors
        missed = (image @ vectors - U * top.to(R.dtype)).double().square().sum(0)  # squared residual norms
        rest, largest = what_is_outside(product, basis, random(len(R)))
        left = rest + (values.sum() - top.sum()).clamp_min(0)
        gap = top - 1.5 * largest  # the probes see the largest eigenvalue outside from below
        if gap[-1] > 0 and (missed / gap).sum() <= TOLERANCE * left:
            return (U, top), False
        rounding = bool(missed.mean().sqrt() <= 8 * torch.finfo(R.dtype).eps * top[0])
        if rounding:  # more dimensions would not help
            break
    return None, rounding


def outside(basis: Float[Tensor, "out m"], X: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
    """The part of X that is orthogonal to the basis."""
    return X - basis @ (basis.T @ X)


def what_is_outside(
    product, basis: Float[Tensor, "out m"], probes: Float[Tensor, "out columns"]
) -> tuple[float, float]:
    """Trace and largest eigenvalue of M on the complement of the basis, estimated from random columns.

    The trace is Hutchinson's estimate, which has little noise once the leading directions are taken out (Meyer et al.,
    Hutch++, arXiv 2010.09649); the largest eigenvalue is from below, by a step of subspace iteration.
    """
    probes = outside(basis, outside(basis, probes))
    image = product(probes)
    trace = (probes * image).sum().item() / probes.shape[1]
    probes = outside(basis, torch.linalg.qr(outside(basis, image)).Q)
    return trace, torch.linalg.eigvalsh((probes.T @ product(probes)).double()).max().item()
