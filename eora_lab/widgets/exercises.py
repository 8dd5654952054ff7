"""Exercises of the notebooks: is an answer right?

What is right is computed from what the notebook holds, so that no answer stands beside its question, and another model
or another setting has other answers. Where many answers are right, their property is checked.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import solve
from eora_lab.errors import unknown

if TYPE_CHECKING:
    import pandas

SLACK = 1e-6  # of an optimum, relative


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `check` says. right: None where nothing was answered."""

    exercise: str
    right: bool | None
    hint: str = ""

    def __repr__(self) -> str:
        if self.right is None:
            return f"{self.exercise}: not answered yet"
        return f"{self.exercise}: {'right' if self.right else f'not yet: {self.hint}'}"


def check(exercise: str, answer: object, **seen: Any) -> Verdict:
    """Whether an answer to an exercise (a name of `EXERCISES`) is right.

    answer: None where there is none yet. seen: what the notebook holds, as the exercise names it.
    Raises EoraLabError for an unknown exercise.
    """
    if exercise not in EXERCISES:
        raise unknown("exercise", exercise, sorted(EXERCISES))
    if answer is None:
        return Verdict(exercise, None)
    hint = EXERCISES[exercise](answer, **seen)
    return Verdict(exercise, not hint, hint)


def near(answer: object, truth: int | float, tolerance: int | float) -> str:
    """A hint where a number is further from the truth than the tolerance; else nothing."""
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        return f"a number is asked for, not {type(answer).__name__}"
    if abs(answer - truth) <= tolerance:
        return ""
    return "too high" if answer > truth else "too low"


# --- 00 ------------------------------------------------------------------------------------------------------------


def even_guesses(answer: object, *, model: nn.Module) -> str:
    """The perplexity of a model that finds every token of its vocabulary equally likely."""
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return near(answer, words, 0.5)


def given_back(answer: object, *, values: Mapping[str, float]) -> str:
    """Which share of the nats a token that compression lost came back. values: state -> perplexity."""
    original, broken, mended = (math.log(values[name]) for name in ("original", "compressed", "compressed + EoRA"))
    return near(answer, (broken - mended) / (broken - original), 0.01)


def bits_of_a_path(answer: object, *, shape: tuple[int, int], rank: int) -> str:
    """Bits a weight that a path in 16 bits adds to a layer. shape: (out, in)."""
    out_features, in_features = shape
    factors = torch.empty(rank, in_features, dtype=torch.float16), torch.empty(out_features, rank, dtype=torch.float16)
    truth = 8 * sum(one.nbytes for one in factors) / (out_features * in_features)
    return near(answer, truth, 0.01 * truth)


# --- 02 ------------------------------------------------------------------------------------------------------------


def loud_directions(answer: object, *, second_moment: Float[Tensor, "in in"], share: float) -> str:
    """How many directions hold this share of the input energy. second_moment: (in, in)."""
    values = torch.linalg.eigvalsh(second_moment.double()).flip(0).clamp_min(0)
    return near(answer, int((values.cumsum(0) < share * values.sum()).sum()) + 1, 0)


def best_path(
    answer: object, *, residual: Float[Tensor, "out in"], second_moment: Float[Tensor, "in in"], rank: int
) -> str:
    """(A, B), (rank, in) and (out, rank), that leave the least output error. residual: (out, in)."""
    R, S = residual.double(), second_moment.double()
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(one, Tensor) for one in answer)):
        return "two tensors are asked for, (A, B)"
    A, B = (one.double() for one in answer)
    if A.shape != (rank, R.shape[1]) or B.shape != (R.shape[0], rank):
        wanted = f"A {(rank, R.shape[1])} and B {(R.shape[0], rank)}"
        return f"{wanted} are asked for, not {tuple(A.shape)} and {tuple(B.shape)}"
    least = torch.linalg.eigvalsh(R @ S @ R.T)[:-rank].clamp_min(0).sum().item()
    left = output_energy(R - B @ A, S)
    if left <= least * (1 + SLACK) + SLACK * output_energy(R, S):
        return ""
    return f"it leaves {left / least:.3f} times the least output error that this rank can leave"


def blind_inputs(answer: object, *, residual: Float[Tensor, "out in"], rank: int) -> str:
    """A second moment (in, in), not zero, for which SVD leaves no more output error than EoRA. residual: (out, in)."""
    if not isinstance(answer, Tensor) or answer.shape != (residual.shape[1],) * 2:
        return f"a tensor of {(residual.shape[1],) * 2} is asked for"
    S = answer.double()
    if not torch.allclose(S, S.T) or torch.linalg.eigvalsh(S).min() < -SLACK * S.abs().max() or not S.any():
        return "it is no second moment of inputs: symmetric, no eigenvalue below 0, not all 0"
    statistics = InputStatistics.from_second_moment(S)
    svd, eora = (
        output_energy(residual.double() - solve(name, residual.double(), statistics, rank).dense(), S)
        for name in ("svd", "eora")
    )
    return "" if svd <= eora * (1 + SLACK) else f"SVD leaves {svd / eora:.3f} times what EoRA leaves"


# --- 03 ------------------------------------------------------------------------------------------------------------


def rank_as_good(answer: object, *, curves: "pandas.DataFrame", metric: str) -> str:
    """The lowest of EoRA's ranks in a sweep that is as good as SVD's highest. curves: the rows of its cells."""
    rows = {method: curves[curves["method"] == method].sort_values("rank") for method in ("svd", "eora")}
    if rows["svd"].empty or rows["eora"].empty:
        return "the sweep has no rows of svd and eora: add them to methods"
    reached = rows["eora"][rows["eora"][metric] <= rows["svd"][metric].iloc[-1]]
    return near(answer, float(reached["rank"].min()), 0) if len(reached) else "no rank of the sweep is: add ranks"


def enough_sequences(answer: object, *, channels: int, seqlen: int) -> str:
    """The fewest sequences from which a second moment can be of full rank."""
    return near(answer, -(-channels // seqlen), 0)


def most_noise(answer: object, *, gap: "pandas.DataFrame") -> str:
    """(nsamples, rank) that has learnt most noise. gap: rows by (nsamples, tokens), a column a rank, per cent."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        return "a pair is asked for, (nsamples, rank)"
    (nsamples, *_, rank) = gap.stack().idxmax()
    return "" if answer == (nsamples, rank) else "another pair has a larger gap"


EXERCISES: dict[str, Callable[..., str]] = {
    "even guesses": even_guesses,
    "given back": given_back,
    "bits of a path": bits_of_a_path,
    "loud directions": loud_directions,
    "best path": best_path,
    "blind inputs": blind_inputs,
    "rank as good": rank_as_good,
    "enough sequences": enough_sequences,
    "most noise": most_noise,
}
