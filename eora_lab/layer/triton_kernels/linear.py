"""The fused product as a module."""

from collections.abc import Sequence

from jaxtyping import Float, Int32
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.op import fused_linear
from eora_lab.layer.triton_kernels.repack import TENSORS, FusedWeight, Path


class FusedLinear(nn.Module):
    """y = W^ x + B (A x) + bias from a `FusedWeight`, by Triton on a GPU and by torch elsewhere.

    Gradients reach x alone, by torch, with W^ dense. Inf in a row of x makes all outputs of that row Inf or NaN.
    """

    def __init__(self, weight: FusedWeight):
        super().__init__()
        self._set(weight)

    def _set(self, weight: FusedWeight) -> None:
        self.numbers = weight.numbers()
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @property
    def weight(self) -> FusedWeight:
        """What it was made from, on the device where it is."""
        return FusedWeight(*(getattr(self, name) for name in TENSORS), **self.numbers)

    def set_paths(self, paths: Sequence[Path]) -> None:
        """Other low-rank paths (A, B) beside the same packed weight. Raises EoraLabError as `with_paths`."""
        self._set(self.weight.with_paths(paths))

    def _apply(self, fn, recurse: bool = True) -> "FusedLinear":
        """Follow to another device, but keep every dtype: scales stay as they were stored."""
        for name in TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(fn(tensor[:0]).device))
        return self

    def forward(
        self, x: Float[Tensor, "... in"], ids: Int32[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "... out"]:
        """ids: the path of each row of x, -1 for none; by default all have the first.

        Raises EoraLabError when x is not of the dtype that the layer was packed for, or of another width.
        """
        tensors = self._buffers  # attributes of a module are slow to find
        if x.dtype != (dtype := self.A.dtype):
            raise EoraLabError(f"the layer is packed for {dtype}, and x is {x.dtype}; pack it for that dtype")
        return fused_linear(x, ids, *[tensors[name] for name in TENSORS], *self.numbers.values())

    def split(self, y: Float[Tensor, "... out"]) -> tuple[Float[Tensor, "... _"], ...]:
        """The outputs of the layers that were merged."""
        return y.split(self.numbers["out_features"], -1)
