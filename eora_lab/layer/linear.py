"""A linear layer that holds its compressed weight packed, and the low-rank path beside it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.compensate.factors import FACTORS, StoredFactors
from eora_lab.compress import Compressed
from eora_lab.compress.storage import UNCOUNTED, tagged_state_dict, weight_from_state_dict
from eora_lab.errors import EoraLabError
from eora_lab.layer.backends import AUTO, BACKENDS, KEPT, PackedLayer, Product, check_backend, choose
from eora_lab.layer.row_paths import RowPaths


class CompensatedLinear(PackedLayer):
    """y = W^ x + B (A x) + bias, in place of an `nn.Linear` whose bias, dtype and device it keeps.

    The buffers of W^ are the packed tensors that a file holds (`Compressed.state_dict`); the product unpacks some rows
    at a time, and again for gradients, so that W^ is never held dense.

    factors: A and B as stored. lora_A: (rank, in_features); lora_B: (out_features, rank). Rank 0: no path.
    backend: who multiplies, a name of `eora_lab.layer.backends.BACKENDS`; "auto": the first that takes the layer.
    state: the packed tensors of W^ where they are there already, such as in a mapped file; None: they are made.
    """

    def __init__(
        self,
        old: nn.Linear,
        compressed: Compressed,
        factors: StoredFactors,
        backend: str = AUTO,
        state: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        check_backend(backend)
        self.backend, self.keep_dense = backend, False
        self.row_paths: RowPaths | None = None
        self.transposed = getattr(old, "transposed", False)  # as files hold the original (`Conv1DLinear`)
        self.out_features, self.in_features = compressed.shape
        self.bits, self.factors = compressed.bits, factors
        state = tagged_state_dict(compressed) if state is None else dict(state)
        device, dtype = old.weight.device, old.weight.dtype
        whole = ("kind", *compressed.whole)
        self.whole = {name: state.pop(name) for name in whole if name in state}  # stays on the CPU
        self._kind, self._packed = type(compressed), tuple(state)
        for name, tensor in state.items():
            self.register_buffer(name, tensor.to(device))
        for name, tensor in zip(("lora_A", "lora_B"), factors.dense(), strict=True):
            self.register_buffer(name, tensor.to(device, dtype))
        self.register_buffer("bias", old.bias)
        self._forget()

    def _forget(self, weight: bool = True) -> None:
        """What was made for products is out of date: of all buffers, or of the path alone."""
        self._products: dict[str, Product] = {}
        self._chosen: dict[tuple, str] = {}
        if weight:
            self.made: dict[str, Any] = {}
            self._sample: Compressed | None = None
        self._held = list(self._buffers.values())  # so that no other buffer gets their ids
        self._counted = [one for one in self._held if one is not None and not one.is_inference()]
        self._writes = [one._version for one in self._counted]

    def _is_as_made(self) -> bool:
        """Whether nobody wrote to a buffer, or put another in its place, since products were made.

        Tensors that are made in inference mode do not count how often they are written to.
        """
        same = all(map(is_, self._buffers.values(), self._held))
        return same and [one._version for one in self._counted] == self._writes

    def set_factors(self, factors: StoredFactors) -> None:
        """Put another low-rank path beside the same compressed weight. Of rank 0: none."""
        A, B = factors.dense()
        self.factors, self.lora_A, self.lora_B = factors, A.to(self.lora_A), B.to(self.lora_B)
        self._forget(weight=False)

    def set_row_paths(self, paths: RowPaths | None) -> None:
        """Give the texts of the next batches a low-rank path each, while the layer has none (rank 0); None: no more."""
        self.row_paths = paths
        self._forget(weight=False)

    def rest(self) -> None:
        """Let the packed tensors wait in the memory of the host; `rows` still gives them on the layer's device."""
        for name in self._packed:
            setattr(self, name, getattr(self, name).cpu())

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Of the low-rank path; 0: there is none."""
        return self.lora_A.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes as stored: packed weight and factors. The bias is not counted; it is never compressed."""
        packed = sum(tensor.nbytes for name, tensor in self.stored_weight().items() if name not in UNCOUNTED)
        return packed + self.factors.nbytes

    @property
    def compressed(self) -> Compressed:
        """W^, unpacked."""
        return self.rows(0, self.out_features)

    @property
    def sample(self) -> Compressed:
        """The first row of W^: its kind of storage, bits and groups."""
        if self._sample is None:
            self._sample = self.rows(0, 1)
        return self._sample

    def rows(self, start: int, stop: int) -> Compressed:
        """Some rows of W^, unpacked."""
        packed = {name: getattr(self, name)[start:stop].to(self.lora_A.device) for name in self._packed}
        return self._kind.from_state_dict(packed | self.whole)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
        """W^ as the matrix product sees it, by default in the dtype of the layer."""
        return self.compressed.dense(dtype or self.lora_A.dtype)

    def stored_weight(self) -> dict[str, Tensor]:
        """What a file must hold of W^."""
        return {name: getattr(self, name) for name in self._packed} | self.whole

    def stored(self) -> dict[str, Tensor]:
        """All that a file must hold."""
        return self.stored_weight() | self.factors.state_dict()

    @classmethod
    def from_stored(cls, tensors: dict[str, Tensor], old: nn.Linear, backend: str = AUTO) -> "CompensatedLinear":
        """The inverse of `stored`. Raises KeyError when a tensor is missing or of another shape."""
        compressed = weight_from_state_dict(tensors)
        if compressed.shape != old.weight.shape:
            raise KeyError(f"a weight of {tuple(compressed.shape)} for a layer of {tuple(old.weight.shape)}")
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(FACTORS)}
        return cls(old, compressed, StoredFactors.from_state_dict(tensors), backend, state)

    def _apply(self, fn, recurse=True):
        """Move or cast the layer: the packed tensors follow to another device, and keep their dtypes."""
        packed = {name: getattr(self, name) for name in self._packed}
        super()._apply(fn, recurse)
        for name, tensor in packed.items():
            setattr(self, name, tensor.to(self.lora_A.device))
        self._forget()
        return self

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Raises EoraLabError when a backend is asked for that does not take this layer."""
        if not self._is_as_made():
            self._forget()
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, self.lora_A, self.lora_B))
        rows = max(x.numel() // self.in_features, 1)
        key = (x.dtype, gradients, (rows - 1).bit_length(), self.backend, self.keep_dense)
        name = self._chosen.get(key)
        if name is None:
            name = self._chosen[key] = self._choose(x, gradients)
        y = self._products[name](self, x)
        return y if self.row_paths is None or BACKENDS[name].by_row else self.row_paths.add(y, x)

    def _choose(self, x: Tensor, gradients: bool) -> str:
        one = choose(self, x, gradients, self.backend)
        if one.name not in self._products:
            self._products[one.name] = one.prepare(self)
        return one.name

    def backend_for(self, rows: int) -> str:
        """Who multiplies so many rows of x, where no gradients are wanted."""
        return choose(self, self.lora_A.new_empty(rows, self.in_features), False, self.backend).name

    def __getstate__(self) -> dict:
        """A copy makes its own products."""
        return self.__dict__ | {
            "_products": {},
            "_chosen": {},
            "made": {},
            "_sample": None,
            "_held": [None],
            "_counted": [],
        }

    def extra_repr(self) -> str:
        """What torch prints of the layer."""
        who = self.backend_for(1) if self.backend == AUTO else self.backend
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, rank={self.rank}, backend={who}"


def compensated(model: nn.Module) -> dict[str, CompensatedLinear]:
    """Module name -> compensated layer of a model; empty when there is none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompensatedLinear)}


