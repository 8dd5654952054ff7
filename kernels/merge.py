"""Several layers that read the same input (q, k and v; gate and up) as one launch: what the bench shows it would bring.

The packed layout and the kernels hold such layers side by side; the workbench's own layers do not use it yet.
"""

from dataclasses import replace

import torch
from torch import Tensor

from eora_lab.errors import EoraLabError
from eora_lab.layer.triton_kernels import FusedWeight


def merge(weights: list[FusedWeight]) -> FusedWeight:
    """One weight of several: one launch, outputs side by side.

    Raises EoraLabError when bits, groups, dtypes or channel orders differ.
    """
    first, *others = weights
    for other in others:
        same = [
            (
                w.bits,
                w.group,
                w.in_features,
                len(w.A),
                w.A.dtype,
                w.scales.dtype,
                w.offsets.dtype,
                w.bias is None,
                w.order is None,
            )
            for w in (first, other)
        ]
        if same[0] != same[1] or (first.order is not None and not torch.equal(first.order, other.order)):
            raise EoraLabError(
                "layers can be merged only with the same input, bits, group size, dtypes and bias or none"
            )
    rank, tiles, ranks, columns = max(w.Bt.shape[1] for w in weights), [], 0, 0
    for w in weights:
        tiles.append(w.tiles + torch.tensor([ranks, 0, columns, columns], dtype=torch.int32, device=w.tiles.device))
        ranks, columns = ranks + w.A.shape[1], columns + sum(w.out_features)

    def side_by_side(name: str) -> Tensor:
        return torch.cat([getattr(w, name) for w in weights], -1)

    return replace(
        first,
        planes=side_by_side("planes"),
        scales=side_by_side("scales"),
        offsets=side_by_side("offsets"),
        A=torch.cat([w.A for w in weights], 1),
        Bt=torch.cat([torch.nn.functional.pad(w.Bt, (0, 0, 0, rank - w.Bt.shape[1])) for w in weights], 2),
        tiles=torch.cat(tiles),
        bias=None if first.bias is None else side_by_side("bias"),
        out_features=sum((w.out_features for w in weights), ()),
        ranks=sum((w.ranks for w in weights), ()),
    )
