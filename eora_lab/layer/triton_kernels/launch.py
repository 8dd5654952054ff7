"""Allocate and launch: from a `FusedWeight`, rows x and a `Config` to y. Needs Triton (x on the CPU if interpreted)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.decode import decode_kernel
from eora_lab.layer.triton_kernels.down import down_kernel
from eora_lab.layer.triton_kernels.prefill import dense_kernel, prefill_kernel
from eora_lab.layer.triton_kernels.ptx import PLANES
from eora_lab.layer.triton_kernels.repack import FusedWeight

CHUNKS = 8  # of K in the down-projection: enough programs to be quick, few enough to add up again


@dataclass(frozen=True)
class Rows:
    """What the rows of a launch are (`down`). ids: "rows": the path of each; "experts": the expert of each tile."""

    count: int
    tiles: int
    paths: str = "one"
    ids: Int32[Tensor, " ids"] | None = None
    slots: Int32[Tensor, " slots"] | None = None
    top: int = 1


def launch(
    x: Float[Tensor, "rows in"], weight: FusedWeight, config: Config, ids: Int32[Tensor, " rows"] | None = None
) -> Float[Tensor, "rows out"]:
    """y = x W^ᵀ + (x Aᵀ) Bᵀ + bias. The last stride of x is 1. ids: the path of each row, -1 for none; by default 0."""
    y = x.new_empty(x.shape[0], sum(weight.out_features))
    if not len(x):
        return y
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if config.path == "cublas":
            return cublas(x, weight, ids)
        if config.path == "prefill":
            prefill(x, weight, config, y, ids)
        else:
            tiles = -(-len(x) // config.block_m)
            decode(x, weight, config, y, Rows(len(x), tiles, "one" if ids is None else "rows", ids))
    return y


def sizes(weight: FusedWeight) -> tuple[int, int, int]:
    """Padded columns, blocks of K, channels a block."""
    block = 16 * PLANES[weight.bits]
    return weight.planes.shape[-1], -(-weight.in_features // block), block


def decode(
    x: Float[Tensor, "tokens in"], weight: FusedWeight, config: Config, y: Float[Tensor, "rows out"], rows: Rows
) -> None:
    """Few rows: the streaming kernel writes y."""
    K = x.shape[1]
    NP, blocks, block = sizes(weight)
    grid = NP // config.block_n * rows.tiles, config.split_k
    partial, xa, sums, counters, chunks = first_launch(x, weight, blocks * block, grid, config, rows)
    nothing = counters
    decode_kernel[grid](
        x, weight.planes, weight.scales, weight.offsets, weight.tiles, xa, sums, weight.Bt,
        weight.Bt if weight.bias is None else weight.bias, partial, counters,
        nothing if rows.ids is None else rows.ids, nothing if rows.slots is None else rows.slots, y,
        rows.count, y.shape[1], K, NP, weight.A.shape[1], blocks, chunks, rows.tiles, len(weight.A), weight.Bt.shape[1],
        rows.top, x.stride(0),
        BITS=weight.bits, GROUP=weight.group, HAS_BIAS=weight.bias is not None, EVEN_K=blocks * block == K,
        PATHS=rows.paths, SPLIT_K=config.split_k, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_R=config.block_r, STAGES=config.num_stages, PDL=config.pdl, **options(config),
    )  # fmt: skip


def first_launch(
    x: Float[Tensor, "tokens in"], weight: FusedWeight, KP: int, grid: tuple[int, int], config: Config, rows: Rows
) -> tuple[Float[Tensor, " tiles"], Float[Tensor, " xa"], Float[Tensor, " sums"], Int32[Tensor, " counters"], int]:
    """Run `down_kernel`. One new workspace as partial tiles (still empty), x Aᵀ, sums and counters (zero); chunks."""
    M, (paths, R, K), tiles = rows.count, weight.A.shape, grid[0]
    group = weight.group or 128
    chunk = max(512, -(-KP // CHUNKS // 256) * 256)
    chunks = -(-KP // chunk)
    parts = 0 if config.split_k == 1 else tiles * config.split_k * config.block_m * config.block_n
    needs = [-(-need // 32) * 32 for need in (parts, chunks * M * R, M * (KP // group), tiles)]  # 128 bytes
    workspace = torch.empty(sum(needs), dtype=torch.float32, device=x.device)
    partial, xa, sums, counters = workspace.split(needs)
    counters = counters.view(torch.int32)
    programs = 1 + -(-R // config.block_r) * (paths if rows.paths == "rows" else 1)
    down_kernel[(programs, chunks, rows.tiles)](
        x, weight.A, xa, sums, counters, counters if rows.ids is None else rows.ids,
        counters if rows.slots is None else rows.slots, tiles, M, K, KP, R, x.stride(0), chunk, rows.top,
        GROUP=group, BLOCK_M=config.block_m, BLOCK_R=config.block_r, PATHS=rows.paths, PDL=config.pdl,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial, xa, sums, counters, chunks


def options(config: Config) -> dict[str, int | bool]:
    """Of a launch. An interpreted or older GPU's launch does not know `launch_pdl`."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return chosen | {"launch_pdl": True} if config.pdl else chosen


