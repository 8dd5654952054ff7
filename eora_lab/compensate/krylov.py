"""The top eigenvectors of R S Rᵀ from products alone, with a bound on what they miss.

A block Krylov space of X, M X, M² X, ... (M = R S Rᵀ, X random) holds the leading eigenvectors after a few steps; M is
never formed. Source of the method: Musco and Musco, arXiv 1504.05477. Source of the bound: the quadratic residual
bound for eigenvalues of a block-diagonalised matrix (Mathias 1998; Li and Li 2005).
"""

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLING = 32  # columns of a block beyond the rank
MIN_STEPS, MAX_STEPS = 5, 8
TOLERANCE = 5e-5  # of the loss that stays; what is really lost is far below the bound
PROBES = 16  # random columns that look for what the space missed


def worth_it(residual: Float[Tensor, "out in"], rank: int) -> bool:
    """Whether the layer is large enough beside the rank for a Krylov space to pay."""
    return min(residual.shape) >= max(1024, MAX_STEPS * (rank + OVERSAMPLING))  # room for every block


def top_eigenvectors(
    R: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | Float[Tensor, " in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None:
    """U and the top `rank` eigenvalues of R M Rᵀ, in the dtype of R. None when the error bound stays too large.

    metric: (in, in), or (in,) for a diagonal.
    """
    generator = torch.Generator(R.device).manual_seed(0)  # the same input gives the same answer

    def through_metric(Y: Float[Tensor, "in columns"]) -> Float[Tensor, "out columns"]:
        return R @ (metric @ Y if metric.ndim == 2 else metric[:, None] * Y)

    def product(X: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        return through_metric(R.T @ X)

    def random(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        return torch.randn(rows, columns, dtype=R.dtype, device=R.device, generator=generator)

    basis, images = R.new_empty(R.shape[0], 0), []
    block = through_metric(random(R.shape[1], rank + OVERSAMPLING))
    for step in range(1, MAX_STEPS + 1):
        for _ in range(2):  # once is not enough in floating point
            block = torch.linalg.qr(outside(basis, block)).Q
        basis = torch.cat([basis, block], dim=1)  # (out, m)
        block = product(block)
        images.append(block)
        if step < MIN_STEPS:
            continue
        image = torch.cat(images, dim=1)
        projected = (basis.T @ image).double()
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        top, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank].to(R.dtype)
        U = basis @ vectors
        missed = (image @ vectors - U * top.to(R.dtype)).double().square().sum(0)  # squared residual norms
        rest, largest = what_is_outside(product, basis, random(R.shape[0], PROBES))
        left = rest + (values.sum() - top.sum()).clamp_min(0)
        gap = top - 1.2 * largest  # the probes see the largest eigenvalue outside from below
        if gap[-1] > 0 and (missed / gap).sum() <= TOLERANCE * left:
            return U, top
    return None


def outside(basis: Float[Tensor, "out m"], X: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
    """The part of X that is orthogonal to the basis."""
    return X - basis @ (basis.T @ X)


def what_is_outside(
    product, basis: Float[Tensor, "out m"], probes: Float[Tensor, "out columns"]
) -> tuple[float, float]:
    """Trace and largest eigenvalue of M on the complement of the basis, estimated from random columns.

    The trace is Hutchinson's estimate, which has little noise once the leading directions are taken out (Meyer et al.,
    Hutch++, arXiv 2010.09649); the largest eigenvalue is from below, by two steps of subspace iteration.
    """
    probes = outside(basis, outside(basis, probes))
    image = product(probes)
    trace = (probes * image).sum().item() / probes.shape[1]
    for _ in range(2):
        probes = torch.linalg.qr(outside(basis, image)).Q
        probes = outside(basis, probes)
        image = product(probes)
    return trace, torch.linalg.eigvalsh((probes.T @ image).double()).max().item()
