"""The product of a whole layer by the kernel, as a function of x."""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eora_lab.layer.cpu_kernels.packed import LANES, PackedGrid
from eora_lab.layer.cpu_kernels.team import Call, openmp


def cpu_product(
    weight: PackedGrid, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], bias: Float[Tensor, " out"] | None
) -> Callable[[Float[Tensor, "... in"]], Float[Tensor, "... out"]]:
    """x -> W^ x + B (A x) + bias in float32, for x in float32, bfloat16 or float16; y has the dtype of x."""
    library = openmp()
    from eora_lab.layer.cpu_kernels.kernel import BLOCK, kernel

    function = kernel(weight.bits, weight.groups).address
    out_features, in_features = len(weight.codes), A.shape[1]
    rank = -(-len(A) // LANES) * LANES
    inside = (weight.place >= 0)[None]
    A = F.pad(A.float()[:, weight.place.clamp(min=0)] * inside, (0, 0, 0, rank - len(A)))
    B = F.pad(B.float(), (0, rank - B.shape[1])).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    length, sums = len(weight.place), weight.blocks * LANES
    fixed = Call(
        place=weight.place.data_ptr(),
        codes=weight.codes.data_ptr(),
        last=weight.last.data_ptr(),
        scales=weight.scales.data_ptr(),
        offsets=weight.offsets.data_ptr(),
        A=A.data_ptr(),
        B=B.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        outputs=out_features,
        safe=out_features - len(weight.last),
        code_stride=weight.codes.shape[1],
        last_stride=weight.last.shape[1],
        grid_stride=weight.scales.shape[1],
        blocks=weight.blocks,
        steps=weight.steps,
        rank=rank,
    )
    held = weight, A, B, bias  # what the addresses point to

    def product(x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return product(x.float()).to(x.dtype)
        rows = x.numel() // in_features
        y = x.new_empty(*x.shape[:-1], out_features)
        if not rows:
            return y
        x = x.reshape(rows, in_features).contiguous()
        padded = 1 if rows == 1 else -(-rows // BLOCK) * BLOCK
        scratch = torch.empty(padded * (length + sums + rank))
        call = Call.from_buffer_copy(fixed)
        call.x, call.y, call.rows, call.padded, call.x_stride = x.data_ptr(), y.data_ptr(), rows, padded, in_features
        call.half = x.dtype == torch.bfloat16
        call.ordered = scratch.data_ptr()
        call.totals = call.ordered + 4 * padded * length
        call.down = call.totals + 4 * padded * sums
        call.threads = torch.get_num_threads() if library else 1
        if library:
            library.GOMP_parallel(function, ctypes.addressof(call), call.threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(ctypes.addressof(call))
        return y

    product.held = held  # type: ignore[attr-defined]
    return product
