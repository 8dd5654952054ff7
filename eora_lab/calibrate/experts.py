"""Statistics of experts. Few tokens reach each, so its S is drawn towards that of all experts of its layer:

S_e = (n_e S_routed + k S_layer) / (n_e + k)

where S_layer weighs every routed token alike, and k, in tokens, is the one whose leading eigenvectors capture most of
the tokens that were left out: those of every second mini-batch, and then of the others. Such directions EoRA mends.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.moments import M, Moments
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.model.experts import Experts

STRENGTHS = (0.0, 2**-5, 2**-3, 2**-1, 2.0, 8.0)  # k, in input channels
JUDGED = 8  # experts of a layer that k is chosen on
LEADING, STEPS = 8, 3  # one in so many eigenvectors, and steps of subspace iteration to them
BOUND = 4 * 2**30  # bytes of S of all experts of a layer; above that they share one


def experts_of(block: nn.Module) -> list[list[str]]:
    """Names of linears in a block that experts of one mixture have in common."""
    found = [(name, module) for name, module in block.named_modules() if isinstance(module, Experts)]
    return [[f"{prefix}.{name}" for name in names] for prefix, module in found for names in module.names()]


def too_large(experts: int, features: int) -> bool:
    """Whether a second moment of so many channels for each expert would take more memory than there should be."""
    return experts * 4 * features**2 > BOUND


class Halves:
    """The statistics of one expert in two parts, of every second mini-batch each."""

    def __init__(self, whole: InputStatistics):
        self.whole = whole
        self.parts = [InputStatistics(whole.in_features, whole.device, whole.name) for _ in range(2)]

    def join(self) -> None:
        """Put both together."""
        both = self.parts[0].merge(self.parts[1])
        self.whole.tokens, self.whole.second_moment = both.tokens, both.second_moment
        self.whole.mean_abs = both.mean_abs


def judged(names: list[str]) -> list[str]:
    """The experts that k is chosen on, spread over all."""
    return names[:: max(len(names) // JUDGED, 1)][:JUDGED]


def draw_together(experts: Iterable[Moments], halves: Iterable[Halves]) -> None:
    """Draw the statistics of experts of one mixture towards those of all of them, in place.

    halves: of the experts that k is chosen on.
    """
    members = list(experts)
    layer, k = pooled(members), strength(list(halves), members[0].features)
    for member in members:
        mix(member, layer, k)


def pooled(members: Iterable[M]) -> M:
    """The statistics of all tokens that any of them saw, and of all that were held out."""
    members = list(members)
    total = sum(member.tokens for member in members)
    layer = type(members[0])(members[0].features, members[0].device, members[0].name)
    layer.tokens = total
    for member in members:
        theirs = member.means()
        for key, mean in layer.means().items():
            mean.add_(theirs[key], alpha=member.tokens / max(total, 1))
    held_out = [member.held_out for member in members if member.held_out]
    layer.held_out = pooled(held_out) if held_out else None
    return layer


def strength(halves: list[Halves], channels: int) -> float:
    """k, in tokens, whose leading eigenvectors of one part of the tokens capture most of the S of the other.

    What is left out is left out of S_layer too: its tokens are of the same texts. As many as there are input channels
    where no expert has tokens in both parts.
    """
    telling = [half for half in halves if all(part.tokens for part in half.parts)]
    if not telling:
        return float(channels)
    layers = [pooled([half.parts[i] for half in halves]) for i in range(2)]
    captured = dict.fromkeys(STRENGTHS, 0.0)
    for half in telling:
        for layer, seen, left_out in zip(layers, half.parts, half.parts[::-1], strict=True):
            for times in STRENGTHS:
                share = drawn_share(seen, layer, times * channels)
                vectors = leading(torch.lerp(seen.second_moment, layer.second_moment, share))
                captured[times] += left_out.tokens * float(((left_out.second_moment @ vectors) * vectors).sum())
    return max(captured, key=captured.__getitem__) * channels


def leading(second_moment: Float[Tensor, "in in"]) -> Float[Tensor, "in leading"]:
    """An orthonormal basis of the leading eigenvectors, nearly."""
    channels = len(second_moment)
    start = torch.randn(channels, max(channels // LEADING, 1), generator=torch.Generator().manual_seed(0))
    basis = start.to(second_moment)
    for _ in range(STEPS):
        basis = torch.linalg.qr(second_moment @ basis).Q
    return basis


def drawn_share(member: Moments, layer: Moments, k: float) -> float:
    """Share of S_layer: k / (n_e + k), of no more tokens than there are."""
    k = min(k, layer.tokens)
    return k / max(member.tokens + k, 1.0)


def mix(member: M, layer: M, k: float) -> None:
    """Draw the statistics of an expert towards those of its layer, as if k of their tokens were its own."""
    k = k if member.tokens else max(k, 1.0)
    share = drawn_share(member, layer, k)
    member.pooled_tokens = float(min(k, layer.tokens))
    theirs = layer.means()
    for key, mean in member.means().items():
        mean.lerp_(theirs[key], share)
    if member.held_out is None:
        member.held_out = layer.held_out
