"""Tokens a second of one model with several task adapters: each text of a batch with its own, beside switching.

    python -m kernels.adapters --adapters 8

Layers of the embedded model are rounded to a grid, and the adapters are random: speed does not depend on their numbers.
Three ways write the same: one batch, each text with its own adapter; the texts one after another, the adapter switched
before each; and one batch with one adapter, which is what a batch costs without them.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from eora_lab import load_model
from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import rtn
from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import CompensatedLinear, backends_in_use, compensated
from eora_lab.model.generate import generate, generate_each
from eora_lab.model.structure import block_linears
from eora_lab.run.adapters import Adapters

PROMPT = "The quick brown fox jumps over the lazy dog, and then"


def compress(model: nn.Module, bits: int) -> None:
    """Round the linear layers of every block, in place, without a path."""
    for name, old in block_linears(model).items():
        weight = rtn(old.weight.detach().float(), None, bits=bits, group_size=64)
        none = StoredFactors(torch.zeros(0, old.in_features), torch.zeros(old.out_features, 0))
        model.set_submodule(name, CompensatedLinear(old, weight, none))


def tokens_a_second(write: Callable[[], object], tokens: int, repeats: int) -> float:
    """The median over some runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        write()
        times.append(time.perf_counter() - start)
    return tokens / sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    try:
        model, tokenizer = load_model(arguments.model, dtype, device)
    except EoraLabError as error:
        sys.exit(f"error: {error}")
    model.generation_config.eos_token_id = None  # every text is written to its end
    compress(model, arguments.bits)
    adapters, names = Adapters(model), [f"task {i}" for i in range(arguments.adapters)]
    for name in names:
        paths = {
            key: (
                torch.randn(arguments.rank, one.in_features) / 100,
                torch.randn(one.out_features, arguments.rank) / 100,
            )
            for key, one in compensated(model).items()
        }
        adapters.add(name, paths)
    prompts, each = [PROMPT] * len(names), arguments.tokens

    def batch() -> list[str]:
        with adapters.batch(names):
            return generate_each(model, tokenizer, prompts, each)

    def switching() -> list[str]:
        written = []
        for name in names:
            adapters.use(name)
            written.append(generate(model, tokenizer, PROMPT, each))
        return written

    def one() -> list[str]:
        adapters.use(names[0])
        return generate_each(model, tokenizer, prompts, each)

    used = ", ".join(f"{count} layers by {name}" for name, count in backends_in_use(model).items())
    print(f"{arguments.model}, {arguments.bits} bits, {dtype} on {device}, {torch.get_num_threads()} threads, {used}")
    for label, write in (
        (f"{len(names)} texts in a batch, each with its own adapter of rank {arguments.rank}", batch),
        ("the same one after another, switching", switching),
        ("a batch with one adapter", one),
    ):
        speed = tokens_a_second(write, len(names) * each, arguments.repeats)
        print(f"{speed:8.1f} tokens/s  {label}")


if __name__ == "__main__":
    main()
