"""EoRA Lab beside GPTQModel on one machine: `EORA_LAB_DATA=... python -m docs.peers PYTHON`, a quarter of an hour. It
writes data/measured/peers.csv.

PYTHON is one of an environment of its own that has gptqmodel. It asks for a newer torch, but runs with this one:

    python -m venv peer; peer/bin/pip install torch==2.13.0 setuptools numpy; peer/bin/pip install --no-deps \
        --no-build-isolation gptqmodel==7.7.0; peer/bin/pip install accelerate transformers threadpoolctl device-smi \
        pypcre tokenicer logbar datasets dill torchao defuser maturin ninja

Both take SmolLM2-135M in the same files, GPTQ to 4 bits in groups of 64, and EoRA of rank 64, from the same 8 windows
of 512 tokens of WikiText-2. Every line is a process of its own, one after the other, with as many threads: `seconds`
and `cpu` are of all of it, `inside` without start and imports. GPTQModel makes both steps one by one in float16, the
type that its CPU kernel takes, and EoRA Lab in one pass in float32: first on symmetric grids with 16-bit scales as
GPTQModel has them, then by its defaults. Perplexities are all taken in the end, by EoRA Lab in float32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas
import torch

from docs.records import MEASURED
from eora_lab import Recipe, compress_model, load_model, load_run, perplexity, token_windows
from eora_lab.formats import read_checkpoint
from eora_lab.run.adapters import use_only
from eora_lab.run.folder import read_report

RECORD = MEASURED / "peers.csv"
SCRIPT = Path(__file__).with_name("peer_gptqmodel.py")
NSAMPLES, SEQLEN, BITS, GROUP, RANK = 8, 512, 4, 64, 64
TEXT, JUDGE = "wikitext2:validation", "wikitext2:test"
OURS = {"matched grids": "--sym --zero-point integer --scale-dtype float16", "its defaults": ""}
Row = dict[str, str | float]


def timed(command: list[str], threads: int, place: Path) -> tuple[Row, str]:
    """What a process takes, and what it printed. Ends with that where it fails."""
    log, started, peak, ended = place / "log", time.perf_counter(), 0, 0
    with open(log, "w") as file:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=place, env=env)
        while not ended:
            said = Path(f"/proc/{child.pid}/status").read_text()  # its rusage would begin with the memory of this one
            peak = max(
                peak, *(1024 * int(line.split()[1]) for line in said.splitlines() if line.startswith("VmHWM")), 0
            )
            time.sleep(0.02)
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{log.read_text()[-3000:]}\n{command[0]} failed: see above")
    found: Row = {"seconds": time.perf_counter() - started, "cpu": used.ru_utime + used.ru_stime, "peak": peak}
    return found, log.read_text()


def theirs(python: str, model: Path, tokens: torch.Tensor, threads: int, place: Path) -> Iterator[Row]:
    """GPTQModel, step by step."""
    asked = {"model": str(model), "tokens": tokens.tolist(), "rank": RANK, "threads": threads}
    asked |= {"quantised": str(place / "theirs"), "adapter": str(place / "adapter")}
    asked |= {"grid": {"bits": BITS, "group_size": GROUP, "sym": True}}
    for step in ("quantise", "eora"):
        found, said = timed([python, "-P", str(SCRIPT), step, json.dumps(asked)], threads, place)
        yield {"who": "GPTQModel", "step": step} | found | {"inside": float(said.rpartition("INSIDE ")[2])}


def ours(model: Path, threads: int, place: Path) -> Iterator[Row]:
    """EoRA Lab, both steps at once."""
    for name, settings in OURS.items():
        run = place / name.replace(" ", "-")
        command = [sys.executable, "-m", "eora_lab.cli", "compress", str(run), "--model", str(model), "--no-evaluate"]
        command += ["--compressor", "gptq", "--bits", str(BITS), "--group-size", str(GROUP), "--rank", str(RANK)]
        command += ["--calibration.source", TEXT, "--calibration.first", "--calibration.nsamples", str(NSAMPLES)]
        found, _ = timed([*command, "--calibration.seqlen", str(SEQLEN), *settings.split()], threads, place)
        yield {"who": "EoRA Lab", "step": name} | found | {"inside": sum(read_report(run).steps.values())}


def perplexities(model: Path, tokens: torch.Tensor, windows: torch.Tensor, place: Path) -> list[float]:
    """Of the rows, in their order."""
    base, _ = load_model(model)
    none = Recipe(method="none", rank=0, inputs="original")
    compress_model(base, tokens, none, weights=read_checkpoint(place / "theirs"), progress=False)
    found = [perplexity(base, windows)]
    use_only(base, place / "adapter")
    found.append(perplexity(base, windows))
    return found + [perplexity(load_run(place / name.replace(" ", "-"))[0], windows) for name in OURS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="that has gptqmodel")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, tokenizer = load_model("smollm2-135m")
        model.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
        tokens, windows = (token_windows(tokenizer, *one, SEQLEN) for one in ((TEXT, NSAMPLES), (JUDGE, 20)))
        del model
        rows = [*theirs(asked.python, place / "model", tokens, asked.threads, place)]
        rows += ours(place / "model", asked.threads, place)
        for row, found in zip(rows, perplexities(place / "model", tokens, windows, place), strict=True):
            row["perplexity"] = found
    frame = pandas.DataFrame(rows).round({"seconds": 1, "cpu": 1, "inside": 1, "perplexity": 3})
    frame["threads"] = asked.threads
    frame.to_csv(asked.record, index=False)
    print(frame.to_string(index=False))
    whole = frame[frame["who"] == "GPTQModel"]["seconds"].sum()
    for row in frame[frame["who"] == "EoRA Lab"].itertuples():
        print(f"EoRA Lab, {row.step}: {whole / row.seconds:.1f} times as fast as both steps of GPTQModel")


if __name__ == "__main__":
    main()
