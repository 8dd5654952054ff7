"""Peak memory and time of a pass against the sizes of a model: `python -m docs.scale FOLDER`, on random weights.

Every line is one command, `eora-lab mend` of a Q4_0 file or `eora-lab compress` to RTN 3-bit, in a process of its own,
on a model of the shape asked for (`docs.scale_models`). It is kept in the folder for the next time.

`anonymous` is the memory of that process that the system cannot take back, looked at every 20 ms. The rest of `peak` is
pages of files, of which it keeps as many as there is room for. `reported` and `predicted` are what the run's own report
says of `anonymous`: of the pass and of judging, without loading. `pass` is what the pass itself took of the `seconds`,
after loading and before judging: running the blocks takes `forward` of it, measuring their inputs `statistics`, and so
on, as the report says. `ratio` is `pass` over `forward` and `solve`, the low-rank paths, alone. Where several numbers
of blocks are asked for, the spread of the peaks is told in the end.

With --kill the command runs twice more: into another folder until half of the blocks are done, when SIGKILL ends it in
the middle of one, and again to its end. `resumed` says whether all files are then those of the first run ("same", or
how many differ), and peaks are the highest of all.

A hard limit shows that pages of files are not needed. As root, with cgroups of version 1, where the files must not lie
in memory that others account for, the shape of LLaMA-3-8B in 5 GB:

    mkdir /sys/fs/cgroup/memory/eora; echo 5000000000 > /sys/fs/cgroup/memory/eora/memory.limit_in_bytes
    python -m docs.scale /tmp/scale --task compress --hidden 4096 --ffn 14336 --kv-heads 8 --vocabulary 128256 \
        --blocks 32 --tokens 2048 --kill --record --cgroup /sys/fs/cgroup/memory/eora

Does the memory grow with the number of blocks:

    python -m docs.scale /tmp/scale --task compress --blocks 8 16 32 --tokens 16384 --record
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas

from docs.records import MEASURED
from docs.run_files import differing
from docs.scale_models import HEAD, INDEX, Shape, make, make_file
from eora_lab.run.folder import read_report

RECORD = MEASURED / "scale.csv"
SETTINGS = ("task", "hidden", "ffn", "kv_heads", "vocabulary", "blocks", "tokens", "rank", "limit")
STEPS = ("forward", "statistics", "compress", "solve", "errors", "files")
FOUND = ("seconds", "peak", "anonymous", "reported", "predicted", "pass", *STEPS, "ratio", "resumed")


def measure(command: list[str], cgroup: Path | None, until: Callable[[], bool] | None = None) -> dict[str, float]:
    """Run a command in a process of its own, in a memory cgroup if one is named: seconds, and bytes at the highest.

    until: looked at every 20 ms; the process is killed once it holds.
    Raises CalledProcessError when the command fails, or ends before it is killed.
    """

    def enter() -> None:
        if cgroup:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    started, most = time.perf_counter(), {"VmRSS": 0, "RssAnon": 0}
    child = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        said = dict(line.split(":", 1) for line in lines)
        most = {name: max(value, 1024 * int(said.get(name, "0").split()[0])) for name, value in most.items()}
        time.sleep(0.02)
        if until and until():
            child.kill()
            child.wait()
    if child.returncode != (-signal.SIGKILL if until else 0):
        raise subprocess.CalledProcessError(child.returncode, command)
    return {"seconds": time.perf_counter() - started, "peak": most["VmRSS"], "anonymous": most["RssAnon"]}


def forget(folder: Path) -> None:
    """Take the files of a model out of the system's memory, so that who reads them next has to account for them."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(task: str, model: Path, run: Path, tokens: int, seqlen: int, rank: int) -> list[str]:
    """What is measured."""
    found = [sys.executable, "-m", "eora_lab.cli", task]
    found += [str(model / "model.gguf"), str(run)] if task == "mend" else [str(run), "--compressor", "rtn"]
    found += ["--bits", "3"] if task == "compress" else []
    found += ["--calibration.seqlen", str(seqlen), "--evaluation.window-length", str(seqlen)]
    found += ["--calibration.nsamples", str(tokens // seqlen), "--evaluation.windows", "4"]
    return [*found, "--model", str(model), "--dtype", "bfloat16", "--rank", str(rank), "--hidden-states", "disk"]


def middle(run: Path, blocks: int, seconds: float) -> Callable[[], bool]:
    """Whether so many seconds went by since half of the blocks were done."""

    def reached() -> bool:
        half = run / "blocks" / f"{max(blocks // 2, 1) - 1:03d}.safetensors"
        return half.exists() and time.time() > half.stat().st_mtime + seconds

    return reached


def row(asked: argparse.Namespace, shape: Shape, tokens: int, rank: int) -> dict[str, float | str]:
    """What one run finds, or three with --kill. The model is made first if it is not there."""
    model = asked.folder / shape.folder
    if not (model / INDEX).exists():
        shutil.rmtree(model, ignore_errors=True)
        make(model, shape)
    if asked.task == "mend" and not (model / "model.gguf").exists():
        make_file(model / "model.gguf.partial", shape)
        (model / "model.gguf.partial").rename(model / "model.gguf")

    def once(run: Path, until: Callable[[], bool] | None = None) -> dict[str, float]:
        forget(model)
        return measure(command(asked.task, model, run, tokens, asked.seqlen, rank), asked.cgroup, until)

    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        run, killed = Path(place, "run"), Path(place, "killed")
        runs, resumed = [once(run)], ""
        report = read_report(run)
        if asked.kill:
            half = report.seconds / shape.blocks / 2
            runs += [once(killed, middle(killed, shape.blocks, half)), once(killed)]
            differ = differing(run, killed)
            print(*(f"differs: {name}\n" for name in differ), sep="", end="", file=sys.stderr)
            resumed = f"{len(differ)} differ" if differ else "same"
    found = {"seconds": runs[0]["seconds"], "pass": report.seconds} | {name: report.steps[name] for name in STEPS}
    found |= {name: max(one[name] for one in runs) for name in ("peak", "anonymous")}
    found |= {"reported": report.own_memory, "predicted": report.needed_memory}
    told: dict[str, float | str] = {name: round(value, 1) for name, value in found.items()}
    told |= {"ratio": round(report.seconds / (found["forward"] + found["solve"]), 2), "resumed": resumed}
    return {name: told[name] for name in FOUND}


def limit(cgroup: Path | None) -> int:
    """Bytes that a control group may have; 0: there is none."""
    if cgroup is None:
        return 0
    files = [cgroup / name for name in ("memory.max", "memory.limit_in_bytes")]
    return int(next(file for file in files if file.exists()).read_text())


def keep(rows: pandas.DataFrame) -> None:
    """Put rows into the record, in place of those of the same settings."""
    both = pandas.concat([pandas.read_csv(RECORD), rows]) if RECORD.exists() else rows
    both.drop_duplicates(list(SETTINGS), keep="last").to_csv(RECORD, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models are made and kept")
    parser.add_argument("--task", default="mend", choices=("mend", "compress"), help="a Q4_0 file, or in RTN 3-bit")
    for name, default in (("hidden", 2048), ("blocks", 8), ("tokens", 1024), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[default])
    parser.add_argument("--ffn", type=int, help="width of the feed-forward layers; by default 11/4 of hidden")
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values; by default as many as of queries")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--kill", action="store_true", help="kill a second run midway and let it go on")
    parser.add_argument("--cgroup", type=Path, help="memory cgroup to run in")
    parser.add_argument("--record", action="store_true", help=f"keep the rows in {RECORD.name} of data/measured")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(",".join((*SETTINGS, *FOUND)), flush=True)
    rows = []
    for hidden, blocks, tokens, rank in itertools.product(asked.hidden, asked.blocks, asked.tokens, asked.rank):
        ffn, kv_heads = asked.ffn or hidden * 11 // 4, asked.kv_heads or hidden // HEAD
        shape = Shape(hidden, ffn, blocks, kv_heads, asked.vocabulary)
        sizes = (asked.task, hidden, ffn, kv_heads, asked.vocabulary, blocks, tokens, rank, limit(asked.cgroup))
        rows.append(dict(zip(SETTINGS, sizes, strict=True)) | row(asked, shape, tokens, rank))
        print(",".join(map(str, rows[-1].values())), flush=True)
        if asked.record:
            keep(pandas.DataFrame(rows))
    for _, alike in pandas.DataFrame(rows).groupby([name for name in SETTINGS if name != "blocks"]):
        if len(alike) > 1:
            low, high = alike["anonymous"].min(), alike["anonymous"].max()
            most = ", ".join(map(str, alike["blocks"]))
            print(f"{most} blocks: anonymous memory within {high / low - 1:.1%}, {high / 1e9:.2f} GB at the most")


if __name__ == "__main__":
    main()
