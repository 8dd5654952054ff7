"""The residual stream of a model on one text: the hidden states that each block hands to the next."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import hidden_states
from eora_lab.calibrate.contract import plain_pass
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import decoder_blocks
from eora_lab.products import fast_products
from eora_lab.text.batches import as_tokens


@dataclass(frozen=True)
class ResidualStream:
    """What the blocks of a model hand on, for one text.

    tokens: (seqlen,). states: name of a block -> hidden states after it, as it returns them: (1, seqlen, hidden) in
            most models, with another dimension in those that keep several streams.
    """

    tokens: Int[Tensor, " seqlen"]
    states: dict[str, Float[Tensor, "..."]]

    def by_token(self, block: str) -> Float[Tensor, "seqlen features"]:
        """Hidden states after a block, a row a token. Raises EoraLabError where it cannot be known which is which."""
        states, seqlen = self.states[block], len(self.tokens)
        places = [place for place, size in enumerate(states.shape) if size == seqlen]
        if 1 in places and len(states) == 1:  # the text is a batch of one
            places = [1]
        if len(places) != 1:
            raise EoraLabError(f"{block} returns {tuple(states.shape)} for {seqlen} tokens: which are they?")
        return states.movedim(places[0], 0).reshape(seqlen, -1)


@fast_products()
@torch.no_grad()
def residual_stream(model: nn.Module, window: Any) -> ResidualStream:
    """Run a model on one text and keep what its blocks return, by forward hooks.

    window: token ids (seqlen,): a tensor, an array or a list. All states of this one text are held at once.
    Raises EoraLabError for tokens that the model cannot take, and for blocks that do not run once each, in order.
    """
    tokens = one_window(model, window)
    blocks = decoder_blocks(model)
    outputs = plain_pass(model, blocks, tokens, set())
    return ResidualStream(tokens[0], {name: hidden_states(name, one) for name, one in outputs.items()})


def one_window(model: nn.Module, window: Any) -> Int[Tensor, "1 seqlen"]:
    """One text as a batch, where the model is. Raises EoraLabError when it is none."""
    return as_tokens(model, [window], "the window").to(next(model.parameters()).device)


@torch.no_grad()
def stream_errors(dense: ResidualStream, other: ResidualStream) -> Float[Tensor, "blocks seqlen"]:
    """|h' - h| / |h| of every token after every block: how far the residual stream has left that of the dense model.

    float64, on the CPU. A token each, because some, such as the first, are far larger than all others.
    Raises EoraLabError for streams of two texts or of models with other blocks.
    """
    check_alike([dense, other])
    errors = []
    for block in dense.states:
        h, changed = dense.by_token(block).double(), other.by_token(block).double()
        errors.append((changed - h).norm(dim=1) / h.norm(dim=1))
    return torch.stack(errors).cpu()


def check_alike(streams: Iterable[ResidualStream]) -> None:
    """Raise EoraLabError unless all are of one text, through the same blocks."""
    first, *others = streams
    for other in others:
        if not torch.equal(first.tokens, other.tokens):
            raise EoraLabError("residual streams of two texts cannot be compared: run both models on one window")
        if [(name, one.shape) for name, one in first.states.items()] != [
            (name, one.shape) for name, one in other.states.items()
        ]:
            raise EoraLabError("residual streams of two models with other blocks cannot be compared")
