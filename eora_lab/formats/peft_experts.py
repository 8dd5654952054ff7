"""Experts in PEFT's own form: LoRA on the fused tensor (`target_parameters`), one pair of matrices for all experts.

As `ParamWrapper` of peft 0.21 has it: lora_A is (experts * rank, in), the experts one after the other; lora_B is
(out, rank * experts), the experts of each rank side by side. Wrappers of several tensors of a module lie in one
another, in the order in which the module defines them: the last one is outermost, the others are its `base_layer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.formats.adapter_config import left_out_by
from eora_lab.formats.fused import Fused
from eora_lab.formats.names import Factors

WRAPPED = ".base_layer"
DENSE = "weight"  # a parameter of that name is a linear's, or that of a module of parallel experts
ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", DENSE)  # in which modules define their tensors
# Last parts of target_modules that peft takes for experts in most families of mixtures, and drops or doubles the rank
# of. Dense linears of those names are targeted by their weight, which it lets alone.
RENAMED = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
Halves = tuple[Float[Tensor, "_rank _in"], Float[Tensor, "_out _rank"]]


@dataclass(frozen=True)
class Entry:
    """A pair of matrices in an adapter.

    key:       of its tensors, without lora_A and lora_B.
    target:    what peft calls it in its patterns: a module, or a parameter of one.
    parameter: whether it is one of target_parameters.
    rank:      in the configuration; `A` has so many rows for every expert.
    """

    key: str
    target: str
    parameter: bool
    rank: int
    A: Float[Tensor, "rows in"]
    B: Float[Tensor, "out rows"]


def pack(factors: Factors, fused: Sequence[Fused]) -> list[Entry]:
    """Entries of all pairs above rank 0. Experts of a layer get the highest of their ranks, padded with zeros."""
    experts = {name: each for each in fused for name in each.names()}
    entries = []
    for module, (A, B) in factors.items():
        if not (module in experts and experts[module].parameter) and len(A):
            by_weight = bool(fused) and module not in experts and module.rpartition(".")[2] in RENAMED
            entries.append(Entry(module, f"{module}.{DENSE}" if by_weight else module, by_weight, len(A), A, B))
    for module, group in groupby(fused, lambda each: each.module):
        given = [(each, of_one_rank(factors, each)) for each in group if each.parameter]
        for depth, (each, pairs) in enumerate(reversed([(each, pairs) for each, pairs in given if pairs])):
            rank = len(pairs[0][0])
            A, B = pairs[0]
            pairs = pairs + [(torch.zeros_like(A), torch.zeros_like(B))] * each.beyond
            if each.flipped:  # peft holds (B A)^T
                pairs = [(B.T, A.T) for A, B in pairs]
            target = f"{module}.{each.parameter}"
            entries.append(Entry(module + WRAPPED * depth, target, True, rank, *_together(pairs)))
    return entries


def of_one_rank(factors: Factors, fused: Fused) -> list[Halves]:
    """The pairs of all experts, padded with zeros to the highest rank; none where that is 0."""
    given = [factors.get(name) for name in fused.names()]
    A, B = max((pair for pair in given if pair), key=lambda pair: len(pair[0]), default=(None, None))
    if A is None or B is None or not len(A):
        return []
    padded = []
    for a, b in (pair or (A[:0], B[:, :0]) for pair in given):
        missing = len(A) - len(a)
        padded.append(
            (torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], 1))
        )
    return padded


def _together(pairs: Sequence[Halves]) -> Halves:
    """The pairs of all experts, of one rank, as one."""
    return torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=-1).flatten(1)


def _one_by_one(A: Float[Tensor, "rows in"], B: Float[Tensor, "out rows"], count: int) -> list[Halves]:
    """The inverse of `_together`."""
    return list(zip(A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).unbind(-1), strict=True))


def parameter_targets(keys: Sequence[str], config: dict) -> dict[str, str]:
    """Key -> parameter of the model that its pair is of, for all keys that target_parameters names.

    Raises EoraLabError where the two do not fit, or where it cannot be told which pair is whose.
    """
    listed = config.get("target_parameters") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise EoraLabError(f"target_parameters must be a list of names, not {listed!r}")
    depths: dict[str, list[str]] = {}
    for key in sorted(keys, key=len):
        depths.setdefault(key.replace(WRAPPED, ""), []).append(key)
    targets: dict[str, str] = {}
    met: set[str] = set()
    for module, wrappers in depths.items():
        named = {name.rpartition(".")[2]: name for name in listed if _holds(name, module)}
        met.update(named.values())
        if not named and len(wrappers) == 1 and wrappers[0] == module:
            continue
        known = sorted(named, key=lambda name: ORDER.index(name) if name in ORDER else -1, reverse=True)
        expected = [module + WRAPPED * depth for depth in range(len(known))]
        if wrappers != expected or not set(known) <= set(ORDER):
            raise EoraLabError(
                f"the factors of {module} are not those of its parameters {', '.join(sorted(named)) or 'at all'} "
                "(target_parameters)"
            )
        targets |= {key: f"{module}.{name}" for key, name in zip(wrappers, known, strict=True)}
    if strangers := [name for name in listed if name not in met]:
        raise EoraLabError(f"there are no factors of {strangers[0]} (target_parameters)")
    for key in keys:
        if key in targets and config.get("target_modules") and not left_out_by(config, key):
            raise EoraLabError(f"{key} is in target_modules too (target_parameters)")
    return targets


def _holds(name: str, module: str) -> bool:
    """Whether a parameter of target_parameters, which may be the end of its name, is one of that module's."""
    holder = name.rpartition(".")[0] or "experts"
    return f".{module}".endswith(f".{holder}")


