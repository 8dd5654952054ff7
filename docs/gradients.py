"""What the backward pass costs beside forward passes: `python -m docs.gradients --nsamples 4 --seqlen 512`.

Counted operations (of products and attention; a multiplication and an addition are two) and seconds, all in one
process, of the embedded model. Forward: the model as it is, logits included. Statistics: `collect_statistics`, a
forward pass without logits that adds up S. Backward: `collect_output_statistics`, forward and back, which adds up F.
"""

import argparse
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from eora_lab import block_linears, collect_output_statistics, collect_statistics, load_model
from eora_lab.calibrate.moments import PANEL
from eora_lab.products import fast_products


def measured(run: Callable[[], object]) -> tuple[int, float]:
    """Counted operations and seconds of two runs: counting takes time."""
    with FlopCounterMode(display=False) as counter:
        run()
    start = time.perf_counter()
    run()
    return counter.get_total_flops(), time.perf_counter() - start


def moments(sizes: Iterable[int]) -> int:
    """Operations a token of second moments of these sizes. They are added in place, which the counter does not see."""
    return sum(2 * min(PANEL, size - start) * (size - start) for size in sizes for start in range(0, size, PANEL))


def main() -> None:
    """Print all three, and their ratios to the backward pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    model = load_model(given.model)[0]
    shape = given.nsamples, given.seqlen
    tokens = torch.randint(100, 1000, shape, generator=torch.Generator().manual_seed(0))

    @fast_products()
    @torch.no_grad()
    def forward() -> None:
        for one in tokens:
            model(one[None], use_cache=False)

    kept = collect_statistics(model, tokens[:1], progress=False)  # warm, too
    inputs = {id(one): one.in_features for one in kept.values()}.values()
    outputs = [one.out_features for one in block_linears(model).values()]
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "backward": (lambda: collect_output_statistics(model, tokens, progress=False), moments(outputs)),
        "statistics": (lambda: collect_statistics(model, tokens, progress=False), moments(inputs)),
        "forward": (forward, 0),
    }
    found = {}
    for name, (run, sums) in runs.items():
        counted, seconds = measured(run)
        found[name] = counted + sums * tokens.numel(), seconds
        print(f"{name:10}  {found[name][0] / tokens.numel() / 1e6:6.0f} M operations a token, {seconds:6.2f} s")
    for name in ("statistics", "forward"):
        operations, seconds = (one / other for one, other in zip(found["backward"], found[name], strict=True))
        print(f"backward / {name}: {operations:.2f} of operations, {seconds:.2f} of seconds")


if __name__ == "__main__":
    main()
