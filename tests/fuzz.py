"""Is there an input that is silently taken wrong? `python -m tests.fuzz --cases 2000`, or `make fuzz`.

Every case damages one input in one way (`tests/mutations.py`), uses it as people do (`tests/fuzz_kinds.py`), and asks
what came of it: the numbers of the sound input, other numbers where the change is one of content, or one line that
names what was changed. All else is a finding: an exception, a message of several lines or about nothing, other numbers
without a word, a command that does not end. A case is known by its number and the seed, and can be run alone.
"""

import argparse
import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from eora_lab.cli import main as eora_lab
from tests.fuzz_commands import Commands
from tests.fuzz_folders import Folders
from tests.fuzz_kinds import OTHER, REFUSED, Adapters, Checkpoints, Ggufs, Kind, Models, Runs, Stores, Texts
from tests.mutations import Change

SECONDS = 30  # of work that a command may take
MEMORY = 8 * 2**30  # bytes of address space that all cases may take
KINDS: dict[str, type[Kind]] = {
    "models": Models,
    "checkpoints": Checkpoints,
    "folders": Folders,
    "ggufs": Ggufs,
    "adapters": Adapters,
    "runs": Runs,
    "stores": Stores,
    "texts": Texts,
    "commands": Commands,
}
FOLDERS = ("a_model", "a_checkpoint", "a_base.gguf", "an_adapter", "a_run", "a_store", "a_text", "a_copy")
OUTCOMES = ("harmless", "right", "refused", "finding")


class Hang(BaseException):
    """A case takes too long. No Exception, which the code under test may catch."""


@dataclass(frozen=True)
class Finding:
    """A case that came out wrong."""

    command: str  # that shows it again
    change: str
    what: str

    def __str__(self) -> str:
        return f"{self.change}: {self.what}\n    {self.command}"


