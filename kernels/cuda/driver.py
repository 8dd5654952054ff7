"""Load a cubin and launch its kernels through CUDA's driver interface, by ctypes, on torch's context and stream."""

import ctypes

import torch
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels import FusedWeight
from kernels.cuda.build import build

Argument = Tensor | int | None


class Module:
    """The kernels of a cubin on the current device."""

    def __init__(self, cubin: bytes):
        torch.cuda.init()
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        self.driver, self.handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(self.handle), cubin)

    def call(self, name: str, *arguments) -> None:
        if code := getattr(self.driver, name)(*arguments):
            raise EoraLabError(f"{name} failed with CUDA error {code}")

    def launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Argument) -> None:
        """Tensors go as pointers, None as a null pointer, integers in 32 bits."""
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.handle, name.encode())
        values = [
            ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", function, *grid, 1, threads, 1, 1, 0, stream, pointers, None)


def fused(x: Tensor, weight: FusedWeight) -> Tensor:
    """y (M, out) by `fused.cu`, for one unmerged layer with groups. Raises EoraLabError where nvcc is missing."""
    if not weight.group or len(weight.out_features) > 1 or weight.order is not None:
        raise EoraLabError("the CUDA kernel takes one layer with groups in order; merge and reorder outside of it")
    dtype = str(x.dtype).removeprefix("torch.")
    major, minor = torch.cuda.get_device_capability(x.device)
    with torch.cuda.device_of(x):
        return _fused(x, weight, dtype, 10 * major + minor)


def _fused(x: Tensor, weight: FusedWeight, dtype: str, capability: int) -> Tensor:
    module = Module(build(weight.bits, weight.group, dtype, capability).cubin)
    (M, K), R, (N,), NP = x.shape, weight.A.shape[1], weight.out_features, weight.planes.shape[1]
    scales, offsets = weight.scales.float(), weight.offsets.float()
    if weight.offsets.dtype == torch.uint8:
        offsets = -offsets * scales
    x, y, xa = x.contiguous(), x.new_empty(M, N), torch.empty(M, R, device=x.device)
    if R:
        module.launch("down", (R, M), 128, x, weight.A, xa, K, R)
    operands = x, weight.planes, scales, offsets, xa, weight.Bt, weight.bias, y
    module.launch("fused", (NP // 64, M), 256, *operands, K, N, NP, R)
    torch.cuda.current_stream().synchronize()  # the operands must live until here
    return y
