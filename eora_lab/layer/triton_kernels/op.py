"""The fused product as one torch operator, so that torch.compile and CUDA graphs see a single node.

On CUDA tensors it launches Triton. On the CPU it unpacks the weight and lets torch multiply: slow, the same function.
x has a gradient, by torch. `torch.library.custom_op` would check every call again, for half of the host's time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.packing import unpack_planes
from eora_lab.layer.triton_kernels.repack import TENSORS, FusedWeight

NAME = "eora_lab::fused_linear"
torch.library.define(
    NAME,
    "(Tensor x, Tensor? ids, Tensor planes, Tensor scales, Tensor offsets, Tensor A, Tensor Bt, Tensor tiles, "
    "Tensor? bias, Tensor? order, int bits, int group, int[] out_features, int[] ranks) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def weight_of(*fields: Any) -> FusedWeight:
    """From the operator's last arguments, the fields of a `FusedWeight`; lists are its tuples."""
    *others, out_features, ranks = fields
    lists: tuple[Any, ...] = tuple(out_features), tuple(ranks)
    return FusedWeight(*others, *lists)


def on_cpu(x, ids, *fields):
    """x (..., in) -> (..., out). ids (int32): the path of each row of x, -1 for none; None: all have path 0.

    Raises EoraLabError when x or ids are of another size.
    """
    weight = weight_of(*fields)
    return product(rows(x, weight, ids), weight, ids).view(*x.shape[:-1], sum(weight.out_features))


def on_cuda(x, ids, *fields):
    """`on_cpu` on a GPU."""
    if why_not_triton(x.device, x.dtype):
        return on_cpu(x, ids, *fields)
    from eora_lab.layer.triton_kernels.configs import bucket, choose
    from eora_lab.layer.triton_kernels.launch import launch

    weight = weight_of(*fields)
    flat, columns = rows(x, weight, ids), weight.planes.shape[1]
    shape = bucket(len(flat)), columns, flat.shape[1], weight.bits, weight.group, max(weight.ranks), str(x.dtype)
    return launch(flat, weight, choose(*shape, x.device.index), ids).view(*x.shape[:-1], sum(weight.out_features))


def shape_only(x, ids, *fields):
    """The shape of its output, for torch.compile."""
    weight = weight_of(*fields)
    check_width(x, weight.A)
    return x.new_empty(*x.shape[:-1], sum(weight.out_features))


def keep(ctx, inputs, output) -> None:
    """What the gradient needs."""
    x, ids, *fields = inputs
    ctx.shape, ctx.numbers = x.shape, fields[len(TENSORS) :]
    ctx.save_for_backward(ids, *fields[: len(TENSORS)])


def gradient(ctx, above):
    """Of x. Raises EoraLabError where anything else wants one."""
    if any(ctx.needs_input_grad[1:]):
        raise EoraLabError("the fused product has a gradient for x alone; a CompensatedLinear trains its A and B")
    ids, *tensors = ctx.saved_tensors
    weight, rows32 = weight_of(*tensors, *ctx.numbers), above.reshape(-1, above.shape[-1]).float()
    below = rows32 @ dense(weight)
    for mine, A, Bt in by_path(rows32, weight, ids):
        for packed, out, rank in weight.segments():
            below = below + mine[:, out] @ Bt[: rank.stop - rank.start, packed].T @ A[rank]
    if weight.order is not None:
        below = below[:, weight.order.argsort()]
    return below.to(above.dtype).view(ctx.shape), *(len(TENSORS) + len(ctx.numbers) + 1) * [None]


torch.library.impl(NAME, "cpu", on_cpu)
torch.library.impl(NAME, "cuda", on_cuda)
torch.library.register_fake(NAME, shape_only)
torch.library.register_autograd(NAME, gradient, setup_context=keep)
fused_linear = torch.ops.eora_lab.fused_linear.default


def check_width(x: Shaped[Tensor, "... _"], A: Shaped[Tensor, "paths rank _"]) -> None:
    """Raise EoraLabError unless x is as wide as the layer: the kernels would read elsewhere."""
    if x.shape[-1] != A.shape[-1]:
        raise EoraLabError(f"the layer reads {A.shape[-1]} channels, and x has {x.shape[-1]}")


def rows(
    x: Float[Tensor, "... _"], weight: FusedWeight, ids: Shaped[Tensor, " _"] | None = None
) -> Float[Tensor, "rows in"]:
    """x as rows whose elements lie side by side, channels in the packed order. Raises EoraLabError as the operator."""
    check_width(x, weight.A)
    x = x.reshape(-1, x.shape[-1])
    if ids is not None and (ids.shape != (len(x),) or ids.dtype != torch.int32):
        raise EoraLabError(f"{len(x)} rows need as many int32 ids of their paths, not {ids.dtype} {tuple(ids.shape)}")
    if weight.order is not None:
        return x.index_select(1, weight.order)
    return x if x.stride(1) == 1 else x.contiguous()


def dense(weight: FusedWeight) -> Float[Tensor, "out in"]:
    """W^ in float32, its channels in the packed order."""
    parts = []
    for packed, out, _ in weight.segments():
        codes = unpack_planes(weight.planes[:, packed], weight.bits, out.stop - out.start, weight.in_features).float()
        scales, offsets = (t[:, packed].T.float() for t in (weight.scales, weight.offsets))  # (out, groups)
        if weight.group:
            expand = torch.arange(weight.in_features, device=codes.device) // weight.group
            scales, offsets = scales[:, expand], offsets[:, expand]
        integer = weight.offsets.dtype == torch.uint8
        parts.append((codes - offsets) * scales if integer else codes * scales + offsets)
    return torch.cat(parts)


def by_path(
    rows32: Float[Tensor, "rows _"], weight: FusedWeight, ids: Int32[Tensor, " rows"] | None
) -> Iterator[tuple[Float[Tensor, "rows _"], Float[Tensor, "rank in"], Float[Tensor, "tile_rank N"]]]:
    """Of each path: the rows that take it, the others zero, and its A and Bᵀ, in float32."""
    for path, (A, Bt) in enumerate(zip(weight.A.float(), weight.Bt.float(), strict=True)):
        if ids is None:
            yield rows32, A, Bt
            return
        yield rows32 * (ids == path)[:, None], A, Bt


def product(
    x: Float[Tensor, "rows in"], weight: FusedWeight, ids: Int32[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows out"]:
    """The definition, in torch: float32 accumulation, one rounding at the end."""
    x32 = x.float()
    y = x32 @ dense(weight).T
    for mine, A, Bt in by_path(x32, weight, ids):
        xa = mine @ A.T
        for packed, out, rank in weight.segments():
            y[:, out] += xa[:, rank] @ Bt[: rank.stop - rank.start, packed]
    for packed, out, _ in weight.segments():
        if weight.bias is not None:
            y[:, out] += weight.bias[packed].float()
    return y.to(x.dtype)
