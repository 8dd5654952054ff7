"""A compiled function on torch's own threads: two OpenMP libraries in a process would wait for each other's."""

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

FIELDS = (
    "x y scratch place codes last scales offsets A B factor bias"  # addresses
    " first rows padded half threads features outputs safe code_stride last_stride grid_stride"
    " blocks steps rank half_path"
)


class Call(ctypes.Structure):
    """What the kernel is told. `whole` in kernel.py reads it."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS.split()]


def libraries() -> Iterator[str]:
    """The OpenMP library that torch brings, else those that the process has loaded."""
    yield from map(str, (Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.rpartition("/")[2]}
        yield from sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))


@lru_cache
def openmp() -> ctypes.CDLL | None:
    """The library whose threads torch uses, where it speaks GCC's interface; its functions get names for the kernel."""
    from llvmlite import binding

    for path in libraries():
        try:
            library = ctypes.CDLL(path)
            names = {"eora_lab_barrier": library.GOMP_barrier, "eora_lab_thread_number": library.omp_get_thread_num}
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        for name, function in names.items():
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        return library
    alone = ctypes.pythonapi.Py_IsInitialized  # never called: one thread needs neither
    for name in ("eora_lab_barrier", "eora_lab_thread_number"):
        binding.add_symbol(name, ctypes.cast(alone, ctypes.c_void_p).value)
    return None


def run(function: int, call: Call) -> None:
    """Call compiled code on torch's threads, or on one where they cannot be had."""
    library = openmp()
    call.threads = torch.get_num_threads() if library else 1
    if library:
        library.GOMP_parallel(function, ctypes.addressof(call), call.threads, 0)
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(ctypes.addressof(call))
