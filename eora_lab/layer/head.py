"""The head of a model, which stays dense: its product with a few rows on a CPU, at the speed of reading W."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.layer.backends import CPU_ROWS
from eora_lab.layer.cpu_kernels import FewRows, few_rows, pack_dense, why_not_dense


class FewRowsLinear(nn.Linear):
    """In the place of an `nn.Linear`, whose parameters it shares. Of few rows it makes the product by the kernel for
    CPUs, in float32 sums; torch's own takes twice as long as reading W does, and computes all else.
    """

    def __init__(self, old: nn.Linear):
        super().__init__(old.in_features, old.out_features, device="meta")
        self.weight, self.bias = old.weight, old.bias
        self.train(old.training)
        self._made: tuple[object, FewRows] | None = None

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """W x + bias."""
        W = self.weight
        gradients = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
        few = x.numel() <= CPU_ROWS * self.in_features and x.dtype == W.dtype and self.bias is None
        if gradients or not few or why_not_dense(W):
            return super().forward(x)
        where = W.data_ptr(), W.dtype, W.shape  # the kernel reads what lies there now
        if self._made is None or self._made[0] != where:
            self._made = where, few_rows(pack_dense(W), W[:0], W[:, :0], None)
        return self._made[1](x)

    def __getstate__(self) -> dict:
        """A copy has its weight elsewhere."""
        return self.__dict__ | {"_made": None}


def quicken_head(model: nn.Module) -> None:
    """Make a model's head a `FewRowsLinear`, if it is a plain linear layer and numba is installed."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    for name, module in list(model.named_modules()):
        if module is head and type(module) is nn.Linear and find_spec("numba"):
            model.set_submodule(name, FewRowsLinear(module))
