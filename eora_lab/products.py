"""Products of float32 matrices by oneDNN, on processors where torch's own library leaves half of the speed unused.

MKL, which torch calls, takes its AVX2 code on AMD's processors, whatever they can do; oneDNN, which torch brings too,
takes AVX-512. Both sum in float32.
"""

import platform
import warnings
from contextlib import ContextDecorator
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor

LEAST = 128  # rows, columns and terms of a product for which it pays: with 64 MKL is often ahead
COPIED = 1 << 23  # elements of the right side that oneDNN may hold once more, in an order of its own


class fast_products(ContextDecorator):
    """Within this context, or a function that it decorates: float32 products on the CPU by the faster library.

    It holds for the whole process, for `x @ y`, `linear` and what torch computes by them, gradients included. Nothing
    changes on other processors, for other types, and for few rows. May be entered again while it holds.
    """

    _lock, _depth = Lock(), 0
    _library: torch.library.Library | None = None

    def __enter__(self) -> "fast_products":
        with self._lock:
            if not fast_products._depth and helps():
                fast_products._library = torch.library.Library("aten", "IMPL")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that a kernel is replaced is what is wanted
                    for name, kernel in (("mm", _mm), ("addmm", _addmm), ("addmm_", _addmm_)):
                        fast_products._library.impl(name, kernel, "CPU")
            fast_products._depth += 1
        return self

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            fast_products._depth -= 1
            if not fast_products._depth and fast_products._library is not None:
                fast_products._library._destroy()
                fast_products._library = None


@lru_cache(maxsize=1)
def helps() -> bool:
    """Whether this is such a processor, and torch was built with oneDNN."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether a (m, k) times b (k, n) is a product that pays."""
    return a.dtype == b.dtype == torch.float32 and a.shape[1] == len(b) and min(*a.shape, b.shape[1]) >= LEAST


def _dense(a: Tensor) -> Tensor:
    """The matrix itself, or a copy where there is anything between its rows or columns: oneDNN is slow on those."""
    return a if a.is_contiguous() or a.T.is_contiguous() else a.contiguous()


def _product(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m n"]:
    """a b (+ bias), in parts of as many columns as may be copied."""
    linear = torch.ops.mkldnn._linear_pointwise.default
    a, weight, columns = _dense(a), b.T, max(COPIED // len(b), LEAST)
    if columns >= len(weight):
        return linear(a, _dense(weight), bias, "none", [], "")
    found = a.new_empty(len(a), len(weight))
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        found[:, part] = linear(a, _dense(weight[part]), None if bias is None else bias[part], "none", [], "")
    return found


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _fits(a, b):
        return _product(a, b)
    return torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: int | float = 1, alpha: int | float = 1) -> Tensor:
    if _fits(a, b) and c.dtype == a.dtype and c.shape == b.shape[1:] and beta == 1 and alpha == 1:
        return _product(a, b, c.contiguous())  # a linear with bias
    return torch.ops.aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: int | float = 1, alpha: int | float = 1) -> Tensor:
    if not _fits(a, b) or c.dtype != a.dtype or c.shape != (len(a), b.shape[1]):
        return torch.ops.aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=c)
    found = _product(a, b)  # before c changes, of which a or b may be a part
    c = c.mul_(beta) if beta else c.zero_()  # a beta of zero takes no NaN over
    return c.add_(found, alpha=alpha)
