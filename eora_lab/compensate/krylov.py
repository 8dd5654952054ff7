"""The top eigenvectors of R S Rᵀ from products alone, with a bound on what they miss.

A block Krylov space of X, M X, M² X, ... (M = R S Rᵀ, X random) holds the leading eigenvectors after a few steps; M is
never formed. Source of the method: Musco and Musco, arXiv 1504.05477. Source of the bound: the quadratic residual
bound for eigenvalues of a block-diagonalised matrix (Mathias 1998; Li and Li 2005).
"""

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLING = 32  # columns of a block beyond the rank
MAX_STEPS = 8
TOLERANCE = 2e-5  # of the loss that stays
PROBES = 16  # random columns that look for what the space missed


def worth_it(residual: Float[Tensor, "out in"], rank: int) -> bool:
    """Whether the layer is large enough beside the rank for a Krylov space to pay."""
    return min(residual.shape) >= max(1024, 6 * (rank + OVERSAMPLING))


def top_eigenvectors(
    R: Float[Tensor, "out in"], metric: Float[Tensor, "in in"] | Float[Tensor, " in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None:
    """U and the top `rank` eigenvalues of R M Rᵀ, in the dtype of R. None when the error bound stays too large.

    metric: (in, in), or (in,) for a diagonal.
    """
    generator = torch.Generator(R.device).manual_seed(0)  # the same input gives the same answer
    out_features = R.shape[0]

    def product(X: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
        Y = R.T @ X
        return R @ (metric @ Y if metric.ndim == 2 else metric[:, None] * Y)

    def random(columns: int) -> Float[Tensor, "out columns"]:
        return torch.randn(out_features, columns, dtype=R.dtype, device=R.device, generator=generator)

    block = random(rank + OVERSAMPLING)
    raw = product(block)
    trace = (block * raw).sum().item() / block.shape[1]  # Hutchinson's estimate; only the tolerance depends on it
    basis, images = torch.empty(out_features, 0, dtype=R.dtype, device=R.device), []
    block = raw  # one product ahead: the start is never part of the space
    for _ in range(MAX_STEPS):
        for _ in range(2):  # once is not enough in floating point
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], dim=1)  # (out, m)
        images.append(product(block))
        block = images[-1]
        if len(images) < 2:
            continue
        image = torch.cat(images, dim=1)
        projected = basis.T @ image
        values, vectors = torch.linalg.eigh((projected + projected.T).double() / 2)
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank].to(R.dtype)
        U = basis @ vectors
        missed = (image @ vectors - U * values.to(R.dtype)).norm(dim=0).double()  # residual norms
        left = max(trace - values.sum().item(), 0.0)
        # quadratic bound against what lies outside the whole space, whose largest eigenvalue the probes look for
        if missed.square().sum() / values[-1].clamp_min(1e-300) > TOLERANCE * left:  # cheap, and never above the bound
            continue
        outside = largest_outside(product, basis, random(PROBES))
        gap = values - 1.2 * outside
        if gap[-1] > 0 and (missed.square() / gap).sum() <= TOLERANCE * left:
            return U, values
    return None


def largest_outside(product, basis: Float[Tensor, "out m"], probes: Float[Tensor, "out columns"]) -> float:
    """The largest eigenvalue of M on the complement of a space, from below, by a few steps of subspace iteration."""
    for _ in range(4):
        for _ in range(2):
            probes = probes - basis @ (basis.T @ probes)
        probes = torch.linalg.qr(probes).Q
        image = product(probes)
        largest = torch.linalg.eigvalsh((probes.T @ image).double()).max().item()
        probes = image
    return largest
