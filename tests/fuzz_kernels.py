"""Random products by the Triton kernels in Triton's interpreter, against float64: `python -m tests.fuzz_kernels 300`.

Sizes, formats, paths and what a row is are drawn at random; programs run in a random order, as a GPU may run them;
uninitialised memory is NaN. A seed is one case: `--seed 17` runs case 17 alone.
"""

import argparse
import os
import random
import sys
from dataclasses import dataclass

import torch

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}  # the interpreter cuts bfloat16 off instead of rounding it


@dataclass(frozen=True)
class Drawn:
    """A case. rows: "one" path for all, a path a row ("rows"), or "experts"."""

    seed: int
    path: str
    rows: str
    dtype: str
    bits: int
    group: int
    zero: str
    act_order: bool
    mask: bool
    M: int
    N: int
    K: int
    ranks: tuple[int, ...]
    top: int
    bias: bool
    split_k: int
    block_n: int


def draw(seed: int) -> Drawn:
    """Case number `seed`."""
    pick = random.Random(seed)
    rows = pick.choice(["one", "one", "rows", "rows", "experts"])
    path = "decode" if rows == "experts" else pick.choice(["decode", "decode", "decode", "prefill", "cublas"])
    M = pick.choice([1, 2, 5, pick.randint(1, 17), pick.randint(18, 70)])
    group = pick.choice([16, 32, 48, 64, 96, 128, 0])
    K = pick.choice([pick.randint(1, 700), 128 * pick.randint(1, 5)])
    zero = pick.choice(["float", "integer"])
    many = 1 if rows == "one" else pick.randint(1, 5)
    return Drawn(
        seed, path, rows, pick.choice(["float16", "bfloat16"]), pick.choice([3, 4]), group, zero,
        act_order=rows != "experts" and group > 0 and pick.random() < 0.25,
        mask=zero == "integer" and pick.random() < 0.2,
        M=M, N=pick.choice([pick.randint(1, 260), 128]), K=K,
        ranks=tuple(pick.choice([0, 1, 7, 16, 33, 64, 100]) for _ in range(many)), top=pick.randint(1, min(many, 3)),
        bias=pick.random() < 0.5, split_k=pick.choice([1, 1, 2, 3, 5, 8]), block_n=pick.choice([32, 64, 128]),
    )  # fmt: skip


def weight_of(case: Drawn, generator: torch.Generator):
    """A random grid, and its float64 matrix."""
    from eora_lab.compress import GridWeight

    groups = -(-case.K // case.group) if case.group else 1
    size = case.group or case.K
    index = torch.arange(case.K) // size
    if case.act_order:
        index = index[torch.randperm(case.K, generator=generator)]
    codes = torch.randint(0, 2**case.bits, (case.N, case.K), generator=generator, dtype=torch.uint8)
    scales = 0.02 * torch.randn(case.N, groups, generator=generator)
    scales[torch.rand(scales.shape, generator=generator) < 0.05] = 0
    mask = torch.rand(case.N, case.K, generator=generator) < 0.5 if case.mask else None
    if case.zero == "integer":
        offsets = torch.randint(0, 2**case.bits, scales.shape, generator=generator, dtype=torch.uint8)
        W = (codes.double() - offsets.double()[:, index]) * scales.double()[:, index]
    else:
        offsets = 0.1 * torch.randn(scales.shape, generator=generator)
        W = codes.double() * scales.double()[:, index] + offsets.double()[:, index]
    if mask is not None:
        codes, W = codes * mask, W * mask
    grid = GridWeight(codes, scales, offsets, case.bits, mask, size, index.int() if case.act_order else None)
    return grid, W


def relative_error(case: Drawn) -> float:
    """||y - reference|| over ||reference||, the reference from the codes in float64."""
    from eora_lab.layer.triton_kernels import fused_weight
    from eora_lab.layer.triton_kernels.configs import Config
    from eora_lab.layer.triton_kernels.experts import launch_experts, stack
    from eora_lab.layer.triton_kernels.launch import launch
    from eora_lab.layer.triton_kernels.op import rows

    generator, dtype = torch.Generator().manual_seed(case.seed), getattr(torch, case.dtype)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x = (normal(case.M, case.K) + 0.3).to(dtype)
    paths = [((normal(r, case.K) / case.K**0.5).to(dtype), (0.3 * normal(case.N, r)).to(dtype)) for r in case.ranks]
    config = Config(case.path, 16 if case.M <= 16 else 32, case.block_n, case.split_k, num_warps=2, num_stages=4)
    if case.path == "decode" and case.split_k > -(-case.K // 256):
        config = Config("decode", config.block_m, case.block_n, 1, num_warps=2, num_stages=4)
    exact = torch.zeros(case.M, case.top, case.N, dtype=torch.float64)
    if case.rows == "experts":
        parts = [(*weight_of(case, generator), normal(case.N).to(dtype)) for _ in paths]
        packed = [
            fused_weight(g, *p, b if case.bias else None, dtype) for (g, _, b), p in zip(parts, paths, strict=True)
        ]
        chosen = torch.stack([torch.randperm(len(paths), generator=generator)[: case.top] for _ in range(case.M)])
        y = launch_experts(x, stack(packed), chosen, config)
        for (token, place), one in zip(
            ((t, j) for t in range(case.M) for j in range(case.top)), chosen.flatten().tolist(), strict=True
        ):
            _, W, bias = parts[one]
            exact[token, place] = product(x[token], W, *paths[one], bias if case.bias else None)
    else:
        grid, W = weight_of(case, generator)
        bias = normal(case.N).to(dtype) if case.bias else None
        weight = fused_weight(grid, *paths[0], bias, dtype).with_paths(paths)
        ids = torch.zeros(case.M, dtype=torch.int32)
        if case.rows == "rows":
            ids = torch.randint(-1, len(paths), (case.M,), generator=generator, dtype=torch.int32)
        y = launch(rows(x, weight), weight, config, ids if case.rows == "rows" else None)[:, None]
        none = x.new_zeros(0, case.K), x.new_zeros(case.N, 0)
        for row, one in enumerate(ids.tolist()):
            exact[row] = product(x[row], W, *(paths[one] if one >= 0 else none), bias)
        exact = exact[:, :1]
    return ((y.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def product(x, W, A, B, bias):
    """A row, in float64."""
    y = W @ x.double() + B.double() @ (A.double() @ x.double())
    return y if bias is None else y + bias.double()


def shuffle_programs(seed: int) -> None:
    """Let the interpreter run the programs of every launch in another order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    pick, dims, idx = random.Random(seed), type(builder).set_grid_dim, type(builder).set_grid_idx
    order: dict[tuple, tuple] = {}

    def set_grid_dim(x, y, z):
        places = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        order.clear()
        order.update(zip(places, pick.sample(places, len(places)), strict=True))
        dims(builder, x, y, z)

    builder.set_grid_dim = set_grid_dim
    builder.set_grid_idx = lambda x, y, z: idx(builder, *order[x, y, z])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_kernels", description=__doc__)
    parser.add_argument("cases", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    shuffle_programs(arguments.seed)
    failures = worst = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        case = draw(seed)
        try:
            error = relative_error(case)
            wrong = "" if error < TOLERANCE[case.dtype] else f"relative error {error:.1e}"
            worst = max(worst, error / TOLERANCE[case.dtype])
        except Exception as problem:  # the others still run
            wrong = f"{type(problem).__name__}: {problem}"
        if wrong:
            failures += 1
            print(f"{wrong}: {case}", flush=True)
    print(f"{arguments.cases} cases in shuffled order, {failures} failures, worst error {worst:.2f} of what is allowed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
