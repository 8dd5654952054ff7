"""The product of a whole layer by the kernel, as a function of x."""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eora_lab.layer.cpu_kernels.packed import LANES, PackedGrid
from eora_lab.layer.cpu_kernels.team import Call, openmp

UNROLLED = (1, 2, 4)  # steps of a block, as the usual sizes of groups have them
FAINT = 2**-26  # of the largest number of a row: less than what its float32 sums are rounded by


def cpu_product(
    weight: PackedGrid, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], bias: Float[Tensor, " out"] | None
) -> Callable[[Float[Tensor, "... in"]], Float[Tensor, "... out"]]:
    """x -> W^ x + B (A x) + bias in float32, for x in float32, bfloat16 or float16; y has the dtype of x."""
    library = openmp()
    from eora_lab.layer.cpu_kernels.kernel import BLOCK, kernel

    function = kernel(weight.bits, weight.groups, weight.steps if weight.steps in UNROLLED else 0).address
    out_features, in_features = len(weight.codes), A.shape[1]
    A, B, factor = path(A.float(), B.float())
    rank = -(-len(A) // LANES) * LANES
    A = F.pad(A[:, weight.place.clamp(min=0)] * (weight.place >= 0), (0, 0, 0, rank - len(A)))
    B, factor = (F.pad(t, (0, rank - t.shape[-1])).contiguous() for t in (B, factor))
    bias = None if bias is None else bias.float().contiguous()
    numbers = len(weight.place) + weight.blocks * LANES + rank  # of scratch, for a row of x
    held = {"A": A, "B": B, "factor": factor} | ({} if bias is None else {"bias": bias})
    held |= {name: getattr(weight, name) for name in ("place", "codes", "last", "scales", "offsets")}
    fixed = Call(
        **{name: tensor.data_ptr() for name, tensor in held.items()},
        features=in_features,
        outputs=out_features,
        safe=out_features - len(weight.last),
        code_stride=weight.codes.shape[1],
        last_stride=weight.last.shape[1],
        grid_stride=weight.scales.shape[1],
        blocks=weight.blocks,
        steps=weight.steps,
        rank=rank,
        half_path=A.dtype == torch.float16,
    )

    def product(x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return product(x.float()).to(x.dtype)
        rows = x.numel() // in_features
        y = x.new_empty(*x.shape[:-1], out_features)
        if not rows:
            return y
        x = x.contiguous()
        padded = 1 if rows == 1 else -(-rows // BLOCK) * BLOCK
        scratch = torch.empty(padded * numbers)
        call = Call.from_buffer_copy(fixed)
        call.x, call.y, call.scratch, call.rows, call.padded = (
            x.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            rows,
            padded,
        )
        call.half = x.dtype is torch.bfloat16
        call.threads = torch.get_num_threads() if library else 1
        if library:
            library.GOMP_parallel(function, ctypes.addressof(call), call.threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(ctypes.addressof(call))
        return y

    product.held = held  # type: ignore[attr-defined]  # the addresses are theirs
    return product


def path(
    A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    """A', B' and f with B A = B' diag(f) A', f of powers of two: A' and B' in float16 where that loses nothing.

    It loses nothing of numbers that came from 16 bits, but what is faint in its row of A or column of B.
    """
    powers = []
    for largest in (A.abs().amax(1), B.abs().amax(0)):
        powers.append(torch.where(largest > 0, torch.exp2(15 - torch.frexp(largest).exponent), 1))
    A16, B16 = (A * powers[0][:, None]).half(), (B * powers[1]).half()
    for whole, half, power in ((A, A16, powers[0][:, None]), (B, B16, powers[1])):
        if not ((half.float() - whole * power).abs() <= FAINT * 2**15).all():
            return A, B, torch.ones(len(A))
    return A16, B16, 1 / (powers[0] * powers[1])
