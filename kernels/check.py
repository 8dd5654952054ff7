"""The first command on a new machine: who multiplies compressed layers here and why, whether the result is right, and
how far its time is from the floor. About a minute, with a GPU or without.

A floor is the bytes of a product over the bandwidth that this machine shows when it reads or copies, or its operations
over the rate of a large product, where that takes longer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import GridWeight
from eora_lab.environment import processor, versions
from eora_lab.layer.backends import reasons
from eora_lab.layer.linear import CompensatedLinear
from kernels.peers import GROUP, Layer
from kernels.shapes import Machine, floor_us
from kernels.timing import measure_machine, median_us

ROWS = (1, 16, 256)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # bfloat16: up to three roundings
KINDS = {"W4": 4, "W3": 3, "W3 2:4": 3, "W8": 8}


def layer(kind: str, size: int, rank: int, device: torch.device, dtype: torch.dtype) -> CompensatedLinear:
    """A square layer of the default recipe's format with random numbers."""
    random = Layer.random(size, size, KINDS[kind], rank, device, dtype)
    grid = random.grid
    if kind.endswith("2:4"):
        mask = torch.rand(size, size // 4, 4, device=device).argsort(-1).flatten(1) < 2
        zeros = torch.full(grid.offsets.shape, 2 ** (grid.bits - 1), dtype=torch.uint8, device=device)
        grid = replace(grid, codes=grid.codes * mask, offsets=zeros, mask=mask)
    old = nn.utils.skip_init(nn.Linear, size, size, bias=False, device=device, dtype=dtype)
    return CompensatedLinear(old, grid, StoredFactors(random.A.half(), random.B.half()))


def exact(one: CompensatedLinear, x: Tensor) -> Tensor:
    """y in float64, from the codes as they are stored."""
    weight = one.compressed
    assert isinstance(weight, GridWeight)
    codes = weight.codes.double().unflatten(1, (-1, weight.group_size))
    scales, offsets = weight.scales.double()[..., None], weight.offsets.double()[..., None]
    W = (codes - offsets) * scales if weight.offsets.dtype == torch.uint8 else codes * scales + offsets
    W = W.flatten(1) if weight.mask is None else W.flatten(1) * weight.mask
    x = x.double()
    return x @ W.T + x @ one.lora_A.double().T @ one.lora_B.double().T


def host_us(call: Callable[[], object], seconds: float) -> list[float]:
    """Microseconds of each of some calls on the CPU."""
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return [1e6 * one for one in times]


def measure_host(seconds: float, size: int) -> Machine:
    """This machine's processors, with torch's threads: reading memory, and a float32 product."""
    source, square = torch.randn(2**16 * size // 16), torch.randn(size, size)
    read = min(host_us(lambda: source.sum(), seconds))  # a floor is of the machine at its best
    product = min(host_us(lambda: square @ square, seconds))
    return Machine(processor(), source.nbytes / read * 1e6, 2 * size**3 / product * 1e6)


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype, machine: Machine, size: int, rank: int, seconds: float) -> int:
    """Print a line for every layer and number of rows, and why others do not compute. Returns how many are wrong."""
    wrong, said = 0, {}
    for kind in KINDS:
        one = layer(kind, size, rank, device, dtype)
        for rows in ROWS:
            why = reasons(one, rows)
            who = next(name for name, reason in why.items() if not reason)
            said |= {(kind, name): reason for name, reason in why.items() if reason and "slower" not in reason}
            x = torch.randn(rows, size, device=device).to(dtype)
            expected = exact(one, x)
            error = ((one(x).double() - expected).norm() / expected.norm()).item()
            if device.type == "cuda":
                spent = median_us([lambda one=one, x=x: one(x)]) if who == "triton" else float("nan")
            else:
                spent = statistics.median(host_us(lambda one=one, x=x: one(x), seconds))
            bits = KINDS[kind] * (0.5 if kind.endswith("2:4") and who != "triton" else 1)
            floor = floor_us(rows, size, size, bits, rank, machine, GROUP, 32)
            bad = not error < TOLERANCE[dtype]
            wrong += bad
            verdict = "WRONG" if bad else "right"
            times = f"{spent:10.1f} us {floor:9.1f} us {spent / floor:7.1f}x"
            print(f"{kind:7} {rows:5} {who:8} {times} {error:9.1e} {verdict}")
    for reason in dict.fromkeys(said.values()):
        names = [f"{name} ({kind})" for (kind, name), one in said.items() if one == reason]
        print(f"  not by {', '.join(names)}: {reason}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="of the square layers")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a timing on the CPU")
    arguments = parser.parse_args()
    sizes = arguments.size, arguments.rank, arguments.seconds
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    wrong = 0
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        if device.type == "cuda":
            machine, dtypes = measure_machine(device), (torch.bfloat16, torch.float16)
        else:
            machine, dtypes = (
                measure_host(arguments.seconds, min(arguments.size, 2048)),
                (torch.float32, torch.bfloat16),
            )
        print(f"\n{machine.name}: {machine.bandwidth / 1e9:.0f} GB/s, {machine.rate / 1e12:.2f} TFLOP/s")
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            print(f"\n{name} on {device.type}, {arguments.size} x {arguments.size}, rank {arguments.rank}:")
            print(f"{'layer':7} {'rows':>5} {'by':8} {'time':>13} {'floor':>12} {'':>8} {'error':>9}")
            wrong += check(device, dtype, machine, *sizes)
    print(f"\n{wrong} results are wrong: tell us" if wrong else "\nall results are right")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
