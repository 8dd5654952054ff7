"""Measure a model: perplexity of token windows."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.errors import EoraLabError


@torch.no_grad()
def perplexity(model: nn.Module, token_windows: Int[Tensor, "n seqlen"], progress: bool = False) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens, each window on its own.

    A window of seqlen tokens predicts seqlen - 1 of them. Raises EoraLabError on windows shorter than two tokens and
    when the model's logits are not finite.
    """
    from tqdm.auto import tqdm

    if token_windows.ndim != 2 or token_windows.shape[0] < 1 or token_windows.shape[1] < 2:
        raise EoraLabError(f"perplexity needs (n, seqlen >= 2) tokens, not {tuple(token_windows.shape)}")
    device = next(model.parameters()).device
    total = 0.0
    for window in tqdm(token_windows.to(device), desc="perplexity", unit="window", disable=not progress, leave=False):
        logits = model(window[None], use_cache=False).logits[0, :-1]  # (seqlen - 1, vocabulary)
        total += F.cross_entropy(logits.float(), window[1:], reduction="sum").item()
    mean = torch.tensor(total / (token_windows.shape[0] * (token_windows.shape[1] - 1)), dtype=torch.float64)
    if not torch.isfinite(mean):
        raise EoraLabError("the model's logits are not finite")
    return mean.exp().item()
