"""Layers of one shape side by side, of which every token takes a few (a mixture of experts), in few launches.

Decoding only: a token and an expert that it chose are a pair, pairs are sorted by expert on the device, and a tile of
rows holds pairs of one expert. Nothing depends on what was chosen but the contents of two tables, so that a CUDA graph
holds. Positions among all experts are counted in 64 bits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.op import check_width, product
from eora_lab.layer.triton_kernels.op import rows as as_rows
from eora_lab.layer.triton_kernels.repack import FusedWeight


def stack(weights: Sequence[FusedWeight]) -> FusedWeight:
    """Experts of the same kind as one weight, their paths padded with zeros to the largest rank.

    Raises EoraLabError when bits, groups, sizes or dtypes differ, or channels are not in place.
    """
    first, rank = weights[0], max(one.A.shape[1] for one in weights)

    def kind(one: FusedWeight) -> tuple:
        return one.bits, one.group, one.in_features, one.out_features, one.A.dtype, one.offsets.dtype, one.bias is None

    if any(kind(one) != kind(first) or one.order is not None or len(one.out_features) > 1 for one in weights):
        raise EoraLabError("experts must have the same size, bits, groups, dtypes and bias or none, channels in place")
    tiles = first.tiles.clone()
    tiles[:, 1] = rank

    def padded(matrix: Tensor) -> Tensor:  # (1, rank of its own, columns)
        return torch.nn.functional.pad(matrix, (0, 0, 0, rank - matrix.shape[1]))

    biases = [one.bias for one in weights if one.bias is not None]
    return replace(
        first,
        planes=torch.stack([one.planes for one in weights]),
        scales=torch.stack([one.scales for one in weights]),
        offsets=torch.stack([one.offsets for one in weights]),
        A=torch.cat([padded(one.A) for one in weights]),
        Bt=torch.cat([padded(one.Bt) for one in weights]),
        tiles=tiles,
        bias=torch.stack(biases) if biases else None,
        ranks=(rank,),
    )


def one_expert(weight: FusedWeight, expert: int) -> FusedWeight:
    """An expert of `stack`, by itself."""
    one = {name: getattr(weight, name)[expert] for name in ("planes", "scales", "offsets")}
    path = {name: getattr(weight, name)[expert : expert + 1] for name in ("A", "Bt")}
    return replace(weight, **one, **path, bias=None if weight.bias is None else weight.bias[expert])


def sort_pairs(
    chosen: Int[Tensor, "tokens top"], experts: int, block: int
) -> tuple[Int32[Tensor, " slots"], Int32[Tensor, " tiles"]]:
    """Pairs in tiles of `block`, each of one expert: the pair of each slot (their number: none), each tile's expert.

    A pair is numbered token * top + place. A tile that holds none has the expert -1. The number of tiles depends on the
    shape of `chosen` alone.
    """
    pairs, device = chosen.numel(), chosen.device
    tiles = min(pairs, pairs // block + experts)
    flat = chosen.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.long, device=device).index_add_(0, flat, torch.ones_like(flat))
    of_expert = (counts + block - 1) // block  # tiles
    first_tile, first_pair = of_expert.cumsum(0) - of_expert, counts.cumsum(0) - counts
    by_expert = flat[order]
    place = torch.arange(pairs, device=device) - first_pair[by_expert]  # among the pairs of its expert
    slots = torch.full((tiles * block,), pairs, dtype=torch.int32, device=device)
    slots[first_tile[by_expert] * block + place] = order.int()
    number = torch.arange(tiles, device=device)
    expert = torch.searchsorted(of_expert.cumsum(0), number, right=True)
    return slots, torch.where(number < of_expert.sum(), expert, -1).int()


def experts_linear(
    x: Float[Tensor, "tokens in"], weight: FusedWeight, chosen: Int[Tensor, "tokens top"]
) -> Float[Tensor, "tokens top out"]:
    """y[t, j] = W^_e x_t + B_e (A_e x_t) + bias_e, e = chosen[t, j]: by Triton on a GPU, by torch elsewhere.

    weight: of `stack`. Raises EoraLabError when x is of another width or dtype.
    """
    check_width(x, weight.A)
    if x.dtype != weight.A.dtype:
        raise EoraLabError(f"the experts are packed for {weight.A.dtype}, and x is {x.dtype}; pack them for that dtype")
    if why_not_triton(x.device, x.dtype):
        y = x.new_empty(*chosen.shape, sum(weight.out_features))
        for expert in range(len(weight.planes)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            y[token, place] = product(x[token], one_expert(weight, expert))
        return y
    from eora_lab.layer.triton_kernels.configs import gpu_of, rule

    columns, channels = weight.planes.shape[-1], weight.in_features
    rows = chosen.numel() if chosen.numel() <= 64 else 64
    return launch_experts(x, weight, chosen, rule(rows, columns, channels, weight.bits, weight.group, gpu_of(x.device)))


def launch_experts(
    x: Float[Tensor, "tokens in"], weight: FusedWeight, chosen: Int[Tensor, "tokens top"], config
) -> Float[Tensor, "tokens top out"]:
    """`experts_linear` by Triton, with block sizes."""
    from eora_lab.layer.triton_kernels.launch import Rows, decode

    y = x.new_empty(*chosen.shape, sum(weight.out_features))
    if not chosen.numel():
        return y
    with torch.cuda.device_of(x):
        slots, experts = sort_pairs(chosen, len(weight.planes), config.block_m)
        rows = Rows(chosen.numel(), len(experts), "experts", experts, slots, chosen.shape[1])
        decode(as_rows(x, weight), weight, config, y.flatten(0, 1), rows)
    return y
