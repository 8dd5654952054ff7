"""What a GGUF file holds: the rows of a weight as its blocks of bytes, in any type that the package `gguf` can read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from eora_lab.compress.gguf_codes import LAYOUTS
from eora_lab.compress.storage import Compressed, Lattice


@dataclass(frozen=True)
class GgufWeight(Compressed):
    """W^[o] = scales[o] * what `gguf.quants.dequantize` makes of the bytes of row o. Blocks never cross rows.

    blocks: as they lie in the file.
    type:   name of the type, such as Q4_K, IQ3_XXS or NVFP4 (`gguf.GGMLQuantizationType`).
    scales: beside the blocks, where the file has a tensor `.scale` (NVFP4); None: 1.
    """

    kind: ClassVar = "gguf"
    whole: ClassVar = ("layout",)

    blocks: UInt8[Tensor, "out bytes"]
    type: str
    scales: Float32[Tensor, "out 1"] | None = None

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a code, without the scales of its block."""
        block, size = _sizes(self.type)
        return 8 * size // block

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        block, size = _sizes(self.type)
        return torch.Size((len(self.blocks), self.blocks.shape[1] // size * block))

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight that a matrix product sees."""
        import gguf
        import numpy as np

        with np.errstate(all="ignore"):  # random bytes can be a scale of NaN
            values = gguf.quants.dequantize(self.blocks.cpu().numpy(), gguf.GGMLQuantizationType[self.type])
        dense = torch.from_numpy(values).to(self.blocks.device)
        return (dense if self.scales is None else dense * self.scales.to(dense)).to(dtype)

    def lattice(self) -> Lattice | None:
        """What its codes stand for, of types whose levels are evenly spaced (`gguf_codes.LAYOUTS`)."""
        if (layout := LAYOUTS.get(self.type)) is None or not layout.even:
            return None
        first = layout.codes(self.blocks.cpu().numpy())
        top = 2**layout.bits - 1
        low, high = (self.with_codes(torch.from_numpy(np.full_like(first, code))).dense() for code in (0, top))
        of_groups = slice(None, None, layout.group_size)
        group = torch.arange(self.shape[1], device=low.device) // layout.group_size
        return Lattice(low[:, of_groups].contiguous(), ((high - low) / top)[:, of_groups].contiguous(), group, top)

    def with_codes(self, codes: UInt8[Tensor, "out in"]) -> "GgufWeight":
        """The same with other codes: scales stay, bit by bit. Of the types that have a `lattice`."""
        if (layout := LAYOUTS.get(self.type)) is None:
            return super().with_codes(codes)  # type: ignore[return-value]
        blocks = layout.with_codes(self.blocks.cpu().numpy(), codes.cpu().numpy())
        return replace(self, blocks=torch.from_numpy(blocks).to(self.blocks.device))

    def state_dict(self) -> dict[str, Tensor]:
        """The bytes, ready for safetensors. A row of one is a row of the weight; "layout" is the type, in letters."""
        more = {} if self.scales is None else {"scales": self.scales}
        return more | {"blocks": self.blocks, "layout": torch.tensor(list(self.type.encode()), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "GgufWeight":
        """The inverse of `state_dict`, also of the same rows of its tensors.

        Raises KeyError when one is missing, or of a type that is not known.
        """
        kind = bytes(state["layout"].tolist()).decode(errors="replace")
        _sizes(kind)
        return cls(state["blocks"], kind, state.get("scales"))


@cache
def dequantises(kind: str) -> bool:
    """Whether the package `gguf` can read a type."""
    import gguf

    try:
        gguf.quants.dequantize(np.zeros((1, _sizes(kind)[1]), np.uint8), gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def _sizes(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block. Raises KeyError for a type that is not known."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
