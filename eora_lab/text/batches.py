"""The door for token batches: whatever a caller has them in, they go on as one tensor of whole numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.errors import EoraLabError, one_line
from eora_lab.model.limits import check_tokens

Batches = Any  # token ids (nsamples, seqlen): a tensor on any device, an array, or a list of sequences of one length


def as_tokens(model: nn.Module, batches: Batches, what: str = "batches") -> Int[Tensor, "nsamples seqlen"]:
    """Token ids as a tensor of int64, on the device where they are.

    what: their name in messages.
    Raises EoraLabError when they are anything else, or not for this model.
    """
    first = batches[0] if isinstance(batches, list | tuple) and batches else batches
    if isinstance(first, Mapping):
        raise EoraLabError(f'{what} must be token ids alone: take "input_ids" out of the {type(first).__name__}')
    try:
        if isinstance(batches, Tensor):
            tokens = batches
        elif isinstance(first, Tensor):
            tokens = torch.stack(list(batches))
        else:
            array = np.asarray(batches)
            tokens = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    except (ValueError, TypeError, RuntimeError) as error:  # of several lengths, or no numbers
        raise EoraLabError(f"{what} must be token ids, sequences of one length: {one_line(error)}") from error
    if tokens.ndim != 2 or not tokens.numel():
        raise EoraLabError(f"{what} must be token ids of shape (nsamples, seqlen), not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise EoraLabError(f"{what} must be token ids, which are whole numbers, not {tokens.dtype}")
    tokens = tokens.long()
    check_tokens(model, tokens)
    return tokens
