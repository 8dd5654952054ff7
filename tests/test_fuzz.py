"""The fuzzer: a short run over all kinds of input, and what it takes for a finding."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import KINDS, Answer, fuzzers, judge, run
from tests.fuzz_kinds import OTHER, REFUSED, SAME
from tests.mutations import Change, mutate_file

ROOT = Path(__file__).parents[1]
SOUND = Answer(0, "perplexity 97.1")
LINE = ["evaluate", "a_run", "--adapter", "an_adapter"]


def test_damaged_inputs_are_taken_right_or_refused_in_one_line():
    # in a process of its own: what checks shapes in tests would raise in place of the package
    run = [sys.executable, "-m", "tests.fuzz", "--cases", str(12 * len(KINDS))]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(kind in done.stdout for kind in KINDS)


@pytest.mark.parametrize(
    ("answer", "change", "expected", "outcome"),
    [
        (SOUND, Change("bom", "config.json"), SAME, "harmless"),
        (SOUND, Change("nan", "config.json", "r"), REFUSED, "finding"),
        (Answer(0, "perplexity 97.2"), Change("twice", "config.json", "r"), OTHER, "right"),
        (Answer(0, "perplexity 97.2"), Change("twice", "config.json", "r"), SAME, "finding"),
        (Answer(1, "", "an_adapter: r must be a number"), Change("null", "config.json", "r"), SAME, "refused"),
        (Answer(1, "", "cannot read config.json"), Change("cut", "config.json"), SAME, "refused"),
        (Answer(1, "", "group size must be 1 or more"), Change("bad", "--group-size", "0"), REFUSED, "refused"),
        (Answer(1, "", "the logits are not finite"), Change("nan", "model.safetensors", "x"), SAME, "finding"),
        (Answer(1, "", "config.json is damaged:\nline 3"), Change("cut", "config.json"), SAME, "finding"),
        (Answer(1, "", ""), Change("cut", "config.json"), SAME, "finding"),
        (Answer(2, ""), Change("misspell", "--bits", "3"), REFUSED, "refused"),
        (Answer(3, "", "KeyError at folder.py:1"), Change("cut", "config.json"), OTHER, "finding"),
    ],
)
def test_what_is_a_finding(answer, change, expected, outcome):
    assert judge(answer, SOUND, change, expected, LINE)[0] == outcome


@pytest.mark.parametrize("kind", ["texts", "adapters"])
def test_a_case_is_known_by_its_number(kind):
    with fuzzers() as made:
        first, again = ([made[kind].case(3, number) for number in range(4)] for _ in range(2))
        sound = [made[kind].sound(made[kind].kind.control(made[kind].kind.use(Random(0))))]
    assert first == again and sound[0].code == 0 and "perplexity" in sound[0].numbers


def test_a_hang_and_a_refusal_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr("tests.fuzz.SECONDS", 0.2)
    (tmp_path / "slow.py").write_text("while True: pass")
    assert run([["models", "--plugin", str(tmp_path / "slow.py")]]).error.startswith("Hang at ")
    refused = run([["evaluate", str(tmp_path)]])
    assert refused.code == 1 and refused.error.startswith(f"{tmp_path} has no config.json")


@pytest.mark.parametrize("seed", range(30))
def test_a_mutation_changes_one_file_and_says_how(tmp_path, seed):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"bits": 4, "layers": [1, {"name": "q"}], "sym": True}))
    before = path.read_bytes()
    change = mutate_file(path, Random(seed))
    assert change.file == "a.json" and change.what
    assert not path.is_file() or path.read_bytes() != before or change.what in ("text", "flag", "null", "crlf")
