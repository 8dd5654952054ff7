"""Cases for the Triton kernels. Run: Triton's interpreter, and each case's error against float64 as a JSON line.

A process of its own (`python -m tests.interpreted`), because the interpreter must be chosen before Triton is imported.
Uninitialised memory is filled with NaN, so that an element that a kernel forgets or reads too early is seen.
"""

import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One product. group -1: one scale a row. zero: "float", "integer" or "sym". layout: of x in memory."""

    path: str
    dtype: str
    bits: int
    group: int
    zero: str
    M: int
    N: tuple[int, ...]  # several: merged layers
    K: int
    ranks: tuple[int, ...]
    bias: bool
    split_k: int = 1
    layout: str = "contiguous"
    scales: str = "float32"
    act_order: bool = False
    values: str = "usual"  # of x: or "far from zero", "one large channel", "tiny"

    @property
    def name(self) -> str:
        sizes = "+".join(map(str, self.N)), "+".join(map(str, self.ranks))
        return (
            f"{self.path}-{self.dtype}-w{self.bits}-g{self.group}-{self.zero}-m{self.M}-n{sizes[0]}-k{self.K}-r{sizes[1]}"
            f"-split{self.split_k}-{self.layout}{'-bias' if self.bias else ''}{'-act_order' if self.act_order else ''}"
            f"{'' if self.values == 'usual' else '-' + self.values}"
        )


def cases() -> list[Case]:
    """Every dtype x bits x group x zero point for decoding, the other properties cycling; then the other paths."""
    cycle = itertools.cycle
    M, N, rank = (
        cycle([1, 2, 16, 3, 17, 33, 7]),
        cycle([(5,), (36,), (129,), (64,), (200,)]),
        cycle([0, 1, 7, 16, 40, 64, 128, 200]),
    )
    split, bias, scales = cycle([1, 2, 5]), cycle([True, False]), cycle(["float32", "float16", "float32"])
    groups, layout = cycle([3, 5, 9, 2]), cycle(["contiguous", "rows apart", "columns apart", "transposed"])
    channels = cycle([77, 391, 640])

    def case(path: str, dtype: str, bits: int, group: int, zero: str, **others) -> Case:
        K = next(channels) if group == -1 else group * next(groups)
        return Case(
            path, dtype, bits, group, zero, bias=next(bias), layout=next(layout), scales=next(scales),
            **({"K": K, "M": next(M), "N": next(N), "ranks": (next(rank),)} | others),
        )  # fmt: skip

    grid = itertools.product(("float16", "bfloat16"), (3, 4), (32, 64, 128, -1), ("float", "integer", "sym"))
    found = [case("decode", *choice, split_k=next(split)) for choice in grid]
    grid = itertools.product(("prefill", "cublas"), ("float16", "bfloat16"), (3, 4), (32, 128, -1))
    rows = cycle([65, 70, 3])
    found += [case(*choice, "integer" if i % 2 else "float", M=next(rows)) for i, choice in enumerate(grid)]
    found += [
        case(path, dtype, bits, 64, "float", M=5, N=(130, 36, 36), ranks=(16, 7, 0), split_k=2)
        for path in ("decode", "prefill", "cublas")
        for dtype, bits in (("float16", 3), ("bfloat16", 4))
    ]
    found += [
        case("decode", "float16", bits, group, "integer", act_order=True) for bits in (3, 4) for group in (32, 96, 192)
    ]
    found += [
        case("decode", "float16", bits, group, "float", values=values)
        for bits, group in ((4, 128), (3, -1))
        for values in ("far from zero", "one large channel", "tiny")
    ]
    found += [
        case("decode", "float16", bits, 48, "float", K=100 + bits, split_k=2) for bits in (3, 4)
    ]  # last one short
    return found


def relative_error(case: Case, seed: int, device: str = "cpu") -> float:
    """||y - reference|| / ||reference||, the reference in float64 from the codes themselves."""
    from eora_lab.compress import GridWeight
    from eora_lab.layer.triton_kernels import fused_weight
    from eora_lab.layer.triton_kernels.launch import launch
    from eora_lab.layer.triton_kernels.op import rows
    from kernels.merge import merge

    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    integers = lambda high, *shape: torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    dtype, scale_dtype = getattr(torch, case.dtype), getattr(torch, case.scales)
    x = normal(case.M, case.K) + 0.5
    if case.values == "far from zero":
        x += 50
    elif case.values == "one large channel":
        x[:, 7] *= 1000
    elif case.values == "tiny":
        x *= 1e-4
    x = arrange(x.to(dtype).to(device), case.layout)
    group_size = case.K if case.group == -1 else case.group
    groups = -(-case.K // group_size)
    index = torch.arange(case.K) // group_size
    if case.act_order:
        index = index[torch.randperm(case.K, generator=generator)]
    layers, reference = [], []
    for N, rank in zip(case.N, case.ranks, strict=True):
        codes = integers(2**case.bits, N, case.K)
        scales = (0.01 + 0.02 * normal(N, groups).abs()).to(scale_dtype)
        if case.zero == "float":
            offsets = (-scales.float() * (2**case.bits - 1) * (0.5 + 0.1 * normal(N, groups))).to(scale_dtype)
            W = codes.double() * scales.double()[:, index] + offsets.double()[:, index]
        else:
            zeros = integers(2**case.bits, N, groups)
            offsets = torch.full_like(zeros, 2 ** (case.bits - 1)) if case.zero == "sym" else zeros
            W = (codes.double() - offsets.double()[:, index]) * scales.double()[:, index]
        A, B = (normal(rank, case.K) / case.K**0.5).to(dtype), (0.3 * normal(N, rank)).to(dtype)
        bias = normal(N).to(dtype) if case.bias else None
        order = index.int() if case.act_order else None
        grid = GridWeight(codes, scales, offsets, case.bits, None, group_size, order)
        layers.append(fused_weight(grid, A, B, bias, dtype))
        y = x.cpu().double() @ W.T + x.cpu().double() @ A.double().T @ B.double().T
        reference.append(y + bias.double() if case.bias else y)
    weight = (merge(layers) if len(layers) > 1 else layers[0]).to(device)
    y = launch(rows(x, weight), weight, blocks(case, 64 if case.M <= 16 else 128, device)).cpu().double()
    expected = torch.cat(reference, 1)
    return ((y - expected).norm() / expected.norm()).item()


def overflown(path: str, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """y of five rows, and y with Inf in the second row of x and NaN in the fourth."""
    from eora_lab.compress import GridWeight
    from eora_lab.layer.triton_kernels import fused_weight
    from eora_lab.layer.triton_kernels.configs import Config
    from eora_lab.layer.triton_kernels.launch import launch

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 300), generator=generator, dtype=torch.uint8)
    scales, A, B, x = (torch.rand(shape, generator=generator) for shape in ((40, 5), (3, 300), (40, 3), (5, 300)))
    weight = fused_weight(GridWeight(codes, scales, -7.3 * scales, 4, group_size=64), A / 300, B).to(device)
    x = x.half().to(device)
    broken = x.clone()
    broken[1, 70], broken[3, 299] = torch.inf, torch.nan
    return tuple(launch(one, weight, Config(path, split_k=2)) for one in (x, broken))


def blocks(case: Case, columns: int, device: str) -> "Config":
    """As the rule ships them, but for the split, the columns and, where there is no GPU to see it, the early launch."""
    from eora_lab.layer.triton_kernels.configs import Config

    shipped = {"num_warps": columns // 32, "num_stages": 4} if case.path == "decode" else {}
    early = device != "cpu" and case.path == "decode" and torch.cuda.get_device_capability() >= (9, 0)
    block_m = 16 if case.M <= 16 else 32
    return Config(case.path, block_m, columns, case.split_k, pdl=early, **shipped)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, laid out otherwise; the gaps are NaN."""
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "contiguous":
        return x
    step = (1, 3) if layout == "columns apart" else (3, 1)
    wide = x.new_full((x.shape[0] * step[0], x.shape[1] * step[1]), torch.nan)
    wide[:: step[0], :: step[1]] = x
    return wide[:: step[0], :: step[1]]


def main() -> None:
    """Arguments: what case names must contain."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for seed, case in enumerate(cases()):
        if not all(part in case.name for part in sys.argv[1:]):
            continue
        try:
            error = relative_error(case, seed)
        except Exception as problem:  # the others still run
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"name": case.name, "error": error} | asdict(case)), flush=True)


if __name__ == "__main__":
    main()
