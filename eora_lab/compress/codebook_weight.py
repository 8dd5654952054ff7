"""What formats with a codebook hold: a code a weight, what each code stands for, and a scale per group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor

from eora_lab.compress.grid_weight import in_groups
from eora_lab.compress.packing import pack, unpack
from eora_lab.compress.storage import Compressed


@dataclass(frozen=True)
class CodebookWeight(Compressed):
    """W^[o, i] = levels[codes[o, i]] * scales[o, g] / tensor_scale, g = i // group_size.

    Its levels may lie anywhere, as those of NF4, FP4 and FP8 do; those of a `GridWeight` are as far apart as its scale.

    codes:  integers in 0 .. 2^bits - 1, as the format numbers its levels.
    levels: what each code stands for; no code is beyond them.
    scales: in the type that the format stores (float32 to float8); they are multiplied in float32.
    group_size: channels that share a scale; the last group may be shorter.
    tensor_scale: one number that all scales are divided by (the global scale of NVFP4); None: 1.
    """

    kind: ClassVar = "codebook"
    whole: ClassVar = ("layout", "levels", "tensor_scale")

    codes: UInt8[Tensor, "out in"]
    levels: Float32[Tensor, " levels"]
    scales: Shaped[Tensor, "out groups"]
    bits: int
    group_size: int
    tensor_scale: Float32[Tensor, "1"] | None = None

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.codes.shape

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        device, scales = self.codes.device, self.scales.float()
        if self.tensor_scale is not None:
            scales = scales / self.tensor_scale.to(device)
        values = in_groups(self.levels.to(device)[self.codes.int()], self.group_size)
        return values.mul_(scales[..., None]).flatten(1)[:, : self.shape[1]].to(dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Packed tensors, ready for safetensors. A row of one is a row of the weight, but for those of `whole`."""
        return ({} if self.tensor_scale is None else {"tensor_scale": self.tensor_scale}) | {
            "codes": pack(self.codes, self.bits),
            "scales": self.scales,
            "levels": self.levels.clone(),  # no file holds one tensor under several names
            "layout": torch.tensor([self.shape[1], self.group_size, self.bits]),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "CodebookWeight":
        """The inverse of `state_dict`, also of the same rows of its tensors. Raises KeyError when one is missing."""
        in_features, group_size, bits = state["layout"].tolist()
        codes = unpack(state["codes"], bits, in_features)
        return cls(codes, state["levels"], state["scales"], bits, group_size, state.get("tensor_scale"))
