"""Time GPU work: CUDA graphs of many calls on rotating weights, events around the replays, the median."""

import statistics
from collections.abc import Callable, Sequence

import torch

from eora_lab.errors import EoraLabError
from kernels.shapes import Machine


def require_gpu() -> torch.device:
    """Raises EoraLabError where there is no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise EoraLabError("timing needs an NVIDIA GPU, and torch sees none; run this on a machine with one")
    return torch.device("cuda", torch.cuda.current_device())


def copies_past_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of a weight are needed so that none is still in L2 when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // max(nbytes, 1)))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls. They run once before, on the capturing stream, so that nothing is compiled inside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def median_us(calls: Sequence[Callable[[], object]], repeats: int = 30) -> float:
    """Median microseconds of one call; `calls` do the same on different weights."""
    rounds = max(1, 20 // len(calls))
    graph = capture(list(calls) * rounds)
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 1e3 * statistics.median(times[3:]) / (len(calls) * rounds)


def measure_machine(device: torch.device) -> Machine:
    """Bandwidth of a large copy (bytes read plus written) and rate of a large bf16 product on random data."""
    source = torch.randn(2**30 // 4, device=device)
    target = torch.empty_like(source)
    copy = median_us([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_us([lambda: a @ b])
    name = torch.cuda.get_device_name(device)
    return Machine(name, 2 * source.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6)
