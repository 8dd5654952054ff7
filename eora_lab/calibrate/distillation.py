"""How far the predictions of a changed model are from the original's, and where that pulls the output of its layers.

The original's predictions are kept as the hidden states that leave its last block: the head is not compressed, and
makes the logits of them again, of some tokens at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.backward import LOGITS, BackwardPass, frozen, loss_slope
from eora_lab.calibrate.calls import BlockCalls
from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import BlockStream, in_mini_batches
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import decoder_blocks


class Targets:
    """What a model, the original, predicts at every calibration token.

    tokens:   (nsamples, seqlen).
    held_out: share of the samples, the last ones, that are there to judge by.
    Raises EoraLabError as `BlockStream` does.
    """

    def __init__(self, model: nn.Module, tokens: Int[Tensor, "nsamples seqlen"], held_out: float, contract: Contract):
        self.tokens = tokens.to(next(model.parameters()).device)
        self.held_out, self.contract = held_out, contract
        stream = BlockStream(model, tokens, held_out, contract)
        for index in range(len(stream.blocks)):
            stream.advance(index)
        self._hidden = list(stream.hidden)
        self._parts = in_mini_batches(self.tokens, held_out)
        self._head = BlockCalls(model, decoder_blocks(model), contract.rest)

    def judged(self) -> Int[Tensor, "held_out seqlen"]:
        """The samples that are held out."""
        return torch.cat([part for part, apart in self._parts if apart])

    @torch.no_grad()
    def divergence(self, hidden: Iterable[Float[Tensor, "... hidden"]]) -> float:
        """KL(original ‖ model), nats a token, mean over the tokens that are held out.

        hidden: what leaves the model's last block, for every mini-batch of them.
        """
        total, count = 0.0, 0
        kept = [(part, own) for (part, apart), own in zip(self._parts, self._hidden, strict=True) if apart]
        for (part, own), other in zip(kept, hidden, strict=True):
            start, places = 0, 1  # one place says how large the vocabulary is
            while start < part.shape[1]:
                here = slice(start, start + places)
                ours, wanted = (self._head.leave(part[:, here], one[..., here, :]) for one in (other, own))
                total += divergence(ours, wanted).sum().item()
                start, places = start + places, max(LOGITS // (len(part) * ours.shape[-1]), 1)
            count += part.numel()
        return total / count

    def pulls(self, model: nn.Module, names: Iterable[str]) -> tuple[dict[str, "Pull"], float]:
        """Module name -> what pulls at its output, for linears of the model as it is; and KL(original ‖ model), nats a
        token, of the tokens that are not held out.

        Raises EoraLabError as `BackwardPass` does, and on NaN or Inf in a gradient, with the layer's name.
        """
        modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}  # linears, compressed or not
        shared: dict[str, InputStatistics] = {}
        found: dict[str, Pull] = {}
        for name, module in modules.items():
            key = name if name in self.contract.apart else self.contract.shared.get(name, name)
            device = self.tokens.device
            alone = key not in shared
            inputs = shared.setdefault(key, InputStatistics(module.in_features, device, name))
            found[name] = Pull(
                torch.zeros(module.out_features, module.in_features, device=device),
                inputs,
                OutputStatistics(module.out_features, device, name),
                alone,
            )
        first = next(prefix for prefix in decoder_blocks(model) if any(one.startswith(f"{prefix}.") for one in found))
        draws = torch.rand(self.tokens.shape, generator=torch.Generator().manual_seed(0)).to(self.tokens.device)
        far, count = 0.0, 0

        def slopes(part: Tensor, own: Tensor, drawn: Tensor):
            """Of the divergence, and of labels that the model itself predicts, which tell how much a step costs."""

            def of(logits: Tensor, here: slice) -> list[Tensor]:
                nonlocal far
                wanted = self._head.leave(part[:, here], own[..., here, :])
                far += divergence(logits, wanted).sum().item()
                towards = logits.float().softmax(-1) - wanted.float().softmax(-1)
                return [towards.to(logits.dtype), loss_slope(logits, drawn[:, here])]

            return of

        with frozen(model):
            backward = BackwardPass(model, self.contract, self.tokens)
            handles = [module.register_forward_hook(found[name].hook(backward)) for name, module in modules.items()]
            try:
                parts = zip(self._parts, in_mini_batches(draws, self.held_out), self._hidden, strict=True)
                for (part, apart), (drawn, _), hidden in parts:
                    if apart:
                        continue
                    n = backward.sequences
                    own = hidden.split(n, dim=hidden.ndim - 3)  # (..., batch, seqlen, hidden)
                    for few, some, states in zip(part.split(n), drawn.split(n), own, strict=True):
                        for block, _ in backward.gradients(few, slopes(few, states, some)):
                            if block == first:
                                break
                    count += part.numel()
            finally:
                for handle in handles:
                    handle.remove()
        for name, one in found.items():
            if not torch.isfinite(one.gradient.sum()):
                raise EoraLabError(f"{name}: NaN or Inf in its gradient")
            one.gradient /= max(one.outputs.tokens, 1)
        return found, far / max(count, 1)


@dataclass
class Pull:
    """What pulls at the output y = W x of one linear, over the tokens that came to it.

    gradient: G = E[g xᵀ], (out, in) float32, g = d KL(original ‖ model) / d y: what a change of W does, nats a token.
    inputs:   S = E[x xᵀ]; one for all linears that share an input.
    outputs:  F = E[h hᵀ] of the gradients h towards labels that are drawn from the model's own predictions: half of
              tr(F Δ S Δᵀ) is how far a step Δ moves the predictions, in nats a token, to second order.
    alone:    whether the inputs are measured here, and not by another linear that shares them.
    """

    gradient: Float[Tensor, "out in"]
    inputs: InputStatistics
    outputs: OutputStatistics
    alone: bool

    def hook(self, backward: BackwardPass):
        """A forward hook for the linear, which does nothing where gradients are not asked for."""

        def watch(_module, args, output):
            if not torch.is_grad_enabled():
                return
            x = args[0].detach()
            if self.alone:
                self.inputs.update(x)
            if not output.requires_grad:  # it does not depend on the hidden states
                output.requires_grad_()
            output.register_hook(lambda g: self._add(g, x) if backward.turn == 0 else self.outputs.update(g))

        return watch

    def _add(self, g: Float[Tensor, "... out"], x: Float[Tensor, "... in"]) -> None:
        self.gradient.addmm_(g.reshape(-1, g.shape[-1]).float().T, x.reshape(-1, x.shape[-1]).float())


def divergence(
    logits: Float[Tensor, "*places vocabulary"], wanted: Float[Tensor, "*places vocabulary"]
) -> Float[Tensor, "*places"]:
    """KL(p ‖ q) in nats, p the predictions that are wanted."""
    log_q, log_p = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
