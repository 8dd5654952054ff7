"""The fused product as one torch operator, so that torch.compile and CUDA graphs see a single node.

On CUDA tensors it launches Triton. On the CPU it unpacks the weight and lets torch multiply: slow, the same function.
It has no gradient: a layer that is trained multiplies by torch (`eora_lab.layer.backends`).
"""

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.packing import unpack_planes
from eora_lab.layer.triton_kernels.repack import FusedWeight


@torch.library.custom_op("eora_lab::fused_linear", mutates_args=(), device_types="cpu")
def fused_linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    A: Tensor,
    Bt: Tensor,
    tiles: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    ids: Tensor | None,
    bits: int,
    group: int,
    out_features: list[int],
    ranks: list[int],
) -> Tensor:
    """x (..., in) -> (..., out). ids (int32): the path of each row of x, -1 for none; None: all have path 0.

    The other arguments are the fields of `FusedWeight`. Raises EoraLabError when x or ids are of another size.
    """
    weight = FusedWeight(
        planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, tuple(out_features), tuple(ranks)
    )
    return product(rows(x, weight, ids), weight, ids).view(*x.shape[:-1], sum(out_features))


@fused_linear.register_kernel("cuda")
def on_cuda(x, planes, scales, offsets, A, Bt, tiles, bias, order, ids, bits, group, out_features, ranks):
    """`fused_linear` on a GPU."""
    weight = FusedWeight(
        planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, tuple(out_features), tuple(ranks)
    )
    flat = rows(x, weight, ids)
    if why_not_triton(x.device, x.dtype):
        return product(flat, weight, ids).view(*x.shape[:-1], sum(out_features))
    from eora_lab.layer.triton_kernels.configs import bucket, choose
    from eora_lab.layer.triton_kernels.launch import launch

    shape = bucket(len(flat)), planes.shape[1], flat.shape[1], bits, group, max(ranks), str(x.dtype)
    return launch(flat, weight, choose(*shape, x.device.index), ids).view(*x.shape[:-1], sum(out_features))


@fused_linear.register_fake
def shape_only(x, planes, scales, offsets, A, Bt, tiles, bias, order, ids, bits, group, out_features, ranks):
    """The shape of its output, for torch.compile."""
    check_width(x, A)
    return x.new_empty(*x.shape[:-1], sum(out_features))


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


def product(
    x: Float[Tensor, "rows in"], weight: FusedWeight, ids: Int32[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows out"]:
    """The definition, in torch: float32 accumulation, one rounding at the end."""
    x32 = x.float()
    y = x32 @ dense(weight).T
    for path, (A, Bt) in enumerate(zip(weight.A.float(), weight.Bt.float(), strict=True)):
        xa = x32 @ A.T
        if ids is not None:
            xa = xa * (ids == path)[:, None]
        for packed, out, rank in weight.segments():
            y[:, out] += xa[:, rank] @ Bt[: rank.stop - rank.start, packed]
        if ids is None:
            break
    for packed, out, _ in weight.segments():
        if weight.bias is not None:
            y[:, out] += weight.bias[packed].float()
    return y.to(x.dtype)
