"""What the backward pass costs beside a forward pass: `python -m docs.gradients --nsamples 4 --seqlen 512`.

Counted operations (products of matrices and attention, a multiplication and an addition each one) and seconds, both in
one process, of the embedded model. Forward: the model as it is, logits included. Backward: `collect_output_statistics`.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from eora_lab import collect_output_statistics, load_model
from eora_lab.calibrate.moments import PANEL
from eora_lab.model.structure import block_linears
from eora_lab.products import fast_products


def measured(run: Callable[[], object]) -> tuple[int, float]:
    """Counted operations and seconds of two runs: counting takes time."""
    with FlopCounterMode(display=False) as counter:
        run()
    start = time.perf_counter()
    run()
    return counter.get_total_flops(), time.perf_counter() - start


def moments(features: int) -> int:
    """Operations a token of a second moment, which are added in place and not counted."""
    return sum(2 * min(PANEL, features - start) * (features - start) for start in range(0, features, PANEL))


def main() -> None:
    """Print both, and their ratios."""
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

    collect_output_statistics(model, tokens[:1], progress=False)  # warm
    ahead, seconds = measured(forward)
    back, longer = measured(lambda: collect_output_statistics(model, tokens, progress=False))
    sums = tokens.numel() * sum(moments(one.out_features) for one in block_linears(model).values())
    print(f"forward   {ahead / 1e12:.3f} T operations, {seconds:.1f} s")
    print(f"backward  {back / 1e12:.3f} T, and {sums / 1e12:.3f} T of F, {longer:.1f} s")
    print(f"          {(back + sums) / ahead:.2f} times the operations, {longer / seconds:.2f} times the seconds")


if __name__ == "__main__":
    main()
