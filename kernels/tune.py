"""Choose block sizes for this machine's GPU and write them where the package finds them.

For every shape at most 12 candidates are compiled ahead; those that spill are dropped; the others are timed on weights
that rotate past L2, and the fastest is kept. Many rows also compare with cuBLAS on the weight made dense.
"""

import argparse
import sys
from datetime import date

import torch
import triton
from tqdm import tqdm

from eora_lab.errors import EoraLabError
from eora_lab.files import write_json
from eora_lab.layer.triton_kernels.configs import Config, bucket, key, tuned_path
from eora_lab.layer.triton_kernels.launch import launch
from kernels.peers import GROUP, Layer
from kernels.sass import compile_kernel
from kernels.shapes import MERGED, MODELS
from kernels.timing import copies_past_cache, median_us, require_gpu

ROWS = (1, 32, 64, 128, 256, 512, 1024)


def candidates(rows: int, capability: int) -> list[Config]:
    """At most 12."""
    if rows <= 64:
        block_m, pdls = min(bucket(rows), 32), (False, True) if capability >= 90 else (False,)
        blocks = [(64, 2, 4), (128, 4, 3)] if capability >= 90 else [(64, 2, 4), (64, 2, 3), (128, 4, 4), (128, 4, 3)]
        return [
            Config("decode", block_m, n, split, num_warps=warps, num_stages=stages, pdl=pdl)
            for n, warps, stages in blocks
            for split in (1, 4, 8)
            for pdl in pdls
        ]
    found = [Config("prefill", m, n, num_stages=stages) for m in (64, 128) for n in (64, 128) for stages in (2, 3)]
    return [*found, Config("cublas")]


def spills(config: Config, bits: int, capability: int, dtype: str) -> bool:
    """Also true of a configuration that does not compile."""
    if config.path == "cublas":
        return False
    name = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    try:
        report = compile_kernel(
            config.path, config, capability, bits=bits, group=GROUP, dtype=name, scales=name, offsets="u8"
        )
    except Exception:  # of many kinds: out of shared memory, or a compiler's own
        return True
    return report.spills > 0 or report.tensor_core == 0


def fastest(rows: int, N: int, K: int, bits: int, rank: int, dtype: str, capability: int) -> tuple[Config, float]:
    device, kind = require_gpu(), getattr(torch, dtype)
    count = copies_past_cache(N * K * bits // 8, device)
    weights = [Layer.random(N, K, bits, rank, device, kind).fused() for _ in range(count)]
    x = torch.randn(rows, K, device=device).to(kind)
    times = {}
    for config in candidates(rows, capability):
        if not spills(config, bits, capability, dtype):
            try:
                times[config] = median_us([lambda w=w, config=config: launch(x, w, config) for w in weights])
            except triton.runtime.errors.OutOfResources:
                continue
    best = min(times, key=times.get)
    return best, times[best]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    arguments = parser.parse_args()
    try:
        device = require_gpu()
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        shapes = set()
        for model in arguments.models:
            linears = MODELS[model].linears
            shapes |= set(linears.values())
            shapes |= {(sum(linears[p][0] for p in parts), linears[parts[0]][1]) for parts in MERGED.values()}
        work = [(*shape, bits, dtype) for shape in sorted(shapes) for bits in (4, 3) for dtype in arguments.dtypes]
        choices, microseconds = {}, {}
        for N, K, bits, dtype in tqdm(work):
            for rows in ROWS:
                best, time = fastest(rows, N, K, bits, arguments.rank, dtype, capability)
                name = key(rows, N, K, bits, GROUP, arguments.rank, f"torch.{dtype}")
                choices[name], microseconds[name] = vars(best), time
        path = tuned_path(properties.name, triton.__version__)
        write_json(path, {"date": date.today().isoformat(), "choices": choices, "us": microseconds})
        print(path)
    except EoraLabError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
