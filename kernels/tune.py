"""Choose block sizes for this machine's GPU and write them where the package finds them.

For every shape, by default those of layers as the default recipe makes them (groups of 64, float32 grids, rank 64),
candidates are compiled ahead; those that spill are dropped; the others are timed on weights that rotate past L2, and
the fastest is kept, with the rule's choice among them. Many rows also compare with cuBLAS on the weight made dense. The
file is written after every shape, and shapes that it has are passed over, so that a stopped run goes on where it was.
"""

import argparse
import functools
import json
import sys
from datetime import date

import torch
import triton
from tqdm import tqdm

from eora_lab.errors import EoraLabError
from eora_lab.files import write_json
from eora_lab.layer.triton_kernels import FusedWeight
from eora_lab.layer.triton_kernels.configs import SPLITS, Config, Gpu, bucket, gpu_of, key, rule, tuned_path
from eora_lab.layer.triton_kernels.launch import launch
from eora_lab.layer.triton_kernels.ptx import PLANES
from kernels.peers import GROUP, Layer
from kernels.shapes import MERGED, MODELS
from kernels.timing import copies_past_cache, median_us, require_gpu

ROWS = (1, 32, 64, 128, 256, 512, 1024)
SECONDS = 0.15  # of a candidate: its graph, 33 replays of some 20 calls each; compiling comes once for all shapes


def candidates(rows: int, columns: int, channels: int, bits: int, group: int, gpu: Gpu) -> list[Config]:
    """The rule's choice, and what may beat it."""
    found = [rule(rows, columns, channels, bits, group, gpu)]
    early = gpu.capability >= 90
    blocks = -(-channels // (16 * PLANES[bits]))
    if rows <= 64:
        tiles = [(64, 2, 4), (64, 2, 3), (128, 2, 3), (128, 4, 3)]
        splits = [split for split in SPLITS if split <= blocks]
        found += [
            Config("decode", min(bucket(rows), 32), n, split, num_warps=warps, num_stages=stages, pdl=early)
            for n, warps, stages in tiles
            for split in splits
        ]
    if rows > 32:
        found += [
            Config("prefill", m, n, num_warps=warps, num_stages=stages)
            for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
            for stages in (2, 3)
        ]
    return list(dict.fromkeys([*found, Config("cublas")] if rows > 64 else found))


@functools.cache
def spills(config: Config, bits: int, group: int, capability: int, dtype: str) -> bool:
    """Also true of a configuration that does not compile. It does not depend on the shape."""
    from kernels.sass import compile_kernel

    if config.path == "cublas":
        return False
    name = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    try:
        report = compile_kernel(config.path, config, capability, bits=bits, group=group, dtype=name)
    except Exception:  # of many kinds: out of shared memory, or a compiler's own
        return True
    return report.spills > 0 or report.tensor_core == 0


def fastest(
    rows: int, weights: list[FusedWeight], x: torch.Tensor, gpu: Gpu, dtype: str
) -> tuple[Config, float, float]:
    """The best configuration, its microseconds, and those of the rule's."""
    first, times = weights[0], {}
    shape = first.planes.shape[1], first.in_features, first.bits, first.group
    for config in candidates(rows, *shape, gpu):
        if not spills(config, first.bits, first.group, gpu.capability, dtype):
            try:
                times[config] = median_us([lambda w=w, config=config: launch(x, w, config) for w in weights])
            except triton.runtime.errors.OutOfResources:
                continue
    best = min(times, key=times.get)
    return best, times[best], times.get(rule(rows, *shape, gpu), float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-3-8b"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group", type=int, default=GROUP, choices=(16, 32, 64, 128))
    parser.add_argument("--bits", nargs="+", type=int, choices=(3, 4), default=[4, 3])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["bfloat16"])
    arguments = parser.parse_args()
    try:
        tune(arguments)
    except EoraLabError as error:
        sys.exit(f"error: {error}")


def tune(arguments: argparse.Namespace) -> None:
    device = require_gpu()
    properties = torch.cuda.get_device_properties(device)
    gpu = gpu_of(device)
    shapes = set()
    for model in arguments.models:
        linears = MODELS[model].linears
        shapes |= set(linears.values())
        shapes |= {(sum(linears[p][0] for p in parts), linears[parts[0]][1]) for parts in MERGED.values()}
    work = [(*shape, bits, dtype) for shape in sorted(shapes) for bits in arguments.bits for dtype in arguments.dtypes]
    many = sum(len(candidates(rows, *one[:3], arguments.group, gpu)) for one in work for rows in arguments.rows)
    print(f"{len(work)} weights, {many} candidates: about {many * SECONDS / 60 + 2:.0f} minutes")
    path = tuned_path(properties.name, triton.__version__)
    result = json.loads(path.read_text()) if path.is_file() else {"choices": {}, "us": {}, "rule_us": {}}
    for N, K, bits, dtype in tqdm(work):
        kind, shape = getattr(torch, dtype), (N, K, bits, arguments.group, arguments.rank)
        names = {rows: key(rows, *shape, f"torch.{dtype}") for rows in arguments.rows}
        if all(name in result["choices"] for name in names.values()):
            continue
        count = copies_past_cache(N * K * bits // 8, device)
        weights = [
            Layer.random(N, K, bits, arguments.rank, device, kind, arguments.group).fused() for _ in range(count)
        ]
        for rows, name in names.items():
            x = torch.randn(rows, K, device=device).to(kind)
            best, result["us"][name], result["rule_us"][name] = fastest(rows, weights, x, gpu, dtype)
            result["choices"][name] = vars(best)
        write_json(path, result | {"date": date.today().isoformat()})
    print(path)


if __name__ == "__main__":
    main()
