"""A linear layer that carries its compressed weight and the low-rank path beside it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16
from torch import Tensor, nn

from eora_lab.compensate import LowRank
from eora_lab.compress import CompressedWeight

FACTOR_DTYPE = torch.float16  # what factors are rounded to and stored in


class CompensatedLinear(nn.Module):
    """y = W^ x + B (A x) + bias.

    compressed: W^ as codes on a grid, what `save` writes.
    weight:     W^ dense, (out_features, in_features), what the matrix product reads.
    lora_A:     (rank, in_features); lora_B: (out_features, rank); balanced and rounded to 16 bits. Rank 0: no path.
    """

    def __init__(self, compressed: CompressedWeight, low_rank: LowRank, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.compressed = compressed
        self.register_buffer("weight", compressed.dense(dtype), persistent=False)
        factors = low_rank.balanced()
        self.register_buffer("lora_A", factors.A.to(FACTOR_DTYPE).to(dtype).contiguous())
        self.register_buffer("lora_B", factors.B.to(FACTOR_DTYPE).to(dtype).contiguous())
        self.register_buffer("bias", bias)

    @classmethod
    def replacing(cls, old: nn.Linear, compressed: CompressedWeight, low_rank: LowRank) -> "CompensatedLinear":
        """With the bias, dtype and device of the linear whose place it takes."""
        return cls(compressed, low_rank, old.bias, old.weight.dtype).to(old.weight.device)

    def stored(self) -> dict[str, Tensor]:
        """All that a file must hold: packed weight and 16-bit factors."""
        A, B = self.factors()
        return {"lora_A": A, "lora_B": B} | self.compressed.state_dict()

    @classmethod
    def from_stored(cls, tensors: dict[str, Tensor], old: nn.Linear) -> "CompensatedLinear":
        """The inverse of `stored`, in place of `old`. Raises KeyError when a tensor is missing."""
        A, B = tensors["lora_A"], tensors["lora_B"]
        compressed = CompressedWeight.from_state_dict(tensors)
        if compressed.codes.shape != old.weight.shape:
            raise KeyError(f"a weight of {tuple(compressed.codes.shape)} for a layer of {tuple(old.weight.shape)}")
        return cls.replacing(old, compressed, LowRank(A.float(), B.float(), torch.zeros(0)))

    def factors(self) -> tuple[Float16[Tensor, "rank in"], Float16[Tensor, "out rank"]]:
        """(A, B) as stored."""
        return self.lora_A.to(FACTOR_DTYPE), self.lora_B.to(FACTOR_DTYPE)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes when stored: packed weight and 16-bit factors. The bias is not counted; it is never compressed."""
        return self.compressed.nbytes + FACTOR_DTYPE.itemsize * (self.lora_A.numel() + self.lora_B.numel())

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) if self.rank else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.compressed.bits}, rank={self.rank}"
