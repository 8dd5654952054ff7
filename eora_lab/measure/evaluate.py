"""Measure a model on token windows: the loss of each, and the perplexity of all.

A compressed model is walked block by block, all windows through the first and so on: every W^ is unpacked once, and
dense for one block at a time. So is an original that is larger than the memory that is left, which would be read from
its files anew for every window. That the numbers are the same is tried on some tokens first.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls
from eora_lab.calibrate.contract import TOKENS, check_blocks, in_one_line, relative_error, returned
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.environment import free_memory
from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import as_stored, compensated, unpacked
from eora_lab.model.structure import decoder_blocks
from eora_lab.products import fast_products
from eora_lab.progress import each
from eora_lab.text.batches import Batches, as_tokens

TOGETHER = 2**15  # tokens that are walked through the blocks at once
ROUNDING = 8  # times the precision of the logits, or 1e-4, that walked ones may be off: another backend computes


def perplexity(model: nn.Module, token_windows: Batches, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens, each window on its own.

    token_windows: token ids (n, seqlen): a tensor, an array, or a list of windows.
    A window of seqlen tokens predicts seqlen - 1 of them. Raises EoraLabError on windows shorter than two tokens, on
    tokens that the model cannot take (see `check_tokens`), and when its logits are not finite.
    """
    return window_losses(model, token_windows, progress).mean().exp().item()


@fast_products()
@torch.no_grad()
def window_losses(
    model: nn.Module, token_windows: Batches, progress: bool = False, processes: Processes = ALONE
) -> Float[Tensor, " n"]:
    """Mean negative log-likelihood a token (nats) of every window, float64. Perplexity is the exp of their mean.

    processes: that share the windows, each with the same model, and all get the losses of all.
    Raises EoraLabError as `perplexity` does.
    """
    tokens = _windows(model, token_windows)
    with processes.agree():
        own = [losses.mean().item() for losses in _losses(model, tokens[processes.rank :: processes.count], progress)]
    found = torch.empty(len(tokens), dtype=torch.float64)
    for rank, losses in enumerate(processes.gather(own)):
        found[rank :: processes.count] = torch.tensor(losses, dtype=torch.float64)
    return found


@fast_products()
@torch.no_grad()
def token_losses(model: nn.Module, token_windows: Batches, progress: bool = False) -> Float[Tensor, "n predicted"]:
    """Negative log-likelihood (nats) of every token of every window but its first: how much it surprises the model.

    (n, seqlen - 1), float64. The mean over a window is what `window_losses` gives. Raises EoraLabError as `perplexity`.
    """
    return torch.stack(list(_losses(model, _windows(model, token_windows), progress)))


def _windows(model: nn.Module, token_windows: Batches) -> Int[Tensor, "n seqlen"]:
    """Where the model is. Raises EoraLabError on windows that predict nothing."""
    tokens = as_tokens(model, token_windows, "windows")
    if tokens.shape[1] < 2:
        raise EoraLabError(f"perplexity needs (n, seqlen >= 2) tokens, not {tuple(tokens.shape)}")
    return tokens.to(next(model.parameters()).device)


def _losses(model: nn.Module, tokens: Int[Tensor, "n seqlen"], progress: bool) -> Iterator[Float[Tensor, " predicted"]]:
    """Of the tokens of every window, one by one. Raises EoraLabError where they are not finite."""
    if not len(tokens):
        return
    rest = _rest(model, tokens)
    made = _whole(model, tokens, progress) if rest is None else by_block(model, tokens, rest, progress)
    for window, logits in zip(tokens, made, strict=True):
        losses = F.cross_entropy(logits[:-1].float(), window[1:], reduction="none").double().cpu()
        if not losses.isfinite().all():
            raise EoraLabError("the model's logits are not finite")
        yield losses


def _rest(model: nn.Module, tokens: Int[Tensor, "n seqlen"]) -> dict[str, tuple | list] | None:
    """What blocks return beside hidden states; None for a model that is to run as it is, or cannot be walked."""
    free = free_memory(tokens.device)
    try:
        if compensated(model):
            with as_stored(model):
                rest = returned(model, tokens)
            return rest if _walks(model, tokens, rest) else None
        if free is not None and sum(p.nbytes for p in model.parameters()) > free:
            return check_blocks(model, tokens).rest
    except EoraLabError:  # such as of a task head around the decoder
        pass
    return None


def _walks(model: nn.Module, tokens: Int[Tensor, "n seqlen"], rest: Mapping[str, tuple | list]) -> bool:
    """Whether the blocks one by one give the logits of the model: of two sequences, for one may leave the other what it
    did not see, and not only of that which `rest` comes from."""
    window = tokens[-1:, :TOKENS]
    probe = torch.cat([window.flip(1), window])
    with in_one_line(f"{type(model).__name__} cannot be run block by block"):
        found = list(by_block(model, probe, rest))
    allowed = max(1e-4, ROUNDING * torch.finfo(found[0].dtype).eps)
    with as_stored(model):
        wanted = [model(one[None], use_cache=False).logits[0] for one in probe]
    return all(relative_error(one, other) <= allowed for one, other in zip(found, wanted, strict=True))


def _whole(
    model: nn.Module, tokens: Int[Tensor, "n seqlen"], progress: bool
) -> Iterator[Float[Tensor, "seqlen vocabulary"]]:
    """The logits of every window, the model run as it is."""
    with unpacked(model):
        for window in each(tokens, "perplexity", "window", progress):
            yield model(window[None], use_cache=False).logits[0]


def by_block(
    model: nn.Module, tokens: Int[Tensor, "n seqlen"], rest: Mapping[str, tuple | list], progress: bool = False
) -> Iterator[Float[Tensor, "seqlen vocabulary"]]:
    """The logits of every window, walked through the model block by block. rest: see `Contract`."""
    blocks = decoder_blocks(model)
    for part in tokens.split(max(TOGETHER // tokens.shape[1], 1)):
        calls = BlockCalls(model, blocks, rest)
        with torch.no_grad():
            hidden = [calls.enter(window[None]) for window in part]
            for name, block in each(blocks.items(), "perplexity", "block", progress):
                with unpacked(block):
                    hidden = [calls.run(i, name, states) for i, states in enumerate(hidden)]
        for window, states in zip(part, hidden, strict=True):
            with torch.no_grad():
                logits = calls.leave(window[None], states)[0]
            yield logits
