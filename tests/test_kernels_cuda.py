"""The CUDA C++ kernel: compiled for GPUs by nvcc, and run on the CPU, where a program's threads are threads."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import fused_weight
from kernels.cuda.build import SOURCE, TYPES, build, find_nvcc

NVCC = find_nvcc()
pytestmark = [pytest.mark.kernels, pytest.mark.skipif(NVCC is None, reason="no nvcc")]
HARNESS = Path(__file__).with_name("cuda_on_host.cpp")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [3, 4])
def test_compiles_for_gpus_without_spilling(bits: int, capability: int):
    built = build(bits, 128, "bfloat16" if bits == 3 else "float16", capability)
    assert built.cubin.startswith(b"\x7fELF")
    assert built.spilled_bytes == 0 and built.registers <= 128


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "rank", "bias"),
    [
        (4, 128, "float16", 7, True),
        (4, 32, "bfloat16", 0, False),
        (3, 128, "float16", 16, False),
        (3, 64, "bfloat16", 9, True),
    ],
)
def test_agrees_with_float64_when_run_on_the_cpu(bits, group, dtype, rank, bias, tmp_path):
    library = tmp_path / "fused.so"
    command = [NVCC, "-x", "c++", "-std=c++20", "-O1", "-shared", "-Xcompiler", "-fPIC,-pthread"]
    command += [f"-DBITS={bits}", f"-DGROUP={group}", f"-DT={TYPES[dtype]}", f'-DFUSED_CU="{SOURCE}"']
    done = subprocess.run([*command, "-o", library, HARNESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(bits)
    M, N, K = 2, 70, 5 * group
    codes, zeros = torch.randint(0, 2**bits, (N, K)), torch.randint(0, 2**bits, (N, 5))
    scales, kind = torch.rand(N, 5) + 0.1, getattr(torch, dtype)
    x, A, B, b = (torch.randn(*shape).to(kind) for shape in ((M, K), (rank, K), (N, rank), (N,)))
    A = A / 16
    grid = GridWeight(codes.byte(), scales, -zeros * scales, bits)
    weight = fused_weight(grid, A, B, b if bias else None, dtype=kind)
    y, xa = torch.full((M, N), torch.nan, dtype=kind), torch.full((M, rank), torch.nan)
    tensors = x, A, xa, weight.planes, weight.scales, weight.offsets, weight.Bt, weight.bias, y
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    ctypes.CDLL(str(library)).run(*pointers, M, K, N, weight.planes.shape[1], rank)
    W = ((codes - zeros.repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)).double()
    expected = x.double() @ W.T + x.double() @ A.double().T @ B.double().T + (b.double() if bias else 0)
    assert (y.double() - expected).norm() / expected.norm() < (1e-3 if dtype == "float16" else 8e-3)