@dataclass(frozen=True)
class Answer:
    """What command lines came to."""

    code: int  # of the last one; 3 where an exception came out
    numbers: str
    error: str = ""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Hang after some seconds of work, or ten times as many of waiting: a busy machine is no hang."""

    def stop(*_) -> None:
        raise Hang(f"no end after {seconds} s of work")

    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def run(lines: list[list[str]]) -> Answer:
    """Run command lines, one after another while they succeed."""
    out, code = io.StringIO(), 0
    for line in lines:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(SECONDS):
                code = eora_lab(line)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 2
        except (Exception, Hang) as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = next((one for one in reversed(place) if "eora_lab" in one.filename), place[-1])
            where = f"{Path(ours.filename).name}:{ours.lineno}"
            return Answer(3, "", f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:120]}")
        if "Traceback (most recent call last)" in err.getvalue():
            return Answer(3, "", f"a traceback is printed: {err.getvalue().strip().splitlines()[-1][:120]}")
        if code:
            return Answer(code, "", err.getvalue().rpartition("eora-lab: ")[2].strip() if code == 1 else "")
    kept = [line for line in out.getvalue().splitlines() if not re.search(r"cells:|^wrote ", line)]
    return Answer(0, re.sub(r" tokens of .*", "", "\n".join(kept)))


class Fuzzer:
    """Cases of one kind, made from one sound input."""

    def __init__(self, name: str, kind: Kind, room: Path):
        self.name, self.kind, self.room = name, kind, room
        self._sound: dict[str, Answer] = {}

    @cached_property
    def prepared(self) -> Path:
        """The sound input, made where its copies are used later: a run knows the path of its model."""
        with self.current(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.kind.prepare()
            return shutil.copytree(Path.cwd(), self.room / self.name)

    @contextlib.contextmanager
    def current(self, *, of: Path | None = None) -> Iterator[None]:
        """A folder, which is the current one for a while: a copy of another, or empty."""
        folder = self.room / "case"
        if of:
            shutil.copytree(of, folder)
        else:
            folder.mkdir()
        try:
            with contextlib.chdir(folder):
                yield
        finally:
            shutil.rmtree(folder)

    def sound(self, use: list[list[str]]) -> Answer:
        """What the sound input gives in this use."""
        key = str(use)
        if key not in self._sound:
            with self.current(of=self.prepared):
                self._sound[key] = run(use)
        return self._sound[key]

    def case(self, seed: int, number: int) -> tuple[str, Finding | None]:
        """(outcome, finding) of one case."""
        random = Random(f"{seed} {number}")
        use = self.kind.use(random)
        sound = self.sound(self.kind.control(use))
        with self.current(of=self.prepared):
            change = self.kind.mutate(use, random)
            answer = run(use)
        outcome, what = judge(answer, sound, change, self.kind.expects(change), use[0])
        if outcome != "finding":
            return outcome, None
        return outcome, Finding(f"python -m tests.fuzz --seed {seed} --case {number}", f"{self.name}: {change}", what)


def judge(answer: Answer, sound: Answer, change: Change, expected: str, line: list[str]) -> tuple[str, str]:
    """(outcome, what is wrong about it)."""
    command = " ".join(line[:2])
    if sound.code:
        return "finding", f"{command}: the sound input fails: {sound.error}"
    if answer.code == 3:
        return "finding", f"{command}: {answer.error}"
    if answer.code == 0:
        same = answer.numbers == sound.numbers
        if expected == REFUSED or (expected != OTHER and not same):
            how = f"{'taken' if same else 'other numbers'} without a word"
            return "finding", f"{command}: {how}: {' '.join(answer.numbers.split())[-70:]}"
        return ("harmless" if same else "right"), ""
    if answer.code == 1:
        if not answer.error or "\n" in answer.error:
            return "finding", f"{command}: no message of one line: {answer.error[:120]!r}"
        if not any(name in simple(answer.error) for name in map(simple, names_of(change)) if name):
            return "finding", f"{command}: the message names nothing: {answer.error[:160]}"
    return "refused", ""


def names_of(change: Change) -> set[str]:
    """Words of which a message must hold one: the file, its folder, or the setting that was changed."""
    if change.file.startswith("--"):
        return {*FOLDERS, change.file.rpartition(".")[2].lstrip("-"), change.place, *change.place.split(":")}
    if change.what == "word":
        return {*FOLDERS, change.file, "fox"}  # the name that it puts in
    settings = [key for key in change.place.split(".") if not key.isdigit()]
    return {*FOLDERS, change.file, *(settings[-1:] if change.file.endswith(("json", "yaml")) else ())}


def simple(text: str) -> str:
    """The same for `group_size`, `--group-size` and "group size"."""
    return re.sub(r"[-_ ]+", "_", text)


@contextlib.contextmanager
def fuzzers() -> Iterator[dict[str, Fuzzer]]:
    """Kind -> its fuzzer, in a folder and with a cache of their own."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="eora-lab-fuzz-") as room:
        os.environ |= {"EORA_LAB_CACHE": f"{room}/cache", "HF_HUB_OFFLINE": "1"}
        try:
            yield {name: Fuzzer(name, kind(), Path(room)) for name, kind in KINDS.items()}
        finally:
            os.environ.clear()
            os.environ |= before


def kind_of(number: int) -> str:
    """The kind of a case: all have their turn."""
    return tuple(KINDS)[number % len(KINDS)]


def table(outcomes: Counter) -> str:
    """Kind x outcome."""
    lines = ["".join(f"{word:>12}" for word in ("", *OUTCOMES))]
    for kind in KINDS:
        lines.append("".join(f"{word:>12}" for word in (kind, *(outcomes[kind, outcome] for outcome in OUTCOMES))))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 1 when there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many, from 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only cases of this kind")
    parser.add_argument("--case", type=int, help="only the case of this number")
    asked = parser.parse_args(arguments)
    numbers = range(asked.cases) if asked.case is None else [asked.case]
    numbers = [number for number in numbers if asked.kind in (None, kind_of(number))]
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    outcomes: Counter = Counter()
    with fuzzers() as made:
        for number in tqdm(numbers, desc="fuzz", unit="case"):
            outcome, finding = made[kind_of(number)].case(asked.seed, number)
            outcomes[kind_of(number), outcome] += 1
            if finding:
                tqdm.write(str(finding))
    print(table(outcomes))
    return any(outcome == "finding" for _, outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