def backends_in_use(model: nn.Module, rows: int = 1) -> dict[str, int]:
    """Backend -> how many layers of the model it computes, for so many rows of x and without gradients."""
    return dict(Counter(layer.backend_for(rows) for layer in compensated(model).values()))


def use_backend(model: nn.Module, name: str) -> None:
    """Let one backend compute every compensated layer of a model, or each the first that takes it (AUTO).

    Raises EoraLabError for an unknown name, a model without such layers, and one that the backend does not take.
    """
    check_backend(name)
    layers = compensated(model)
    if not layers and name != AUTO:
        raise EoraLabError(f"the {name} backend computes compressed layers, and this model has none")
    for one in layers.values():
        one.backend = name
    backends_in_use(model)


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Keep nothing beside W^ as it is stored within this context: what makes few rows fast is a second copy of it.

    Layers on a GPU, where the fast form is the only one, and those with a backend of their own go on as they are.
    """
    layers = [one for one in compensated(model).values() if one.backend == AUTO and one.lora_A.device.type == "cpu"]
    for layer in layers:
        layer.backend = "tiles"
    try:
        yield
    finally:
        for layer in layers:
            layer.backend = AUTO


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep W^ of every `CompensatedLinear` dense within this context: for the many products of a measurement.

    It costs the memory of the dense weights, and saves unpacking them for every batch.
    """
    layers = [one for one in compensated(model).values() if one.backend in (AUTO, *KEPT)]
    for layer in layers:
        layer.keep_dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.keep_dense = False
            for name in KEPT:
                layer._products.pop(name, None)
            layer._chosen.clear()