def unpack(factors: Factors, targets: Mapping[str, str], ranks: Mapping[str, int]) -> Factors:
    """Factors by key -> by this package's names, a pair for every expert.

    targets: from `parameter_targets`. ranks: key -> rank of one expert, for those.
    Raises EoraLabError where the sizes are no multiples of it, or do not fit one another.
    """
    found: Factors = {}
    experts: dict[str, dict[str, list[Halves]]] = {}
    for key, (A, B) in factors.items():
        module, _, parameter = targets.get(key, "").rpartition(".")
        if not module or (parameter == DENSE and len(A) == ranks[key]):
            found[module or key] = A, B
            continue
        if len(A) % ranks[key]:
            raise EoraLabError(f"{key}: its {len(A)} ranks are not those of experts of rank {ranks[key]}")
        experts.setdefault(module, {})[parameter] = _one_by_one(A, B, len(A) // ranks[key])
    for module, leaves in experts.items():
        count = min(len(pairs) for pairs in leaves.values())
        if any(pair[1].any() for pairs in leaves.values() for pair in pairs[count:]):
            raise EoraLabError(f"the factors of {module} are of different numbers of experts")
        leaves = {leaf: pairs[:count] for leaf, pairs in leaves.items()}  # the others belong to no expert
        if _flipped(leaves):
            leaves = {leaf: [(B.T, A.T) for A, B in pairs] for leaf, pairs in leaves.items()}
        for leaf, pairs in leaves.items():
            name = "linear" if leaf == DENSE else leaf
            found |= {f"{module}.{index}.{name}": pair for index, pair in enumerate(pairs)}
    return found


def _flipped(leaves: Mapping[str, Sequence[Halves]]) -> bool:
    """Whether peft took inputs for outputs: gate and up together have twice as many outputs as down has inputs."""
    if not {"gate_up_proj", "down_proj"} <= leaves.keys():
        return False
    (up_A, up_B), (down_A, down_B) = leaves["gate_up_proj"][0], leaves["down_proj"][0]
    plain = (len(up_B), up_A.shape[1]) == (2 * down_A.shape[1], len(down_B))
    return not plain and (up_A.shape[1], len(up_B)) == (2 * len(down_B), down_A.shape[1])
