"""Fused experts in adapters: what other tools call a linear of an expert that a model keeps with those of all others.

Here it is `...experts.3.gate_up_proj`. Checkpoints as they were published have, for most families, the experts one by
one and gate and up apart (`...experts.3.gate_proj`, Mixtral's `...experts.3.w1`), and so have the adapters that vLLM
and llama.cpp's converter take. The names follow from how transformers writes the model's checkpoint.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eora_lab.formats.names import Factors, match_names
from eora_lab.model.experts import Experts, Leaf, mixtures

Shapes = dict[str, tuple[int, int]]  # module name -> (out_features, in_features)
Part = tuple[str, slice]  # name of a linear, and which output features of the expert's linear it has


@dataclass(frozen=True)
class Fused:
    """A tensor that holds one linear of every expert.

    module:    that holds it; the linear of expert 3 is `{module}.3.{leaf}`.
    leaf:      name of the linear within an expert.
    parameter: name of the tensor in `module` as peft finds it; "" where experts lie below one another, which it cannot
               wrap.
    beyond:    rows of the tensor after those of the experts, which belong to none.
    flipped:   peft takes inputs for outputs: (experts, in, out), and the module does not say so (`is_transposed`).
    parts:     of every expert, the linears that its own is made of where experts are written one by one.
    """

    module: str
    leaf: str
    parameter: str
    beyond: int
    flipped: bool
    parts: tuple[tuple[Part, ...], ...]

    def names(self) -> list[str]:
        """Of the linears, one an expert."""
        return [f"{self.module}.{index}.{self.leaf}" for index in range(len(self.parts))]


def fused_linears(model: nn.Module) -> list[Fused]:
    """Those of a model whose experts are unfolded, compressed or not, in the order in which modules define them."""
    found = mixtures(model)
    published = _published(model, found)
    return [
        Fused(
            name,
            leaf.name,
            "" if leaf.matrix else leaf.weight,
            experts.beyond(leaf),
            leaf.transposed and not getattr(experts.fused, "is_transposed", False),
            tuple(
                published.get(f"{name}.{index}.{leaf.name}") or _apart(f"{name}.{index}", experts, leaf)
                for index in range(experts.count)
            ),
        )
        for name, experts in found.items()
        for leaf in experts.leaves
    ]


def one_by_one(factors: Factors, fused: Sequence[Fused]) -> Factors:
    """The same by the names that checkpoints have: gate and up share A and have their rows of B."""
    parts = {name: parts for each in fused for name, parts in zip(each.names(), each.parts, strict=True)}
    apart: Factors = {}
    for module, (A, B) in factors.items():
        apart |= {name: (A, B[rows]) for name, rows in parts.get(module, ((module, slice(None)),))}
    return apart


def apart_shapes(shapes: Shapes, fused: Sequence[Fused]) -> Shapes:
    """The same by the names that checkpoints have."""
    found: Shapes = {}
    parts = {name: parts for each in fused for name, parts in zip(each.names(), each.parts, strict=True)}
    for module, (out_features, in_features) in shapes.items():
        for name, rows in parts.get(module, ((module, slice(None)),)):
            found[name] = len(range(*rows.indices(out_features))), in_features
    return found


def whole(factors: Factors, fused: Sequence[Fused]) -> Factors:
    """The inverse: the names of this package. Parts that do not share A come together at the sum of their ranks."""
    parts = {name: parts for each in fused for name, parts in zip(each.names(), each.parts, strict=True)}
    owner = {part: name for name, several in parts.items() for part, _ in several}
    spelt = match_names(factors, owner.keys() | parts.keys())
    given = {spelt.get(module, module): pair for module, pair in factors.items()}
    joined: Factors = {}
    for module, pair in given.items():
        if module in parts or module not in owner:
            joined[module] = pair
        elif (name := owner[module]) not in joined:
            joined[name] = _join([(rows, given[part]) for part, rows in parts[name] if part in given], parts[name])
    return joined


def _join(given: list[tuple[slice, tuple[Tensor, Tensor]]], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """One pair of several that have rows of its B. Rows of a part that is not given are zero."""
    out_features = len(given[0][1][1]) * len(parts)
    first = given[0][1][0]
    shared = all(A.shape == first.shape and torch.equal(A, first) for _, (A, _) in given)
    rank = len(first) if shared else sum(len(A) for _, (A, _) in given)
    joined, start = given[0][1][1].new_zeros(out_features, rank), 0
    for rows, (A, B) in given:
        joined[rows, start : start + len(A)] = B
        start += 0 if shared else len(A)
    return first if shared else torch.cat([A for _, (A, _) in given]), joined


def _apart(prefix: str, experts: Experts, leaf: Leaf) -> tuple[Part, ...]:
    """Names in the manner of most families, where the published checkpoint is fused too."""
    if leaf.name != "gate_up_proj":
        return ((f"{prefix}.{leaf.name}", slice(None)),)
    if getattr(experts.fused, "is_concatenated", True):
        middle = _out_features(experts, leaf) // 2
        rows = slice(0, middle), slice(middle, 2 * middle)
    else:
        rows = slice(0, None, 2), slice(1, None, 2)
    return (f"{prefix}.gate_proj", rows[0]), (f"{prefix}.up_proj", rows[1])


def _out_features(experts: Experts, leaf: Leaf) -> int:
    return int(experts.linears(0)[leaf.name].out_features)  # type: ignore[arg-type]


def _published(model: nn.Module, found: dict[str, Experts]) -> dict[str, tuple[Part, ...]]:
    """Linear of an expert -> linears of the checkpoint that transformers would write, where those are of one expert.

    It is shown tensors of one input feature, whose values count the output features of all experts.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not found or not isinstance(model, PreTrainedModel):
        return {}
    state: dict[str, Tensor] = {}
    first, names = [0], []  # value of each linear's first output feature, and its name
    for name, experts in found.items():
        for leaf in experts.leaves:
            out_features = _out_features(experts, leaf)
            values = torch.arange(first[-1], first[-1] + experts.count * out_features, dtype=torch.int32)
            state[f"{name}.{leaf.weight}"] = leaf.fuse(list(values.view(experts.count, -1, 1)))
            names += [f"{name}.{index}.{leaf.name}" for index in range(experts.count)]
            first += [first[-1] + (index + 1) * out_features for index in range(experts.count)]
    try:
        written = revert_weight_conversion(model, state)
    except Exception:  # code of any model, which may need more than the experts
        return {}
    parts: dict[str, list[Part]] = {}
    for key, tensor in written.items():
        values = tensor.flatten()
        start, stop = int(values[0]), int(values[-1]) + 1
        step = int(values[1]) - start if len(values) > 1 else 1
        owner = bisect_right(first, start) - 1
        one = tensor.ndim == 2 and key.endswith(".weight") and step > 0 and stop <= first[owner + 1]
        if one and torch.equal(values, torch.arange(start, stop, step, dtype=torch.int32)):
            rows = slice(start - first[owner], stop - first[owner], step)
            parts.setdefault(names[owner], []).append((key.removesuffix(".weight"), rows))
    return {name: tuple(sorted(several, key=lambda part: part[1].start)) for name, several in parts.items()}
