"""How the low-rank factors are stored: in 16 bits, or in few (the paper's table T13), balanced first."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.compensate.lowrank import LowRank
from eora_lab.compress import CompressedWeight, rtn
from eora_lab.errors import EoraLabError

GROUP = 64  # channels of a component that share a grid, where they divide into such groups


@dataclass(frozen=True)
class StoredFactors:
    """A and Bᵀ, one component a row: (rank, in) and (rank, out), float16 or on a grid like compressed weights."""

    A: Tensor | CompressedWeight
    Bt: Tensor | CompressedWeight

    def dense(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """(A, B) float32, as a matrix product sees them."""
        A, Bt = (f.dense() if isinstance(f, CompressedWeight) else f.float() for f in (self.A, self.Bt))
        return A, Bt.T.contiguous()

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.Bt.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for safetensors."""
        state = {}
        for name, factor in (("lora_A", self.A), ("lora_Bt", self.Bt)):
            if isinstance(factor, CompressedWeight):
                state |= {f"{name}.{key}": tensor for key, tensor in factor.state_dict().items()}
            else:
                state[name] = factor
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "StoredFactors":
        """The inverse of `state_dict`. Raises KeyError when a tensor is missing."""

        def read(name: str) -> Tensor | CompressedWeight:
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            return CompressedWeight.from_state_dict(parts) if parts else state[name]

        return cls(read("lora_A"), read("lora_Bt"))


def check_factor_bits(bits: int) -> None:
    """Raise EoraLabError unless factors can be stored in `bits` bits."""
    if bits != 16 and not 2 <= bits <= 8:
        raise EoraLabError(f"factor bits must be 16, or between 2 and 8, not {bits}")


def store_factors(
    answer: LowRank, bits: int = 16, refit: tuple[Float[Tensor, "out in"], Float[Tensor, "in in"]] | None = None
) -> StoredFactors:
    """Round balanced factors to `bits` bits: float16, or to nearest on asymmetric grids.

    refit: (R, S). B is then fitted again to the rounded A^ before it is rounded itself:
        B = R S A^ᵀ (A^ S A^ᵀ)^-1 minimises tr((R - B A^) S (R - B A^)ᵀ). Singular values of A^ S A^ᵀ at float32
        rounding count as zero.
    Raises EoraLabError on bits out of range.
    """
    check_factor_bits(bits)
    balanced = answer.balanced()
    A, Bt = balanced.A.float(), balanced.B.T.float().contiguous()
    if bits == 16 or not answer.rank:
        return StoredFactors(A.half(), Bt.half())
    rounded = round_rows(A, bits)
    if refit:
        R, S = (matrix.double() for matrix in refit)
        SA = S @ rounded.dense().double().T  # (in, rank)
        gram = rounded.dense().double() @ SA
        Bt = (torch.linalg.pinv(gram, rtol=1e-7, hermitian=True) @ (R @ SA).T).float()
    return StoredFactors(rounded, round_rows(Bt, bits))


def round_rows(matrix: Float[Tensor, "rows columns"], bits: int) -> CompressedWeight:
    """Round to nearest, in groups along the rows, with float16 grids."""
    group_size = GROUP if matrix.shape[1] % GROUP == 0 else -1
    return rtn(matrix, None, bits=bits, group_size=group_size, scale_dtype="float16")
