"""The Triton kernels, run by Triton's interpreter, against float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted import Case, cases

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parent.parent
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}  # the interpreter cuts bfloat16 off instead of rounding it


@pytest.fixture(scope="module")
def errors() -> dict[str, float | str]:
    """Every case's error, from one process."""
    command = [sys.executable, "-m", "tests.interpreted"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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


@pytest.mark.parametrize("first", [1000, 2000])
def test_random_products_in_shuffled_order(first: int):
    """Paths a row, experts, masks, act-order and all else; `python -m tests.fuzz_kernels 300` runs more."""
    command = [sys.executable, "-m", "tests.fuzz_kernels", "20", "--seed", str(first)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted(code: str) -> None:
    """Run code in a process with the interpreter on."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_overflow_stays_in_its_row_and_is_seen_there():
    interpreted("""
import os
os.environ["TRITON_INTERPRET"] = "1"
from tests.fuzz_kernels import shuffle_programs
from tests.interpreted import overflown
shuffle_programs(0)
for path in ("decode", "prefill", "cublas"):
    y, broken = overflown(path)
    assert y.isfinite().all() and y[::2].equal(broken[::2]) and not broken[1::2].isfinite().any(), path
    assert broken[1].isnan().all() == (path == "decode")  # a dense layer keeps Inf
""")


def test_launches_are_on_the_device_of_x():
    """A GPU that is not the current one: every kernel is launched while x's device is the current one."""
    interpreted("""
import os
os.environ["TRITON_INTERPRET"] = "1"
from contextlib import contextmanager
import torch
from triton.runtime.interpreter import GridExecutor
from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import fused_weight
from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.launch import launch
current, launched = [], []
@contextmanager
def device_of(tensor):
    current.append(tensor)
    yield
    current.pop()
torch.cuda.device_of = device_of
run = GridExecutor.__call__
def call(self, *args, **kwargs):
    launched.append(list(current))
    return run(self, *args, **kwargs)
GridExecutor.__call__ = call
grid = GridWeight(torch.ones(8, 32, dtype=torch.uint8), torch.ones(8, 1), torch.zeros(8, 1), 4)
weight, x = fused_weight(grid, torch.ones(1, 32), torch.ones(8, 1)), torch.ones(2, 32).half()
for path in ("decode", "prefill", "cublas"):
    launch(x, weight, Config(path))
assert len(launched) == 4 and all(len(one) == 1 and one[0] is x for one in launched), launched
""")


def test_experts_lie_beyond_what_32_bits_count():
    """The weights of the last of half a million experts start past element 2^31; the others are never touched."""
    interpreted("""
import os
os.environ["TRITON_INTERPRET"] = "1"
from dataclasses import replace
import torch
from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import fused_weight
from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.experts import experts_linear, launch_experts, one_expert, stack
torch.manual_seed(0)
def one():
    grid = GridWeight(torch.randint(0, 16, (40, 128), dtype=torch.uint8), torch.rand(40, 2), torch.randn(40, 2), 4)
    return fused_weight(grid, torch.randn(2, 128) / 9, torch.randn(40, 2), torch.randn(40))
few, many = stack([one(), one()]), 2**19 + 2
names = ("planes", "scales", "offsets", "A", "Bt", "bias")
wide = {name: getattr(few, name).new_empty(many, *getattr(few, name).shape[1:]) for name in names}
for name, tensor in wide.items():
    tensor[0], tensor[-1] = getattr(few, name)
weight, x = replace(few, **wide), torch.randn(3, 128).half()
assert one_expert(weight, many - 1).planes.storage_offset() > 2**31
chosen = torch.tensor([[0, many - 1], [many - 1, 0], [0, many - 1]])
y = launch_experts(x, weight, chosen, Config("decode", split_k=1))
expected = experts_linear(x, few, chosen.clamp(max=1))
assert (y - expected).norm() < 1e-3 * expected.norm()
""")
