"""The fused kernel for CPUs against float64, whatever the bits, groups, grids, ranks and rows."""

import copy
import os
import platform
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import GridWeight
from eora_lab.errors import EoraLabError
from eora_lab.layer.backends import CPU_ROWS
from eora_lab.layer.cpu_kernels import team
from eora_lab.layer.linear import CompensatedLinear
from tests.test_linear import layer

EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def weight_of(draw, bits: int, out: int, features: int, size: int, generator: torch.Generator) -> GridWeight:
    """A grid of any kind that the kernel reads, scales over six orders of magnitude."""
    groups = -(-features // size)
    codes = torch.randint(2**bits, (out, features), generator=generator, dtype=torch.uint8)
    scales = 10 ** torch.empty(out, groups).uniform_(-3, 3 if draw(st.booleans()) else -2, generator=generator)
    kind = draw(st.sampled_from(["integer", "float", "half"]))
    offsets = torch.randint(2**bits, (out, groups), generator=generator, dtype=torch.uint8)
    if kind != "integer":
        offsets = scales * torch.empty(out, groups).normal_(-(2 ** (bits - 1)), 2, generator=generator)
    if kind == "half":
        scales, offsets = scales.half(), offsets.clamp(-6e4, 6e4).half()
    mask = index = None
    if kind == "integer" and draw(st.booleans()):
        mask = torch.rand(out, features, generator=generator) < 0.5
    if draw(st.booleans()):  # groups of any channels, some of them empty
        index = torch.randint(groups, (features,), generator=generator, dtype=torch.int32)
    return GridWeight(codes if mask is None else codes * mask, scales, offsets, bits, mask, size, index)


def parts_of(weight: GridWeight, x: Tensor) -> Tensor:
    """Sum of |terms| of x W^ᵀ as the kernel adds them up: what its rounding is relative to."""
    lattice = weight.lattice()
    step, origin = (t.double()[:, lattice.group].abs() for t in (lattice.step, lattice.origin))
    return x.double().abs() @ (weight.codes * step + origin).T


@st.composite
def cases(draw, sizes: st.SearchStrategy[int]):
    """A layer with groups of such sizes, and some rows for it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits, dtype = (
        draw(st.sampled_from([2, 3, 4, 8])),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    out, features = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    rank, rows = draw(st.integers(0, 40)), draw(st.one_of(st.integers(1, 16), st.integers(17, 40)))
    weight = weight_of(draw, bits, out, features, draw(sizes), generator)
    old = nn.Linear(features, out, bias=draw(st.booleans())).to(dtype)
    factors = (torch.randn(shape, generator=generator).half() for shape in ((rank, features), (out, rank)))
    module = CompensatedLinear(old, weight, StoredFactors(*factors), "numba")
    size = 1.0 if dtype == torch.float16 else 10.0 ** draw(st.integers(-6, 6))
    return module, weight, (size * torch.randn(rows, features, generator=generator)).to(dtype)


def check(module: CompensatedLinear, weight: GridWeight, x: Tensor) -> None:
    """The product is exact to what rounding may cost."""
    A, B = module.lora_A.double(), module.lora_B.double()
    W = weight.dense().double()
    exact = x.double() @ W.T + x.double() @ A.T @ B.T
    size = parts_of(weight, x) + x.double().abs() @ A.T.abs() @ B.T.abs()
    if module.bias is not None:
        exact, size = exact + module.bias.double(), size + module.bias.double().abs()
    y = module(x)
    assert y.dtype == x.dtype
    # a sum of n float32 terms in 16 lanes, and what storing the result rounds
    bound = (16 + x.shape[1] / 16) * EPSILON[torch.float32] * size + EPSILON[x.dtype] * exact.abs()
    if len(x) > CPU_ROWS:  # W^, the path and sums of both in the type of x
        whole = x.double().abs() @ W.abs().T + x.double().abs() @ A.T.abs() @ B.T.abs() + exact.abs()
        bound += 4 * EPSILON[x.dtype] * whole
    if x.dtype == torch.float16:
        bound += 2**-24
        fits = exact.abs() < 65000
        y, exact, bound = y[fits], exact[fits], bound[fits]
    assert ((y.double() - exact).abs() <= bound).all()


@given(cases(st.sampled_from([20, 64, 300])))
def test_the_product_is_exact_to_rounding(case):
    check(*case)


@pytest.mark.kernels  # every kind of group is compiled
@given(cases(st.one_of(st.sampled_from([8, 16, 32, 48, 64, 96, 128]), st.integers(1, 303))))
def test_groups_of_any_size(case):
    check(*case)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_byte_behind_the_weight_counts(bits):
    """The last rows are read from a copy with zeros behind it."""
    for out, features in ((1, 1), (1, 17), (3, 100), (40, 576)):
        module = layer(bits=bits, out=out, features=features, group_size=64, rank=0)
        module.backend = "numba"
        x = torch.ones(1, features)
        exact = x.double() @ module.dense().double().T + module.bias.double()
        assert (module(x) - exact).norm() <= 1e-6 * parts_of(module.compressed, x).norm()


def test_another_path_repacks_nothing():
    module, x = layer(), torch.ones(1, 128)
    module.backend = "numba"
    module(x)
    made = module.made["numba"]
    assert made.codes.data_ptr() == module.codes.data_ptr() and made.scales.data_ptr() == module.scales.data_ptr()
    module.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(96, 0)))
    assert torch.allclose(module(x), x @ module.dense().T + module.bias, atol=1e-5)
    assert module.made["numba"] is made
    again = copy.deepcopy(module)
    assert torch.equal(again(x), module(x)) and again.made["numba"] is not made


def test_inputs_that_are_not_contiguous():
    module = layer()
    module.backend = "numba"
    x = torch.randn(128, 5).T
    assert torch.equal(module(x), module(x.contiguous()))
    assert torch.equal(module(x[::2]), module(x[::2].contiguous()))
    assert module(x[:0]).shape == (0, 96)


@pytest.mark.parametrize(
    ("kind", "x", "reason"),
    [
        ({"bits": 16, "sparse": True}, torch.ones(1, 128), "it reads grids, not a weight that is stored as sparse"),
        ({"sparse": True}, torch.ones(1, 128), "it reads a mask with integer zero points only"),
        ({"bits": 5}, torch.ones(1, 128), "it reads 2, 3, 4, 8 bits, not 5"),
        ({"dtype": torch.float64}, torch.ones(1, 128).double(), "it computes in float32"),
        ({}, torch.ones(1, 128, requires_grad=True), "it has no backward pass"),
    ],
    ids=["sparse", "mask", "bits", "float64", "gradients"],
)
def test_says_why_not(kind, x, reason):
    module = layer(**kind)
    module.backend = "numba"
    with pytest.raises(EoraLabError, match=f"the numba backend cannot take this layer: {reason}"):
        module(x)
    module.backend = "auto"
    assert module(x).shape == (1, 96)


def test_threads_change_nothing():
    module, x = layer(bits=3, out=1000), torch.randn(3, 128)
    module.backend = "numba"
    threads, alone = torch.get_num_threads(), module(x)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(module(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_one_thread_where_those_of_torch_cannot_be_had(monkeypatch):
    module, x = layer(), torch.ones(20, 128)
    alone, many = module(x[:1]), module(x)
    monkeypatch.setattr(team, "libraries", lambda: iter(["none.so"]))
    monkeypatch.setattr(team, "openmp", lru_cache(team.openmp.__wrapped__))
    assert torch.equal(module(x[:1]), alone) and torch.equal(module(x), many) and team.openmp() is None


def test_fewer_threads_than_were_asked_for():
    code = """import torch; from tests.test_linear import layer
module, x = layer(out=1000), torch.ones(3, 128); torch.set_num_threads(4)
y = module(x); torch.set_num_threads(1); assert torch.equal(module(x), y) and module.backend_for(3) == "numba" """
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", [None, ("haswell", "+avx2,+fma,+f16c"), ("x86-64", "")], ids=str)
def test_a_thousand_cases_as_compiled_for_other_processors(processor):
    names = {} if processor is None else dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), processor, strict=True))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--hypothesis-profile=thousand",
        f"{__file__}::{test_groups_of_any_size.__name__}",
    ]
    done = subprocess.run(command, env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
