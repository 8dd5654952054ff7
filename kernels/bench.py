"""Time the fused kernels beside their peers and their floors on this machine's GPU, or with --cpu on its CPU.

Layers are as the default recipe makes them: groups of 64, float32 grids, rank 64. Writes kernels/results/<gpu>.json
after every layer, with what failed, and kernels/results/<gpu>.png/.svg at the end; with --cpu, which takes some ten
minutes, it prints tables and writes kernels/results/cpu/<processor>.json.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from eora_lab.errors import EoraLabError, one_line
from eora_lab.files import write_json
from eora_lab.plots import save
from kernels.figure import draw
from kernels.peers import GROUP, Layer, ours_merged, peers
from kernels.shapes import MERGED, MODELS, ROWS, Machine, floor_us
from kernels.stack import time_stack
from kernels.timing import copies_past_cache, measure_machine, median_us, require_gpu

RESULTS = Path(__file__).with_name("results")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
CHECKED_ROWS = 64


def check(name: str, y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm. Raises EoraLabError above the tolerance: a wrong result is not timed."""
    error = ((y[:CHECKED_ROWS].double() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[y.dtype]:
        raise EoraLabError(f"{name} is wrong: relative error {error:.1e} against float64")
    return error


def time_layer(name: str, N: int, K: int, bits: int, rank: int, dtype: torch.dtype, machine: Machine) -> list[dict]:
    """Every peer at every number of rows."""
    device = require_gpu()
    layer = Layer.random(N, K, bits, rank, device, dtype)
    copies = [layer] + [
        Layer.random(N, K, bits, rank, device, dtype) for _ in range(copies_past_cache(N * K * bits // 8, device) - 1)
    ]
    found = []
    for peer, (make, has_rank) in peers(layer).items():
        calls = [make(one) for one in copies]
        for M in ROWS:
            x = torch.randn(M, K, device=device).to(dtype)
            reference = layer if has_rank else layer.without_path()
            try:
                error = check(peer, calls[0](x), reference.exact(x[:CHECKED_ROWS]))
                time = median_us([lambda call=call, x=x: call(x) for call in calls])
            except (EoraLabError, RuntimeError) as problem:  # the others are still timed
                found.append(dict(layer=name, N=N, K=K, M=M, peer=peer, failed=one_line(problem)))
                continue
            weight_bits, path = (16 if peer == "dense16" else bits), rank if has_rank else 0
            floor = floor_us(M, N, K, weight_bits, path, machine, GROUP, 32)
            found.append(dict(layer=name, N=N, K=K, M=M, peer=peer, us=time, floor_us=floor, error=error))
    return found


def time_merged(model: str, name: str, bits: int, rank: int, dtype: torch.dtype, machine: Machine) -> list[dict]:
    """Layers with the same input as one launch."""
    device = require_gpu()
    shapes = [MODELS[model].linears[part] for part in MERGED[name]]
    K, N = shapes[0][1], sum(n for n, _ in shapes)
    count = copies_past_cache(N * K * bits // 8, device)
    sets = [[Layer.random(n, k, bits, rank, device, dtype) for n, k in shapes] for _ in range(count)]
    calls = [ours_merged(layers) for layers in sets]
    found = []
    for M in ROWS:
        x = torch.randn(M, K, device=device).to(dtype)
        expected = torch.cat([layer.exact(x[:CHECKED_ROWS]) for layer in sets[0]], 1)
        error = check(f"merged {name}", calls[0](x), expected)
        time = median_us([lambda call=call, x=x: call(x) for call in calls])
        floor = sum(floor_us(M, n, k, bits, rank, machine, GROUP, 32) for n, k in shapes)
        found.append(dict(layer=name, N=N, K=K, M=M, peer="fused_merged", us=time, floor_us=floor, error=error))
    return found


def bench(models: list[str], rank: int, dtypes: list[str], stack: bool) -> dict:
    device = require_gpu()
    machine = measure_machine(device)
    result = {
        "gpu": machine.name,
        "date": date.today().isoformat(),
        "command": " ".join(["python -m kernels.bench", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "bandwidth": machine.bandwidth,
        "rate": machine.rate,
        "layers": [],
        "stack": [],
    }
    work = [(model, dtype, bits) for model in models for dtype in dtypes for bits in (4, 3)]
    for model, dtype_name, bits in tqdm(work, desc="layers"):
        dtype = getattr(torch, dtype_name)
        common = {"model": model, "dtype": dtype_name, "bits": bits, "rank": rank}
        shapes = {shape: name for name, shape in reversed(MODELS[model].linears.items())}  # equal shapes once
        for (N, K), name in shapes.items():
            result["layers"] += [common | row for row in time_layer(name, N, K, bits, rank, dtype, machine)]
            write_json(result_path(result), result)
        for name in MERGED:
            result["layers"] += [common | row for row in time_merged(model, name, bits, rank, dtype, machine)]
    if stack:
        result["stack"] = time_stack("llama-3-8b", rank, device)
    write_json(result_path(result), result)
    return result


def result_path(result: dict) -> Path:
    return RESULTS / f"{result['gpu'].replace(' ', '-')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    parser.add_argument("--no-stack", action="store_true", help="leave out the whole LLaMA-3-8B-shaped model")
    parser.add_argument("--cpu", action="store_true", help="packed layers and SmolLM2-135M on the CPU; see --rounds")
    parser.add_argument("--rounds", type=int, default=30, help="how often everything is timed on the CPU")
    arguments = parser.parse_args()
    try:
        if arguments.cpu:
            from kernels.bench_cpu import bench_cpu

            command = " ".join(["python -m kernels.bench", *sys.argv[1:]])
            result = {"command": command} | bench_cpu(arguments.rounds)
            write_json(RESULTS / "cpu" / f"{result['machine']['processor'].replace(' ', '-')}.json", result)
            return
        result = bench(arguments.models, arguments.rank, arguments.dtypes, not arguments.no_stack)
        path = result_path(result)
        print(path, *save(draw(result), path.with_suffix("")), sep="\n")
    except EoraLabError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
