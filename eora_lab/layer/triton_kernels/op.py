"""The fused product as one torch operator, so that torch.compile and CUDA graphs see a single node.

On CUDA tensors it launches Triton. On the CPU it unpacks the weight and lets torch multiply: slow, the same function.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.repack import FusedWeight, unpack_planes


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
    bits: int,
    group: int,
    out_features: list[int],
    ranks: list[int],
) -> Tensor:
    """x (..., in) -> (..., out). The other arguments are the fields of `FusedWeight`."""
    weight = FusedWeight(
        planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, tuple(out_features), tuple(ranks)
    )
    return product(rows(x, order), weight).view(*x.shape[:-1], sum(out_features))


@fused_linear.register_kernel("cuda")
def on_cuda(x, planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, out_features, ranks):
    """`fused_linear` on a GPU."""
    weight = FusedWeight(
        planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, tuple(out_features), tuple(ranks)
    )
    flat = rows(x, order)
    if why_not_triton(x.device, x.dtype):
        return product(flat, weight).view(*x.shape[:-1], sum(out_features))
    from eora_lab.layer.triton_kernels.configs import choose
    from eora_lab.layer.triton_kernels.launch import launch

    config = choose(len(flat), planes.shape[1], flat.shape[1], bits, group, max(ranks), str(x.dtype), x.device.index)
    return launch(flat, weight, config).view(*x.shape[:-1], sum(out_features))


@fused_linear.register_fake
def shape_only(x, planes, scales, offsets, A, Bt, tiles, bias, order, bits, group, out_features, ranks):
    """The shape of its output, for torch.compile."""
    return x.new_empty(*x.shape[:-1], sum(out_features))


def rows(x: Float[Tensor, "... in"], order: Shaped[Tensor, " in"] | None) -> Float[Tensor, "rows in"]:
    """x as rows whose elements lie side by side, channels in the packed order."""
    x = x.reshape(-1, x.shape[-1])
    if order is not None:
        return x.index_select(1, order)
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


def product(x: Float[Tensor, "rows in"], weight: FusedWeight) -> Float[Tensor, "rows out"]:
    """The definition, in torch: float32 accumulation, one rounding at the end."""
    x32 = x.float()
    y = x32 @ dense(weight).T
    xa = x32 @ weight.A.float().T
    for packed, out, rank in weight.segments():
        y[:, out] += xa[:, rank] @ weight.Bt[: rank.stop - rank.start, packed].float()
        if weight.bias is not None:
            y[:, out] += weight.bias[packed].float()
    return y.to(x.dtype)
