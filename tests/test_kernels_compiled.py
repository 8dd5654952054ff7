"""The kernels compiled for GPUs that are not here: what the compiler made of them, read from the machine code.

Cycles are the compiler's own count for one warp of the main loop, so that a load that is waited for, or a chain of
instructions that grew longer, is seen without a GPU.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

from kernels.compiled import SHARED, Job, jobs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.kernels

BUDGET = {4: 3.4, 3: 3.2}  # instructions a weight: what an H200 has time for while its memory delivers them
CYCLES = {1: 900, 32: 1200}  # rows -> of the main loop for 128 channels, at the most
LATENCY = 500  # cycles from a load of global memory to its first use, at the least


@functools.cache
def report(name: str):
    from kernels.sass import compile_kernel

    job = next(job for job in jobs() if job.name == name)
    return compile_kernel(job.kernel, job.config, job.capability, **job.whole)


def beyond_limits(job: Job, made) -> list[str]:
    """Which limits a kernel breaks."""
    from kernels.machine_code import cycles, soonest_use

    found = {
        "spills": made.spills > 0,
        "registers": not 16 < made.registers <= 255,  # a kernel that was optimised away would not spill either
        "shared memory": made.shared > SHARED[job.capability],
        "tensor cores": job.kernel != "dense" and made.tensor_core < 8,
    }
    if job.kernel == "decode":
        blocks = 2 if job.whole["bits"] == 3 else 1
        found |= {
            "cycles": not 100 < cycles(made.loop) / blocks <= CYCLES[job.rows],
            "latency": soonest_use(made.loop) < LATENCY,
            "foreseen shared memory": made.shared > job.config.shared(job.whole["bits"], job.whole["group"]) + 256,
        }
    return [name for name, broken in found.items() if broken]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_shipped_configurations_keep_their_limits(job: Job):
    assert not beyond_limits(job, report(job.name))


@pytest.mark.parametrize("bits", [4, 3])
def test_decoding_stays_within_the_instruction_budget(bits: int):
    assert 1 < report(Job("decode", 1, "H200", {"bits": bits}).name).per_weight <= BUDGET[bits]


@pytest.mark.parametrize("gpu", ["A100", "H200", "B200"])
def test_scales_that_are_not_copied_ahead_are_seen(gpu: str, tmp_path, monkeypatch):
    """The kernel as it was before: the main loop without the word that lets scales be copied ahead."""
    from eora_lab.layer.triton_kernels import decode
    from kernels import sass

    text = Path(decode.__file__).read_text()
    late = text.replace("tl.range(split, blocks, SPLIT_K, num_stages=STAGES)", "range(split, blocks, SPLIT_K)")
    assert late != text
    (tmp_path / "late_decode.py").write_text(late)
    spec = importlib.util.spec_from_file_location("late_decode", tmp_path / "late_decode.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "late_decode", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sass.KERNELS, "decode", module.decode_kernel)
    job = Job("decode", 1, gpu)
    assert "latency" in beyond_limits(job, sass.compile_kernel("decode", job.config, job.capability, **job.whole))
