"""What each attention head gives, before the output projection mixes them.

Heads are known by what runs, not by names: the product of attention probabilities and values is a tensor with a
dimension of heads, and a linear that is handed these numbers, head after head, is the output projection. So it is where
it is handed a share of each (gated attention).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eora_lab.calibrate.contract import in_one_line
from eora_lab.calibrate.stream import hooked
from eora_lab.errors import EoraLabError
from eora_lab.measure.residual_stream import one_window
from eora_lab.model.structure import decoder_blocks
from eora_lab.products import fast_products

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)  # where attention is written out

Heads = dict[str, Float[Tensor, "seqlen heads head_dim"]]


class _Attention(TorchFunctionMode):
    """Within this context `latest` is what attention gave for a text of `seqlen` tokens: (heads, seqlen, head_dim)."""

    def __init__(self, seqlen: int):
        super().__init__()
        self.seqlen, self.latest = seqlen, torch.empty(0)

    def __torch_function__(self, func: Callable, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention or (func in PRODUCTS and self._attends(args[0])):
            self.latest = result.reshape(-1, *result.shape[-2:])  # of one text, a batch of one
        return result

    def _attends(self, left: Float[Tensor, "..."]) -> bool:
        """Whether the left side of a product may be attention probabilities."""
        return left.shape[-2:] == (self.seqlen, self.seqlen) and bool((left >= 0).all())

    def split(self, x: Float[Tensor, "..."]) -> Float[Tensor, "seqlen heads head_dim"] | None:
        """The input of a linear by heads, where each number is what attention gave, or a share of it."""
        if self.latest.numel() != x.numel():
            return None
        whole = self.latest.transpose(0, 1)
        heads = x.reshape(whole.shape)
        return heads if ((heads * whole >= 0) & (heads.abs() <= whole.abs())).all() else None


@fast_products()
@torch.no_grad()
def head_outputs(model: nn.Module, window: Any) -> Heads:
    """What each attention head gives, for one text: name of the output projection -> (seqlen, heads, head_dim).

    window: token ids (seqlen,). Blocks whose projection is handed anything else, such as the states of a recurrence or
    normed heads, are left out. Raises EoraLabError where no block is left, and for tokens that the model cannot take.
    """
    tokens = one_window(model, window)
    found: Heads = {}
    with _Attention(tokens.shape[1]) as attention:

        def note(name: str) -> Callable:
            def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
                heads = attention.split(args[0])
                if heads is not None:
                    found[name] = heads.clone()

            return hook

        with hooked(_linears(model), note), in_one_line(f"{type(model).__name__} does not run on these tokens alone"):
            model(tokens, use_cache=False)
    if not found:
        raise EoraLabError(
            f"the heads of {type(model).__name__} are not known: in no block is a linear handed what attention gives, "
            "head after head"
        )
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> linear of any block, or what stands in its place once it is compressed."""
    return {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }


def head_errors(dense: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " heads"]]:
    """|z' - z| / |z| of every head over all tokens of a text; name of the output projection -> errors, float64.

    dense, other: what `head_outputs` found, z of (seqlen, heads, head_dim).
    Raises EoraLabError when they are of texts of two lengths, or of models with other heads.
    """
    if [(name, z.shape) for name, z in dense.items()] != [(name, z.shape) for name, z in other.items()]:
        raise EoraLabError("heads of two models or of two texts cannot be compared: run both on one window")
    errors = {}
    for name, heads in dense.items():
        z, changed = heads.double(), other[name].double()
        errors[name] = ((changed - z).norm(dim=(0, 2)) / z.norm(dim=(0, 2))).cpu()
    return errors
