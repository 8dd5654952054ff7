"""Kill runs at random moments, resume them, and compare all files with those of runs that nobody disturbed:
`python -m tests.kills 20`, in about a minute.

A run is a process of its own, ended by SIGKILL. Only times, memory and the checksums over times may differ.
"""

import argparse
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from docs.run_files import differing
from eora_lab.cli import main
from tests.tiny import TEXT, deep_model, tiny_tokenizer

BLOCKS = 5
COMMAND = [
    "--model",
    "model",
    "--rank",
    "4",
    "--group-size",
    "32",
    "--bits",
    "3",
    "--evaluation.perplexity",
    "text.txt",
]
COMMAND += ["--evaluation.windows", "2", "--evaluation.window-length", "32", "--calibration.source", "text.txt"]
COMMAND += ["--calibration.nsamples", "10", "--calibration.seqlen", "32"]
KINDS = {
    "hidden states on disk": ["--hidden-states", "disk"],
    "hidden states in memory": [],
    "drift": ["--hidden-states", "disk", "--inputs", "drift", "--held-out", "0.2"],
    "original inputs": ["--hidden-states", "disk", "--inputs", "original"],
}


@dataclass
class Kill:
    """One kill: after so many seconds of a run of that kind, with what was there at that moment."""

    kind: str
    seconds: float
    there: str
    differing: list[str]  # files that are not as in the undisturbed run, once the run was resumed


def kills(count: int, seed: int) -> Iterator[Kill]:
    """Kill and resume in the current folder. Yields every `Kill`. count: how many, in turn of each of `KINDS`."""
    deep_model(BLOCKS).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("text.txt").write_text(TEXT)
    chosen, draw, whole = list(KINDS), random.Random(seed), dict[str, tuple[Path, float]]()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert run("warm", chosen[0]) == 0  # all is imported now, and processes that fork from here begin at once
    for number in range(count):
        kind = chosen[number % len(chosen)]
        if kind not in whole:
            started = time.perf_counter()
            assert begin(f"whole-{len(whole)}", kind).wait() == 0
            whole[kind] = Path(f"whole-{len(whole)}"), time.perf_counter() - started
        undisturbed, lasts = whole[kind]
        place, code = Path(f"killed-{number}"), 0
        while code != -signal.SIGKILL:  # it may have ended before: then another one
            shutil.rmtree(place, ignore_errors=True)
            process, seconds = begin(str(place), kind), draw.uniform(0, lasts)
            time.sleep(seconds)
            process.kill()
            code = process.wait()
        there = state(place)
        assert begin(str(place), kind).wait() == 0, Path(f"{place}.log").read_text()
        yield Kill(kind, seconds, there, differing(undisturbed, place))


def run(name: str, kind: str) -> int:
    """Run in this process."""
    return main(["compress", name, *COMMAND, *KINDS[kind]])


class begin:
    """Run in a process of its own, whose output goes into a file beside the run folder."""

    def __init__(self, name: str, kind: str):
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(name, kind))
        self._process.start()
        self.kill = self._process.kill

    @staticmethod
    def _run(name: str, kind: str) -> None:
        log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        sys.exit(run(name, kind))

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode or 0


def state(folder: Path) -> str:
    """What a kill left, in short."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    parts = {
        "blocks": sum(path.parent.name == "blocks" and path.suffix == ".safetensors" for path in files),
        "hidden states": sum("hidden" in path.parts and path.suffix == ".safetensors" for path in files),
        "partial files": sum(path.suffix == ".partial" for path in files),
    }
    end = [name for name in ("adapter/adapter_config.json", "report.json") if (folder / name).exists()]
    return ", ".join([*(f"{number} {name}" for name, number in parts.items() if number), *end]) or "nothing"


def check() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=20, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for number, one in enumerate(kills(asked.count, asked.seed), 1):
            found = f"differs in {', '.join(one.differing)}" if one.differing else "resumed to the same files"
            print(f"{number:3} {one.kind}, killed after {one.seconds:.2f} s ({one.there}): {found}", flush=True)
            wrong += bool(one.differing)
        os.chdir("/")
    print(f"{asked.count - wrong} of {asked.count} resumed to the files of an undisturbed run")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(check())
