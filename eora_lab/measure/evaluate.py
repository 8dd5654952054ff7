"""Measure a model on token windows: the loss of each, and the perplexity of all."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import unpacked
from eora_lab.text.batches import Batches, as_tokens


def perplexity(model: nn.Module, token_windows: Batches, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens, each window on its own.

    token_windows: token ids (n, seqlen): a tensor, an array, or a list of windows.
    A window of seqlen tokens predicts seqlen - 1 of them. Raises EoraLabError on windows shorter than two tokens, on
    tokens that the model cannot take (see `check_tokens`), and when its logits are not finite.
    """
    return window_losses(model, token_windows, progress).mean().exp().item()


@torch.no_grad()
def window_losses(model: nn.Module, token_windows: Batches, progress: bool = False) -> Float[Tensor, " n"]:
    """Mean negative log-likelihood a token (nats) of every window, float64. Perplexity is the exp of their mean.

    Raises EoraLabError as `perplexity` does.
    """
    from tqdm.auto import tqdm

    tokens = as_tokens(model, token_windows, "windows")
    if tokens.shape[1] < 2:
        raise EoraLabError(f"perplexity needs (n, seqlen >= 2) tokens, not {tuple(tokens.shape)}")
    device = next(model.parameters()).device
    windows = tqdm(tokens.to(device), desc="perplexity", unit="window", disable=not progress, leave=False)
    losses = []
    with unpacked(model):
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1]  # (seqlen - 1, vocabulary)
            losses.append(F.cross_entropy(logits.float(), window[1:], reduction="sum").item() / (len(window) - 1))
    found = torch.tensor(losses, dtype=torch.float64)
    if not torch.isfinite(found).all():
        raise EoraLabError("the model's logits are not finite")
    return found
