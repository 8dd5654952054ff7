"""Experts of a mixture as linears. transformers fuses those of a layer in one tensor, which nothing here can compress.

`unfold_experts` puts a list of real linears in its place: `...experts.3.down_proj` is one of expert 3. Outputs are the
same, which is tried on random tokens; `state_dict()`, and so `save_pretrained`, fuses them again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PROBES = 8  # random tokens that old and new experts are compared on
MARKS = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "has_post_expert_norm",
    "_apply_gate",
)  # of `use_experts_implementation`


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

    def __len__(self) -> int:
        return self.count

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

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """What one expert makes of the tokens routed to it."""
        raise NotImplementedError

    def probe(self, random: torch.Generator) -> tuple:
        """Random arguments of forward."""
        raise NotImplementedError

    def hidden(self, random: torch.Generator, tokens: int = PROBES) -> Float[Tensor, "tokens in"]:
        """Random tokens as the experts take them."""
        like = self.get_parameter(f"0.{self.leaves[0].name}.weight")
        return torch.randn(tokens, like.shape[1], generator=random).to(like)


class RoutedExperts(Experts):
    """Every token runs through the experts that are chosen for it; their outputs are weighed and summed."""

    passes_on = False  # whether a token that is routed to an index beyond the last expert is passed on, or dropped

    def __init__(self, fused: Any, count: int | None = None, leaves: list[Leaf] | None = None):
        if leaves is None:
            bias, transposed = getattr(fused, "has_bias", False), getattr(fused, "is_transposed", False)
            names = ("gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj", "down_proj")
            leaves = [Leaf(name, name, f"{name}_bias" if bias else "", transposed) for name in names]
        super().__init__(fused, len(fused.get_parameter(leaves[-1].weight)) if count is None else count, leaves)

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        linears, fused = self.linears(index), self.fused
        hidden = linears[self.leaves[0].name](x)
        if not getattr(fused, "has_gate", True):
            hidden = fused.act_fn(hidden)
        elif hasattr(fused, "_apply_gate"):
            hidden = fused._apply_gate(hidden)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = fused.act_fn(gate) * up
        hidden = linears["down_proj"](hidden)
        return fused.post_expert_norm(hidden) if getattr(fused, "has_post_expert_norm", False) else hidden

    def forward(
        self,
        hidden_states: Float[Tensor, "... in"],
        top_k_index: Int[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "... out"]:
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == index)
            if index < self.count or self.passes_on:
                x = hidden_states[token]
                made = self.expert(index, x) if index < self.count else x
                out.index_add_(0, token, (made * top_k_weights[token, choice, None]).to(out.dtype))
        return out.view(shape)

    def probe(self, random: torch.Generator) -> tuple:
        x = self.hidden(random)
        chosen = torch.rand(len(x), self.count, generator=random).topk(min(2, self.count)).indices
        return x, chosen.to(x.device), torch.rand(chosen.shape, generator=random).to(x)


class LongcatExperts(RoutedExperts):
    """LongCat: some choices stand for no expert."""

    passes_on = True

    def __init__(self, fused: Any):
        super().__init__(fused, fused.num_routed_experts)


class DbrxExperts(RoutedExperts):
    """DBRX: three matrices, in each of which the experts lie below one another."""

    def __init__(self, fused: Any):
        leaves = [Leaf(name, f"mlp.{name}", transposed=name == "w2", matrix=True) for name in ("w1", "v1", "w2")]
        super().__init__(fused, fused.num_experts, leaves)

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        linears = self.linears(index)
        return linears["w2"](self.fused.mlp.activation_fn(linears["w1"](x)) * linears["v1"](x))

    def probe(self, random: torch.Generator) -> tuple:
        x, chosen, weights = super().probe(random)
        return x[None], chosen, weights


class SortedExperts(Experts):
    """Llama 4: every expert is handed all tokens one after the other, scaled, with zeros where it is not chosen."""

    def __init__(self, fused: Any):
        leaves = [Leaf(name, name, transposed=True) for name in ("gate_up_proj", "down_proj")]
        super().__init__(fused, len(fused.get_parameter("down_proj")), leaves)

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        linears = self.linears(index)
        gate, up = linears["gate_up_proj"](x).chunk(2, dim=-1)
        return linears["down_proj"](up * self.fused.act_fn(gate))

    def forward(self, hidden_states: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        rows = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        out = torch.zeros_like(rows)
        for index, own in enumerate(rows):
            if (chosen := own.abs().sum(-1) > 0).any():
                out[index, chosen] = self.expert(index, own[chosen])
        return out.view(hidden_states.shape)

    def probe(self, random: torch.Generator) -> tuple:
        return (self.hidden(random, PROBES * self.count),)


class ParallelExperts(Experts):
    """JetMoE: one linear an expert, which is handed its rows, one expert after the other."""

    def __init__(self, fused: Any):
        super().__init__(fused, len(fused.get_parameter("weight")), [Leaf("linear", "weight")])

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        return self.linears(index)["linear"](x)

    def forward(self, inputs: Float[Tensor, "tokens in"], expert_size: list[int]) -> Float[Tensor, "tokens out"]:
        return torch.cat([self.expert(index, x) if len(x) else x.new_zeros(0, self.fused.output_size)
                          for index, x in enumerate(inputs.split(expert_size, dim=0))])  # fmt: skip

    def probe(self, random: torch.Generator) -> tuple:
        return self.hidden(random, PROBES * self.count), [PROBES] * self.count


class SharedExperts(Experts):
    """Inkling: every token runs through all of them, weighed."""

    def __init__(self, fused: Any):
        leaves = [Leaf(name, name) for name in ("gate_proj", "up_proj", "down_proj")]
        super().__init__(fused, len(fused.get_parameter("down_proj")), leaves)

    def forward(
        self, hidden_states: Float[Tensor, "... in"], gammas: Float[Tensor, "... experts"]
    ) -> Float[Tensor, "... out"]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = torch.zeros_like(x, dtype=torch.float32)
        for index, gamma in enumerate(gammas.reshape(-1, self.count, 1).unbind(1)):
            linears = self.linears(index)
            hidden = self.fused.act_fn(linears["gate_proj"](x)) * linears["up_proj"](x) * gamma
            out += linears["down_proj"](hidden).float()
        return out.to(x.dtype).view(hidden_states.shape)

    def probe(self, random: torch.Generator) -> tuple:
        x = self.hidden(random)
        return x, torch.rand(len(x), self.count, generator=random).to(x)


SPECIAL: dict[str, type[Experts]] = {  # all others are routed, as the marks of transformers' decorator say
    "LongcatFlashExperts": LongcatExperts,
    "DbrxExperts": DbrxExperts,
    "Llama4TextExperts": SortedExperts,
    "JetMoeParallelExperts": ParallelExperts,
    "InklingSharedExperts": SharedExperts,
}


@torch.no_grad()
def unfold_experts(model: nn.Module) -> None:
    """Put linears in place of every fused tensor of experts. Those that come out otherwise by linears stay fused."""
    for name, module in list(model.named_modules()):
        fused = any(local == "down_proj" and p.ndim == 3 for local, p in module.named_parameters(recurse=False))
        kind = SPECIAL.get(type(module).__name__) or (RoutedExperts if fused else None)
        if kind and (experts := _alike(module, kind)):
            experts.give_up()
            model.set_submodule(name, experts.train(module.training))


def mixtures(model: nn.Module) -> dict[str, Experts]:
    """Full name -> experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def fuse(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put fused tensors, as files hold them, in place of those of all experts in dense tensors by name."""
    for name, module in mixtures(model).items():
        _fuse(module, tensors, f"{name}.", None)


def _alike(fused: nn.Module, kind: type[Experts]) -> Experts | None:
    """Experts of that kind in place of a fused module, if they compute the same."""
    try:
        experts = kind(fused)  # type: ignore[call-arg]
        arguments = experts.probe(torch.Generator().manual_seed(0))
        if arguments[0].is_meta:
            return experts
        wanted, found = fused(*arguments).float(), experts(*arguments).float()
    except Exception:  # code of any model, and a kind that need not fit
        return None
    tolerance = max(1e-5, 4 * torch.finfo(arguments[0].dtype).eps)
    return experts if (found - wanted).norm() <= tolerance * wanted.norm() else None


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
