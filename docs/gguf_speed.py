"""Tokens a second of GGUF files in llama.cpp, with and without an adapter: `python -m docs.gguf_speed`, some minutes.

It writes data/measured/gguf-speed.csv. The files have the sizes of those of `docs.gguf`; the numbers in an adapter do
not matter here. Every round runs all adapters of a type one after the other, so that a busy machine slows all of them;
given are medians over the rounds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas
import torch

from docs.gguf import LINES, MIXTURES, widened, write_base
from docs.records import MEASURED
from eora_lab import LlamaCpp, block_linears, load_model
from eora_lab.formats import write_gguf_adapter

RECORD = MEASURED / "gguf-speed.csv"
PROMPT, COUNT, ROUNDS = list(range(100, 116)), 64, 7


def tokens_per_second(llama: LlamaCpp) -> float:
    """Of a greedy text after a short prompt. The prompt takes its own time."""
    started = time.perf_counter()
    llama.logits(PROMPT)
    prompt = time.perf_counter() - started
    llama.continue_greedily(PROMPT, COUNT)
    return (COUNT - 1) / (time.perf_counter() - started - 2 * prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(MIXTURES), help="of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = widened(load_model("smollm2-135m")[0])
    factors = {
        name: (1e-4 * torch.randn(64, linear.in_features), 1e-4 * torch.randn(linear.out_features, 64))
        for name, linear in block_linears(model).items()
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = {(0, ""): None} | {
            (rank, kind): Path(folder) / f"{rank}{kind}.gguf" for _, rank, kind in LINES if rank
        }
        for (rank, kind), path in adapters.items():
            if path:
                cut = {name: (A[:rank], B[:, :rank]) for name, (A, B) in factors.items()}
                write_gguf_adapter(path, cut, model, kind)
        for kind in options.types:
            base = Path(folder) / "base.gguf"
            write_base(base, model, kind)
            running = {key: LlamaCpp(base, path, threads=options.threads) for key, path in adapters.items()}
            rounds = [{key: tokens_per_second(llama) for key, llama in running.items()} for _ in range(ROUNDS)]
            for (rank, factor_type), llama in running.items():
                found = statistics.median(one[rank, factor_type] for one in rounds)
                rows.append((kind, rank, factor_type, options.threads, round(found, 1)))
                print(*rows[-1], flush=True)
                llama.close()
    frame = pandas.DataFrame(rows, columns=["type", "rank", "factors", "threads", "tokens_per_second"])
    frame.to_csv(options.record, index=False)


if __name__ == "__main__":
    main()
