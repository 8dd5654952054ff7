"""GPT-2's Conv1D, a linear whose weight is held as (in, out), becomes an `nn.Linear`; files keep the layout."""

from typing import Any

from torch import nn


class Conv1DLinear(nn.Linear):
    """In the place of a Conv1D: it shares its tensors, and its state dict has the weight as (in, out)."""

    transposed = True  # as files hold it

    def __init__(self, conv: Any):
        super().__init__(conv.nx, conv.nf, device="meta")
        # a view, so that the product is the very one that Conv1D makes
        self.weight = nn.Parameter(conv.weight.detach().T, requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        self.train(conv.training)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T

    def _load_from_state_dict(self, state_dict, prefix, *others):
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T}
        super()._load_from_state_dict(state_dict, prefix, *others)


def unfold_conv1d(model: nn.Module) -> None:
    """Put an `nn.Linear` in the place of every Conv1D of transformers, in place; on the meta device too."""
    from transformers.pytorch_utils import Conv1D

    made: dict[nn.Module, Conv1DLinear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Conv1D):
            model.set_submodule(name, made.setdefault(module, Conv1DLinear(module)))
