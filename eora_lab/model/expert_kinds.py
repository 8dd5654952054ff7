"""How experts multiply: one class for all that transformers routes alike, and a few for those of their own ways.

`unfold_experts` puts them in place of fused experts. Outputs are the same, which is tried on random tokens.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.model.experts import Experts, Leaf

PROBES = 8  # random tokens that old and new experts are compared on


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
        """What one expert makes of the tokens routed to it."""
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
        """Random arguments of forward."""
        x = random_tokens(self, random)
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
        """What one expert makes of the tokens it was chosen for."""
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
        """Random arguments of forward."""
        return (random_tokens(self, random, PROBES * self.count),)


class ParallelExperts(Experts):
    """JetMoE: one linear an expert, which is handed its rows, one expert after the other."""

    def __init__(self, fused: Any):
        super().__init__(fused, len(fused.get_parameter("weight")), [Leaf("linear", "weight")])

    def expert(self, index: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """What one expert makes of its rows."""
        return self.linears(index)["linear"](x)

    def forward(self, inputs: Float[Tensor, "tokens in"], expert_size: list[int]) -> Float[Tensor, "tokens out"]:
        return torch.cat([self.expert(index, x) if len(x) else x.new_zeros(0, self.fused.output_size)
                          for index, x in enumerate(inputs.split(expert_size, dim=0))])  # fmt: skip

    def probe(self, random: torch.Generator) -> tuple:
        """Random arguments of forward."""
        return random_tokens(self, random, PROBES * self.count), [PROBES] * self.count


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
        """Random arguments of forward."""
        x = random_tokens(self, random)
        return x, torch.rand(len(x), self.count, generator=random).to(x)


def random_tokens(experts: Experts, random: torch.Generator, tokens: int = PROBES) -> Float[Tensor, "tokens in"]:
    """As the experts take them."""
    like = experts.get_parameter(f"0.{experts.leaves[0].name}.weight")
    return torch.randn(tokens, like.shape[1], generator=random).to(like)


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


def _alike(fused: nn.Module, kind: type[Experts]) -> Experts | None:
    """Experts of that kind in place of a fused module, if they compute the same."""
    try:
        experts: Any = kind(fused)  # type: ignore[call-arg]
        arguments = experts.probe(torch.Generator().manual_seed(0))
        if arguments[0].is_meta:
            return experts
        wanted, found = fused(*arguments).float(), experts(*arguments).float()
    except Exception:  # code of any model, and a kind that need not fit
        return None
    tolerance = max(1e-5, 4 * torch.finfo(arguments[0].dtype).eps)
    return experts if (found - wanted).norm() <= tolerance * wanted.norm() else None