def prefill(
    x: Float[Tensor, "rows in"],
    weight: FusedWeight,
    config: Config,
    y: Float[Tensor, "rows out"],
    ids: Int32[Tensor, " rows"] | None,
) -> None:
    """Some hundred rows: the kernel that scales in registers writes y."""
    M, K = x.shape
    NP, blocks, block = sizes(weight)
    xa = x @ weight.A.flatten(0, 1).T
    if ids is not None:
        paths = ids.long().clamp(0)[:, None, None].expand(-1, 1, weight.A.shape[1])
        xa = xa.view(M, *weight.A.shape[:2]).gather(1, paths)[:, 0]
    prefill_kernel[(NP // config.block_n * -(-M // config.block_m),)](
        x, weight.planes, weight.scales, weight.offsets, weight.tiles, xa, weight.Bt,
        weight.Bt if weight.bias is None else weight.bias, weight.tiles if ids is None else ids, y,
        M, y.shape[1], K, NP, weight.A.shape[1], blocks, len(weight.A), weight.Bt.shape[1], x.stride(0),
        BITS=weight.bits, GROUP=weight.group, HAS_BIAS=weight.bias is not None, EVEN_K=blocks * block == K,
        PATHS="one" if ids is None else "rows", BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def cublas(
    x: Float[Tensor, "rows in"], weight: FusedWeight, ids: Int32[Tensor, " rows"] | None
) -> Float[Tensor, "rows out"]:
    """One library product, [x | x Aᵀ] times [W^ | B]ᵀ, W^ made dense for it; the inner size is a multiple of 8.

    Of x Aᵀ with a path a row, the columns of the other paths are 0.
    """
    K = x.shape[1]
    NP, blocks, _ = sizes(weight)
    paths, R, _ = weight.A.shape
    N, width = sum(weight.out_features), -(-(K + paths * R) // 8) * 8
    W = x.new_empty(N, width)
    dense_kernel[(blocks, NP // 64)](
        weight.planes, weight.scales, weight.offsets, weight.tiles, W, K, NP, W.stride(0),
        BITS=weight.bits, GROUP=weight.group, BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    bias = None if weight.bias is None else x.new_empty(N)
    W[:, K:] = 0
    for packed, out, rank in weight.segments():
        for path in range(paths):
            part = slice(K + path * R + rank.start, K + path * R + rank.stop)
            W[out, part] = weight.Bt[path, : rank.stop - rank.start, packed].T
        if bias is not None and weight.bias is not None:
            bias[out] = weight.bias[packed]
    xa = (x @ weight.A.flatten(0, 1).T).view(len(x), paths, R)
    if ids is not None:
        xa = xa * (ids[:, None] == torch.arange(paths, device=x.device))[..., None]
    wide = torch.cat([x, xa.flatten(1), x.new_zeros(len(x), width - K - paths * R)], 1)
    return torch.nn.functional.linear(wide, W, bias)
