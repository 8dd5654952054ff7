"""How sure a difference between two models is: the paired bootstrap over the questions that both answered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eora_lab.errors import EoraLabError

Scores = Sequence[float] | Float[np.ndarray, " n"]

RESAMPLES = 10_000
CHUNK = 4_000_000  # drawn indices held at once
TOGETHER = 256  # pairs that are drawn for at once


@dataclass(frozen=True)
class Interval:
    """A mean difference and where it lies with the given confidence."""

    difference: float
    low: float
    high: float
    n: int  # pairs
    confidence: float = 0.95

    @property
    def decided(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Outcomes:
    """Scores, and what each is of: a digest of the windows' tokens, or the questions."""

    of: object
    scores: Scores


def paired(a: Outcomes, b: Outcomes) -> Interval:
    """`paired_bootstrap` of b - a. Raises EoraLabError unless both are scores of the same windows or questions."""
    if a.of != b.of:
        raise EoraLabError(
            "no paired interval: the windows or questions are not the same (another tokenizer, text or number of them)"
        )
    return paired_bootstrap(a.scores, b.scores)


def paired_bootstrap(
    a: Scores, b: Scores, confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Percentile interval of mean(b - a) over resampled pairs (Efron and Tibshirani 1993, chapter 13).

    a, b: one score a question, in the same order: question difficulty cancels, which two standard errors ignore.
    Raises EoraLabError when the lengths differ, or with fewer than two pairs.
    """
    if len(a) != len(b) or len(a) < 2:
        raise EoraLabError(
            f"a paired interval needs two or more scores of the same questions, not {len(a)} and {len(b)}"
        )
    gaps = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)  # (n,)
    if not np.isfinite(gaps).all():
        raise EoraLabError("a paired interval needs finite scores")
    return _bootstrap(gaps[None], confidence, seed, resamples)[0]


def all_pairs(outcomes: Sequence[Outcomes]) -> dict[tuple[int, int], Interval]:
    """`paired` of every two that can be compared: (i, j) with i < j -> the interval of j - i. One draw serves all."""
    usable = [len(one.scores) > 1 and bool(np.isfinite(one.scores).all()) for one in outcomes]
    pairs: dict[int, list[tuple[int, int]]] = {}  # by the number of scores
    for j, other in enumerate(outcomes):
        for i, one in enumerate(outcomes[:j]):
            if usable[i] and usable[j] and len(one.scores) == len(other.scores) and one.of == other.of:
                pairs.setdefault(len(one.scores), []).append((i, j))
    found: dict[tuple[int, int], Interval] = {}
    for group in pairs.values():
        for start in range(0, len(group), TOGETHER):
            some = group[start : start + TOGETHER]
            gaps = np.array([np.subtract(outcomes[j].scores, outcomes[i].scores) for i, j in some], dtype=np.float64)
            found |= dict(zip(some, _bootstrap(gaps), strict=True))
    return found


def _bootstrap(
    gaps: Float[np.ndarray, "pairs n"], confidence: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """The interval of every row's mean. Sums of whole numbers are exact, so that a tie stays one."""
    rng, n = np.random.default_rng(seed), gaps.shape[1]
    rows = max(1, CHUNK // n)
    sums = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, n, (min(rows, resamples - start), n))
        places = drawn + n * np.arange(len(drawn))[:, None]
        counts = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)  # how often each was drawn
        sums.append(gaps @ counts.T.astype(np.float64))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(sums, axis=1) / n, [tail, 1 - tail], axis=1)
    return [
        Interval(float(mean), float(a), float(b), n, confidence)
        for mean, a, b in zip(gaps.mean(1), low, high, strict=True)
    ]
