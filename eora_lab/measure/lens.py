"""The logit lens: what a model would predict if it ended after a block (nostalgebraist 2020).

The model's own end makes the prediction: its last norm, head, and whatever it does to its logits. So the lens after the
last block is the model's output, exactly.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls, hidden_states
from eora_lab.calibrate.contract import TOKENS, plain_pass, relative_error, returned, tolerance
from eora_lab.errors import EoraLabError
from eora_lab.measure.residual_stream import ResidualStream, check_alike
from eora_lab.model.structure import decoder_blocks
from eora_lab.products import fast_products

ROWS = 64  # tokens whose distributions are compared at once


class LensReading(NamedTuple):
    """What the lens shows of one residual stream.

    divergence: KL(p || q) in nats, p of the reference's stream and q of this one, after every block at every token.
    answers:    the token that is most probable there.
    """

    divergence: Float[Tensor, "blocks seqlen"]
    answers: Int[Tensor, "blocks seqlen"]


@fast_products()
@torch.no_grad()
def read_lens(
    model: nn.Module, streams: Mapping[str, ResidualStream], reference: str = "dense"
) -> dict[str, LensReading]:
    """Read residual streams of one text through the end of a model, and compare their distributions block by block.

    model:     whose norm and head read all of them; those of a compressed model are those of the dense one.
    streams:   label -> `residual_stream` of a model. reference: the label of the stream that others diverge from.
    Only the logits of one block are held at once. Raises EoraLabError for streams of two texts or of other models, and
    for a model whose output does not follow from its last block alone.
    """
    if reference not in streams:
        raise EoraLabError(f"no stream {reference!r} to compare with; there are {', '.join(streams)}")
    check_alike([streams[reference], *streams.values()])
    tokens, blocks = streams[reference].tokens[None], decoder_blocks(model)
    calls = BlockCalls(model, blocks, returned(model, tokens))
    _check_end(model, calls, tokens[:, :TOKENS])
    rows: dict[str, list[LensReading]] = {label: [] for label in streams}
    for block in blocks:
        expected = _logits(calls, tokens, streams[reference].states[block])
        for label, stream in streams.items():
            found = expected if label == reference else _logits(calls, tokens, stream.states[block])
            rows[label].append(LensReading(_divergence(expected, found).cpu(), found.argmax(1).cpu()))
    return {
        label: LensReading(*(torch.stack(part) for part in zip(*each, strict=True))) for label, each in rows.items()
    }


def _check_end(model: nn.Module, calls: BlockCalls, tokens: Int[Tensor, "1 seqlen"]) -> None:
    """Raise EoraLabError unless the last block's hidden states alone make the model's logits."""
    last = list(calls.blocks)[-1]
    states = hidden_states(last, plain_pass(model, calls.blocks, tokens, set())[last])
    wanted = model(tokens, use_cache=False).logits
    error = relative_error(calls.leave(tokens, states), wanted)
    if not error <= tolerance(wanted.dtype):
        raise EoraLabError(
            f"{type(model).__name__} has no logit lens: its logits do not follow from its last block alone "
            f"(relative error {error:.1e})"
        )


def _logits(
    calls: BlockCalls, tokens: Int[Tensor, "1 seqlen"], states: Float[Tensor, "..."]
) -> Float[Tensor, "seqlen vocabulary"]:
    """float32. Raises EoraLabError where they are not finite."""
    logits = calls.leave(tokens, states)[0].float()
    if not logits.isfinite().all():
        raise EoraLabError("the model's logits are not finite")
    return logits


def _divergence(
    expected: Float[Tensor, "seqlen vocabulary"], found: Float[Tensor, "seqlen vocabulary"]
) -> Float[Tensor, " seqlen"]:
    """KL(p || q) of every token, in nats."""
    parts = [
        F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)
        for p, q in zip(expected.split(ROWS), found.split(ROWS), strict=True)
    ]
    return torch.cat(parts)
