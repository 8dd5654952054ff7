"""The Triton kernels, run by Triton's interpreter, against float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted import Case, cases

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.kernels

TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}  # the interpreter cuts bfloat16 off instead of rounding it


@pytest.fixture(scope="module")
def errors() -> dict[str, float | str]:
    """Every case's error, from one process."""
    command = [sys.executable, "-m", "tests.interpreted"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_agrees_with_float64(case: Case, errors):
    error = errors[case.name]
    assert isinstance(error, float), error
    assert error < TOLERANCE[case.dtype]


def test_cases_cover_what_the_kernels_promise():
    covered = cases()
    assert len({case.name for case in covered}) == len(covered) >= 60
    assert {case.ranks[0] for case in covered} >= {0, 1, 7, 16, 40, 64, 128, 200}
    assert {case.group for case in covered} >= {32, 64, 128, -1}
    assert any(case.M % 2 and case.N[0] % 2 and case.K % 2 and case.split_k > 1 for case in covered)
