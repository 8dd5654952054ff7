"""A linear layer that carries its compressed weight and the low-rank path beside it."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import CompressedWeight


class CompensatedLinear(nn.Module):
    """y = W^ x + B (A x) + bias, in place of an `nn.Linear` whose bias, dtype and device it keeps.

    compressed: W^ as codes on a grid; factors: A and B as stored. Both are what a file holds.
    weight:     W^ dense, (out_features, in_features), what the matrix product reads.
    lora_A:     (rank, in_features); lora_B: (out_features, rank). Rank 0: no path.
    """

    def __init__(self, old: nn.Linear, compressed: CompressedWeight, factors: StoredFactors):
        super().__init__()
        self.compressed, self.factors = compressed, factors
        A, B = factors.dense()
        for name, tensor in (("weight", compressed.dense()), ("lora_A", A), ("lora_B", B)):
            self.register_buffer(name, tensor.to(old.weight.device, old.weight.dtype), persistent=name != "weight")
        self.register_buffer("bias", old.bias)

    def set_factors(self, factors: StoredFactors) -> None:
        """Put another low-rank path beside the same compressed weight. Of rank 0: none."""
        A, B = factors.dense()
        self.factors, self.lora_A, self.lora_B = factors, A.to(self.lora_A), B.to(self.lora_B)

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
        """Bytes as stored: packed weight and factors. The bias is not counted; it is never compressed."""
        return self.compressed.nbytes + self.factors.nbytes

    def stored(self) -> dict[str, Tensor]:
        """All that a file must hold."""
        return self.compressed.state_dict() | self.factors.state_dict()

    @classmethod
    def from_stored(cls, tensors: dict[str, Tensor], old: nn.Linear) -> "CompensatedLinear":
        """The inverse of `stored`. Raises KeyError when a tensor is missing or of another shape."""
        compressed = CompressedWeight.from_state_dict(tensors)
        if compressed.codes.shape != old.weight.shape:
            raise KeyError(f"a weight of {tuple(compressed.codes.shape)} for a layer of {tuple(old.weight.shape)}")
        return cls(old, compressed, StoredFactors.from_state_dict(tensors))

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) if self.rank else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.compressed.bits}, rank={self.rank}"
