"""A compiled function on torch's own threads: two OpenMP libraries in a process would wait for each other's."""

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

FIELDS = (
    "x y scratch place codes last scales offsets A B factor bias"  # addresses
    " first rows padded half threads features outputs safe code_stride last_stride grid_stride"
    " blocks steps rank half_path"
    " count ranks_before"  # layers that share x, as the first of them says; ranks of those before
)


class Call(ctypes.Structure):
    """What the kernel is told. `kernel.py` reads it by these names."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS.split()]


def libraries() -> Iterator[str]:
    """The OpenMP library that torch brings, else those that the process has loaded."""
    yield from map(str, (Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.rpartition("/")[2]}
        yield from sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


SYMBOLS = {"barrier": "GOMP_barrier", "thread_number": "omp_get_thread_num", "thread_count": "omp_get_num_threads"}


@lru_cache
def openmp() -> ctypes.CDLL | None:
    """The library whose threads torch uses, where it speaks GCC's interface; its functions get names for the kernel."""
    from llvmlite import binding

    for path in libraries():
        try:
            library = ctypes.CDLL(path)
            functions = {name: getattr(library, symbol) for name, symbol in SYMBOLS.items()}
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        break
    else:
        library, functions = None, dict.fromkeys(SYMBOLS, ctypes.pythonapi.Py_IsInitialized)  # one thread calls none
    for name, function in functions.items():
        binding.add_symbol(f"eora_lab_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return library


@lru_cache
def entry(function: int) -> Callable[[int], None]:
    """Compiled code as Python calls it."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


def run(function: int, call: Call) -> None:
    """Call compiled code on torch's threads, or on one where they cannot be had."""
    library = openmp()
    call.threads = torch.get_num_threads() if library else 1
    if library and call.threads > 1:
        library.GOMP_parallel(function, ctypes.addressof(call), call.threads, 0)
    else:
        entry(function)(ctypes.addressof(call))
