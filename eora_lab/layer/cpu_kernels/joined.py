"""Products of a few rows of x. Layers that are handed the same x compute in one call."""

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.layer.cpu_kernels.packed import BLOCK, LANES, PackedGrid
from eora_lab.layer.cpu_kernels.team import Call, run


class FewRows:
    """x -> W^ x + B (A x) + bias of one layer in float32, for x in float32, bfloat16 or float16; y has the dtype of x.

    Layers that are handed the same tensor, as q, k and v are, are noticed: from the next time on the first computes for
    all of them, and the others find their y made. They take it if it is of this very tensor, and nobody wrote to that
    since; else they compute. One that did not come for its y is never computed for again.

    function: the kernel. call: what it is told of the layer, of weight and tensors, whose addresses it has.
    """

    def __init__(self, function: int, call: Call, weight: PackedGrid, tensors: dict[str, Tensor]):
        self.function, self.call, self.weight, self._tensors = function, call, weight, tensors
        self._together: tuple[tuple[FewRows, ...], _OneCall] = (), _OneCall([self])  # the others that it computes for
        self._given: dict[int, _Given] = {}  # id of x -> y
        self._apart = False

    def __call__(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if x.dtype is torch.float16:
            return self(x.float()).half()
        given = self._given.pop(id(x), None)
        if given is not None and given.is_of(x):
            return given.y
        if any(one._given for one in self._together[0]):
            self._part()
        others, call = self._together
        y, *more = call(x)
        if others:
            state = x.clone() if x.is_inference() else x._version
            for one, its in zip(others, more, strict=True):
                one._given[id(x)] = _Given(weakref.ref(x), state, its)
        self._notice(x)
        return y

    def _notice(self, x: Tensor) -> None:
        """If another layer was handed x before, it will compute for this one from the next time on."""
        handed = _thread.handed
        first = handed[1]() if handed is not None and handed[0]() is x else None
        if first is None:
            _thread.handed = weakref.ref(x), weakref.ref(self)
        elif first is not self and not self._apart:
            alike = first.function == self.function and torch.equal(first.weight.place, self.weight.place)
            self._apart = not alike
            if alike:
                first._compute_for([*first._together[0], self])

    def _part(self) -> None:
        """Compute no longer for those that did not come for their y."""
        for one in self._together[0]:
            one._apart = one._apart or bool(one._given)
            one._given.clear()
        self._compute_for([one for one in self._together[0] if not one._apart])

    def _compute_for(self, others: "list[FewRows]") -> None:
        self._together = tuple(others), _OneCall([self, *others])


class _Given(NamedTuple):
    """The y of an x, and what x was: how often it had been written to, or its numbers where nobody counts that."""

    x: weakref.ReferenceType[Tensor]
    state: int | Tensor
    y: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether it is of this very tensor (..., in), as that is now."""
        if self.x() is not x:
            return False
        return torch.equal(self.state, x) if isinstance(self.state, Tensor) else self.state == x._version


class _Thread(threading.local):
    """The x that layers were handed last in a thread, and the first of them."""

    handed: tuple[weakref.ReferenceType[Tensor], weakref.ReferenceType[FewRows]] | None = None


_thread = _Thread()


class _OneCall:
    """x -> y of every layer; they share a kernel and the order that it wants of x. It does not hold the layers."""

    def __init__(self, layers: Sequence[FewRows]):
        first = layers[0]
        self._function, self._features = first.function, first.call.features
        self._outputs = [one.call.outputs for one in layers]
        self._calls = (Call * len(layers))(*(one.call for one in layers))
        ranks = 0
        for call in self._calls:
            call.count, call.ranks_before = len(layers), ranks
            ranks += call.rank
        self._scratch = len(first.weight.place) + first.call.blocks * LANES + ranks  # numbers for a row of x

    def __call__(self, x: Float[Tensor, "... in"]) -> list[Float[Tensor, "... _"]]:
        rows, shape = x.numel() // self._features, x.shape[:-1]
        found = [x.new_empty(*shape, outputs) for outputs in self._outputs]
        if not rows:
            return found
        padded = 1 if rows == 1 else -(-rows // BLOCK) * BLOCK
        x, scratch, half = x.contiguous(), torch.empty(padded * self._scratch), x.dtype is torch.bfloat16
        calls = type(self._calls).from_buffer_copy(self._calls)
        for call, y in zip(calls, found, strict=True):
            call.x, call.y, call.scratch = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
            call.rows, call.padded, call.half = rows, padded, half
        run(self._function, calls[0])
        return found
