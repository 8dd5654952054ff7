"""How sure a difference between two models is: the paired bootstrap over the questions that both answered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eora_lab.errors import EoraLabError

Scores = Sequence[float] | Float[np.ndarray, " n"]

RESAMPLES = 10_000
CHUNK = 4_000_000  # drawn indices held at once


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
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(gaps))
    means = [
        gaps[rng.integers(0, len(gaps), (min(rows, resamples - start), len(gaps)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(gaps.mean()), float(low), float(high), len(gaps), confidence)
