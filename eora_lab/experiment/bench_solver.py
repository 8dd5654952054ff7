"""Time `eora` beside the reference algorithm, on layers of real sizes, and judge both losses in float64."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate import LowRank, solve
from eora_lab.compress import rtn
from eora_lab.errors import EoraLabError


@dataclass(frozen=True)
class Timing:
    """One layer shape: seconds and losses tr((R - B A) S (R - B A)ᵀ), judged in float64."""

    shape: str
    seconds: float
    reference_seconds: float
    loss: float
    reference_loss: float
    total: float  # loss of rank 0


def reference(R: Float[Tensor, "out in"], S: Float[Tensor, "in in"], rank: int) -> LowRank:
    """EoRA as its carriers ship it: float64 eigh of S, project, full float32 SVD, project back."""
    values, Q = torch.linalg.eigh(S.double())
    scale = values.clamp_min(1e-12 * values.max()).sqrt()
    projected = (R.double() @ (Q * scale)).float()
    U, sigma, Vt = torch.linalg.svd(projected, full_matrices=False)
    A = (Vt[:rank].double() / scale @ Q.T).float()
    return LowRank(A=A, B=U[:, :rank] * sigma[:rank], spectrum=sigma.double().square())


def layer(out_features: int, in_features: int, seed: int) -> tuple[Float[Tensor, "out in"], InputStatistics]:
    """A residual of 4-bit rounding, and statistics like a language model's.

    Inputs mix latent features whose variance falls as a power law, a few channels are 20 times larger, and there are
    half as many tokens as channels, so S is singular.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    W = normal(out_features, in_features)
    R = W - rtn(W, None, bits=4, group_size=128).dense()
    latents = min(in_features // 2, 2048)
    scale = torch.arange(1, latents + 1).float().rsqrt()
    gain = torch.ones(in_features)
    gain[torch.randperm(in_features, generator=generator)[: max(in_features // 500, 2)]] = 20
    mix = normal(latents, in_features)
    statistics = InputStatistics(in_features)
    for _ in range(8):
        tokens = in_features // 16
        x = normal(tokens, latents) * scale @ mix + 0.3 * normal(tokens, in_features)
        statistics.update(x * gain)
    return R, statistics


def loss(R: Float[Tensor, "out in"], S: Float[Tensor, "in in"], answer: LowRank | None = None) -> float:
    """tr((R - B A) S (R - B A)ᵀ) in float64, a slice of rows at a time."""
    total = 0.0
    S = S.double()
    for rows in torch.arange(len(R)).split(1024):
        left = R[rows].double()
        if answer is not None:
            left = left - answer.B[rows].double() @ answer.A.double()
        total += (left @ S * left).sum().item()
    return total


@torch.no_grad()
def bench(shapes: tuple[str, ...], rank: int = 128, seed: int = 0, repeats: int = 3) -> Iterator[Timing]:
    """Time both on shapes "OUTxIN": ours the median of several runs, the reference once, as it takes minutes.

    Raises EoraLabError for a shape that is none.
    """
    for shape in shapes:
        if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", shape):
            raise EoraLabError(f"{shape!r} is no shape of a layer: write OUTxIN, such as 4096x4096")
    for shape in shapes:
        out_features, in_features = map(int, shape.split("x"))
        R, statistics = layer(out_features, in_features, seed)
        S = statistics.second_moment
        seconds = []
        for _ in range(repeats):
            statistics.update(torch.zeros(0, in_features))  # no factorisation is kept between runs
            start = time.perf_counter()
            ours = solve("eora", R, statistics, rank)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = reference(R, S, rank)
        reference_seconds = time.perf_counter() - start
        median = sorted(seconds)[repeats // 2]
        yield Timing(shape, median, reference_seconds, loss(R, S, ours), loss(R, S, theirs), loss(R, S))
