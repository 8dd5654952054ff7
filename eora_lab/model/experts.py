"""Experts of a mixture as linears. transformers fuses those of a layer in one tensor, which nothing here can compress.

A list of real linears stands in its place: `...experts.3.down_proj` is one of expert 3. `state_dict()`, and so
`save_pretrained`, fuses them again. How they multiply is in `expert_kinds`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Leaf:
    """A linear that every expert has, and the tensor that holds it for all experts.

    name:       of the linear, within an expert.
    weight:     name of the fused tensor, (experts, out, in).
    bias:       the same of biases, (experts, out), or "".
    transposed: the fused tensor is (experts, in, out).
    matrix:     it is (experts * out, in): the experts lie below one another.
    """

    name: str
    weight: str
    bias: str = ""
    transposed: bool = False
    matrix: bool = False

    def split(self, fused: Tensor, count: int) -> list[Tensor]:
        """The weight of every expert, (out, in)."""
        parts = fused.unflatten(0, (count, -1)) if self.matrix else fused[:count]
        return [part.T if self.transposed else part for part in parts]

    def fuse(self, weights: list[Tensor]) -> Tensor:
        """The inverse of `split`: the fused tensor, (experts, ...), of one weight an expert, (out, in)."""
        parts = torch.stack([weight.T if self.transposed else weight for weight in weights])
        return parts.flatten(0, 1) if self.matrix else parts


class Experts(nn.Module):
    """Experts, each a module of linears, in place of a module `fused`. What else that one holds stays its own."""

    def __init__(self, fused: Any, count: int, leaves: list[Leaf]):
        super().__init__()
        self.fused: Any
        object.__setattr__(self, "fused", fused)  # no submodule: its tensors are given up
        self.count, self.leaves = count, leaves
        self._rest: dict[str, Tensor] = {}  # rows of a fused tensor that belong to no expert
        linears: dict[str, list[nn.Linear]] = {}
        for leaf in leaves:
            weight = fused.get_parameter(leaf.weight).detach()
            biases = fused.get_parameter(leaf.bias).detach() if leaf.bias else [None] * count
            parts = leaf.split(weight, count)
            linears[leaf.name] = [linear(part, bias) for part, bias in zip(parts, biases, strict=False)]
            if not leaf.matrix and len(weight) > count:
                self._rest[leaf.weight] = weight[count:].clone()
        for name, child in fused.named_children():
            if not any(leaf.weight.startswith(f"{name}.") for leaf in leaves):
                setattr(self, name, child)
        for index in range(count):
            self.add_module(str(index), nn.ModuleDict({name: own[index] for name, own in linears.items()}))
        self.register_state_dict_post_hook(_fuse)
        self.register_load_state_dict_pre_hook(_unfuse)

    def __getattr__(self, name: str) -> Any:
        """Settings of the fused module, such as `num_experts`, for models that read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "fused" not in self.__dict__:
                raise
            return getattr(self.__dict__["fused"], name)

    def give_up(self) -> None:
        """Drop the tensors of the fused module."""
        for leaf in self.leaves:
            for name in filter(None, (leaf.weight, leaf.bias)):
                owner, _, local = name.rpartition(".")
                setattr(self.fused.get_submodule(owner), local, None)

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Name -> linear of one expert, compressed or not."""
        return dict(self.get_submodule(str(index)).named_children())

    def names(self) -> Iterator[list[str]]:
        """Names of linears within this module, those that the experts have in common together."""
        for leaf in self.leaves:
            yield [f"{index}.{leaf.name}" for index in range(self.count)]

    def beyond(self, leaf: Leaf) -> int:
        """Rows of a fused tensor after those of the experts."""
        return len(self._rest.get(leaf.weight, ()))


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """Full name -> experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def fuse(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put fused tensors, as files hold them, in place of those of all experts in dense tensors by name."""
    for name, module in mixtures(model).items():
        _fuse(module, tensors, f"{name}.", None)


def linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None) -> nn.Linear:
    """A linear with a copy of that weight."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made


def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Put fused tensors in place of those of the linears, unless some are compressed."""
    assert isinstance(module, Experts)
    for leaf in module.leaves:
        for name, local in ((leaf.weight, "weight"), (leaf.bias, "bias")):
            keys = [f"{prefix}{index}.{leaf.name}.{local}" for index in range(module.count)]
            if not name or not all(key in state for key in keys):
                continue
            own = [state.pop(key) for key in keys]
            fused = leaf.fuse(own) if local == "weight" else torch.stack(own)
            rest = module._rest.get(name)
            state[prefix + name] = fused if rest is None else torch.cat([fused, rest.to(fused)])


def _unfuse(module: nn.Module, state: dict[str, Any], prefix: str, *_others: object) -> None:
    """Read fused tensors into the linears."""
    assert isinstance(module, Experts)
    for leaf in module.leaves:
        for name, local in ((leaf.weight, "weight"), (leaf.bias, "bias")):
            if name and (fused := state.pop(prefix + name, None)) is not None:
                parts = leaf.split(fused, module.count) if local == "weight" else fused
                for index in range(module.count):
                    state[f"{prefix}{index}.{leaf.name}.{local}"] = parts[index]
