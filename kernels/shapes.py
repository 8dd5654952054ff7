"""The models whose layers are timed, and the floor under every time: bytes over bandwidth, operations over rate."""

from dataclasses import dataclass

ROWS = (1, 4, 16, 64, 512, 4096)


@dataclass(frozen=True)
class Dimensions:
    """A LLaMA-like decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a block's linear layers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama-3-8b": Dimensions(4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3-70b": Dimensions(8192, 28672, 64, 8, 128, 80, 128256),
}
MERGED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Machine:
    """What a GPU sustains: bytes a second, and 16-bit tensor-core operations a second."""

    name: str
    bandwidth: float
    rate: float


H200 = Machine("NVIDIA H200", 4.3e12, 790e12)  # measured copy and bf16 product on one such machine


def weight_bytes(N: int, K: int, bits: int, group: int = 128, grid_bits: int = 16) -> float:
    """W^ with a scale and an offset a group, of `grid_bits` each; bits 16: dense."""
    return N * K * bits / 8 + (0 if bits == 16 else N * K / group * 2 * grid_bits / 8)


def floor_us(
    M: int, N: int, K: int, bits: int, rank: int, machine: Machine, group: int = 128, grid_bits: int = 16
) -> float:
    """Microseconds below which y = x W^ᵀ + (x Aᵀ) Bᵀ cannot be had: each operand read once, y written once.

    Launches are not counted.
    """
    moved = weight_bytes(N, K, bits, group, grid_bits) + 2 * rank * (N + K) + 2 * M * (N + K)
    operations = 2 * M * (N * K + rank * (N + K))
    return 1e6 * max(moved / machine.bandwidth, operations / machine.rate)
