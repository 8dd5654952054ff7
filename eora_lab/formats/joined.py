"""Weights of a file put together: a linear of the model may be several of the file, as gate and up of an expert are."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from eora_lab.compress import Compressed, DenseWeight

Making = tuple[Callable[[], Compressed], slice]  # makes W^ of a part, and the rows of the whole that it has


def joined(parts: Sequence[Making]) -> Compressed:
    """One W^ of several; in full, where they do not share what belongs to no row, such as a tensor's scale."""
    made = [(make(), rows) for make, rows in parts]
    first, rows = made[0]
    if len(made) == 1 and rows == slice(None):
        return first
    states = [(one.state_dict(), rows) for one, rows in made]
    ours = states[0][0]
    if all(type(one) is type(first) for one, _ in made) and all(_fit(ours, state, first.whole) for state, _ in states):
        return first.from_state_dict(
            {key: one if key in first.whole else _rows([(s[key], r) for s, r in states]) for key, one in ours.items()}
        )
    return DenseWeight(_rows([(one.dense(), rows) for one, rows in made]))


def _fit(ours: dict[str, Tensor], theirs: dict[str, Tensor], whole: Sequence[str]) -> bool:
    """Whether rows of these can lie in the same tensors."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(one, theirs[key])
        if key in whole
        else (one.dtype, one.shape[1:]) == (theirs[key].dtype, theirs[key].shape[1:])
        for key, one in ours.items()
    )


def _rows(parts: list[tuple[Shaped[Tensor, "_rows _columns"], slice]]) -> Shaped[Tensor, "_out _columns"]:
    """A matrix of some, each with the rows that it has."""
    whole = parts[0][0].new_empty(sum(len(part) for part, _ in parts), parts[0][0].shape[1])
    for part, rows in parts:
        whole[rows] = part
    return whole
