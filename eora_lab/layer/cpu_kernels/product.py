"""Products by the kernels, as functions of x."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eora_lab.layer.cpu_kernels.joined import FewRows
from eora_lab.layer.cpu_kernels.packed import LANES, PackedGrid
from eora_lab.layer.cpu_kernels.team import Call, openmp, run

TILE = 2**18  # weights that are dense at once; they stay in the cache
UNROLLED = (1, 2, 4)  # steps of a block, as the usual sizes of groups have them
FAINT = 2**-26  # of the largest number of a row: less than what its float32 sums are rounded by


Product = Callable[[Float[Tensor, "... in"]], Float[Tensor, "... out"]]


def few_rows(
    weight: PackedGrid, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], bias: Float[Tensor, " out"] | None
) -> FewRows:
    """x -> W^ x + B (A x) + bias, by the kernel for these codes."""
    openmp()
    from eora_lab.layer.cpu_kernels.kernel import product_kernel

    function = product_kernel(weight.bits, weight.groups, weight.steps if weight.steps in UNROLLED else 0)
    in_features = A.shape[1]
    A, B, factor = path(A.float(), B.float())
    rank = -(-len(A) // LANES) * LANES
    A = F.pad(A[:, weight.place.clamp(min=0)] * (weight.place >= 0), (0, 0, 0, rank - len(A)))
    B, factor = (F.pad(t, (0, rank - t.shape[-1])).contiguous() for t in (B, factor))
    tensors = {"A": A, "B": B, "factor": factor} | ({} if bias is None else {"bias": bias.float().contiguous()})
    call = _call_of(weight, **tensors)
    call.features, call.rank, call.half_path = in_features, rank, A.dtype == torch.float16
    return FewRows(function, call, weight, tensors)


def many_rows(weight: PackedGrid) -> Product:
    """x -> W^ x by torch, of any number of rows: some rows of W^ are unpacked at a time."""
    openmp()
    from eora_lab.layer.cpu_kernels.kernel import unpack_kernel

    function, fixed, length = unpack_kernel(weight.bits, weight.groups), _call_of(weight), len(weight.place)
    height = max(TILE // length, 64)
    place, nowhere = weight.place.clamp(min=0), weight.place < 0

    def product(x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        half = x.dtype == torch.float16  # few processors multiply that, and W^ need not fit it
        x = (x.float() if half else x)[:, place].masked_fill_(nowhere, 0)
        y, tile, call = x.new_empty(len(x), fixed.outputs), torch.empty(height, length), Call.from_buffer_copy(fixed)
        call.y = tile.data_ptr()
        for call.first in range(0, fixed.outputs, height):
            call.rows = min(height, fixed.outputs - call.first)
            run(function, call)
            part = slice(call.first, call.first + call.rows)
            torch.mm(x, tile[: call.rows].to(x.dtype).T, out=y[:, part])
        return y.half() if half else y

    product.held = weight  # type: ignore[attr-defined]
    return product


def _call_of(weight: PackedGrid, **more: Tensor) -> Call:
    """What the kernels are told of a weight, and of tensors beside it."""
    tensors = {name: getattr(weight, name) for name in ("place", "codes", "last", "scales", "offsets")} | more
    return Call(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        outputs=len(weight.codes),
        safe=len(weight.codes) - len(weight.last),
        code_stride=weight.codes.shape[1],
        last_stride=weight.last.shape[1],
        grid_stride=weight.scales.stride(0),
        blocks=weight.blocks,
        steps=weight.steps,
    )


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
    return A16, B16, 1 / powers[0] / powers[1]
