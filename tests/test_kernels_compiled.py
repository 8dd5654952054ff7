"""The kernels compiled for GPUs that are not here: what the compiler made of them, read from the machine code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.compiled import Job, jobs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.kernels

BUDGET = {4: 3.4, 3: 3.2}  # instructions a weight: what an H200 has time for while its memory delivers them


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    """All compiled in a process of its own: the shape checks of tests cannot be compiled by Triton."""
    command = [sys.executable, "-m", "kernels.compiled", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_shipped_configurations_do_not_spill_and_use_tensor_cores(job: Job, reports):
    report = reports[job.name]
    assert report["spills"] == 0
    assert report["registers"] > 16  # a kernel that was optimised away would not spill either
    if job.kernel != "dense":
        assert report["tensor_core"] >= 8


@pytest.mark.parametrize("bits", [4, 3])
def test_decoding_stays_within_the_instruction_budget(bits: int, reports):
    report = reports[Job("decode", 1, 90, {"bits": bits}).name]
    assert 1 < report["per_weight"] <= BUDGET[bits]
