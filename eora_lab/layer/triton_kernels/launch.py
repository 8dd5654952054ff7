"""Allocate and launch: from a `FusedWeight`, rows x and a `Config` to y. Needs Triton (x on the CPU if interpreted)."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.decode import decode_kernel, down_kernel
from eora_lab.layer.triton_kernels.prefill import dense_kernel, prefill_kernel
from eora_lab.layer.triton_kernels.ptx import PLANES
from eora_lab.layer.triton_kernels.repack import FusedWeight

CHUNKS = 8  # of K in the down-projection: enough programs to be quick, few enough to add up again


def launch(x: Float[Tensor, "rows in"], weight: FusedWeight, config: Config) -> Float[Tensor, "rows out"]:
    """y = x W^ᵀ + (x Aᵀ) Bᵀ + bias. The last stride of x is 1."""
    if config.path == "cublas":
        return cublas(x, weight)
    y = x.new_empty(x.shape[0], sum(weight.out_features))
    if len(x):
        (decode if config.path == "decode" else prefill)(x, weight, config, y)
    return y


def sizes(weight: FusedWeight) -> tuple[int, int, int]:
    """Padded columns, blocks of K, channels a block."""
    block = 16 * PLANES[weight.bits]
    return weight.planes.shape[1], -(-weight.in_features // block), block


def decode(x: Float[Tensor, "rows in"], weight: FusedWeight, config: Config, y: Float[Tensor, "rows out"]) -> None:
    """Few rows: the streaming kernel writes y."""
    M, K = x.shape
    NP, blocks, block = sizes(weight)
    grid = NP // config.block_n, config.split_k, -(-M // config.block_m)
    partial, xa, sums, counters, chunks = first_launch(x, weight.A, blocks * block, weight.group or 128, grid, config)
    decode_kernel[grid](
        x, weight.planes, weight.scales, weight.offsets, weight.tiles, xa, sums, weight.Bt,
        weight.Bt if weight.bias is None else weight.bias, partial, counters, y,
        M, y.shape[1], K, NP, len(weight.A), blocks, chunks, x.stride(0),
        BITS=weight.bits, GROUP=weight.group, HAS_BIAS=weight.bias is not None, EVEN_K=blocks * block == K,
        SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_r, PDL=config.pdl,
        **options(config),
    )  # fmt: skip


def first_launch(
    x: Float[Tensor, "rows in"],
    A: Float[Tensor, "rank in"],
    KP: int,
    sum_group: int,
    grid: tuple[int, int, int],
    config: Config,
) -> tuple[Float[Tensor, " tiles"], Float[Tensor, " xa"], Float[Tensor, " sums"], Int32[Tensor, " counters"], int]:
    """Run `down_kernel`. One new workspace as partial tiles (still empty), x Aᵀ, sums and counters (zero); chunks."""
    M, K = x.shape
    R, tiles = len(A), grid[0] * grid[2]
    chunk = max(512, -(-KP // CHUNKS // 256) * 256)
    chunks = -(-KP // chunk)
    parts = 0 if config.split_k == 1 else tiles * config.split_k * config.block_m * config.block_n
    starts = [0]
    for need in (parts, chunks * M * R, M * (KP // sum_group), tiles):
        starts.append(starts[-1] + -(-need // 32) * 32)  # 128 bytes
    workspace = torch.empty(starts[-1], dtype=torch.float32, device=x.device)
    partial, xa, sums, counters = (workspace[start:] for start in starts[:-1])
    counters = counters.view(torch.int32)
    down_kernel[(1 + -(-R // config.block_r), chunks, grid[2])](
        x, A, xa, sums, counters, tiles, M, K, KP, R, x.stride(0), chunk,
        GROUP=sum_group, BLOCK_M=config.block_m, BLOCK_R=config.block_r, PDL=config.pdl, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial, xa, sums, counters, chunks


def options(config: Config) -> dict[str, int | bool]:
    """Of a launch. An interpreted or older GPU's launch does not know `launch_pdl`."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return chosen | {"launch_pdl": True} if config.pdl else chosen


def prefill(x: Float[Tensor, "rows in"], weight: FusedWeight, config: Config, y: Float[Tensor, "rows out"]) -> None:
    """Some hundred rows: the kernel that scales in registers writes y."""
    M, K = x.shape
    NP, blocks, block = sizes(weight)
    xa = x @ weight.A.T
    prefill_kernel[(NP // config.block_n * -(-M // config.block_m),)](
        x, weight.planes, weight.scales, weight.offsets, weight.tiles, xa, weight.Bt,
        weight.Bt if weight.bias is None else weight.bias, y,
        M, y.shape[1], K, NP, weight.A.shape[0], blocks, x.stride(0),
        BITS=weight.bits, GROUP=weight.group, HAS_BIAS=weight.bias is not None, EVEN_K=blocks * block == K,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def cublas(x: Float[Tensor, "rows in"], weight: FusedWeight) -> Float[Tensor, "rows out"]:
    """One library product, [x | x Aᵀ] times [W^ | B]ᵀ, W^ made dense for it."""
    K = x.shape[1]
    NP, blocks, _ = sizes(weight)
    R, N = weight.A.shape[0], sum(weight.out_features)
    W = x.new_empty(N, K + R)
    dense_kernel[(blocks, NP // 64)](
        weight.planes, weight.scales, weight.offsets, weight.tiles, W, K, NP, W.stride(0),
        BITS=weight.bits, GROUP=weight.group, BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    bias = None if weight.bias is None else x.new_empty(N)
    W[:, K:] = 0
    for packed, out, rank in weight.segments():
        W[out, K:][:, rank] = weight.Bt[: rank.stop - rank.start, packed].T
        if bias is not None and weight.bias is not None:
            bias[out] = weight.bias[packed]
    return torch.nn.functional.linear(torch.cat([x, x @ weight.A.T], 1), W, bias)
