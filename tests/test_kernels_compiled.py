"""The kernels compiled for GPUs that are not here: what the compiler made of them, read from the machine code."""

import functools

import pytest

from kernels.compiled import PLAIN, Job, jobs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.kernels

BUDGET = {4: 3.4, 3: 3.2}  # instructions a weight: what an H200 has time for while its memory delivers them


@functools.cache
def report(name: str):
    from kernels.sass import compile_kernel

    job = next(job for job in jobs() if job.name == name)
    return compile_kernel(job.kernel, job.config, job.capability, **PLAIN | job.settings)


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_shipped_configurations_do_not_spill_and_use_tensor_cores(job: Job):
    made = report(job.name)
    assert made.spills == 0
    assert made.registers > 16  # a kernel that was optimised away would not spill either
    if job.kernel != "dense":
        assert made.tensor_core >= 8


@pytest.mark.parametrize("bits", [4, 3])
def test_decoding_stays_within_the_instruction_budget(bits: int):
    assert 1 < report(Job("decode", 1, 90, {"bits": bits}).name).per_weight <= BUDGET[bits]
