"""The kernels on a GPU: every interpreted case again, races under load, CUDA graphs, the CUDA C++ kernel."""

import pytest
import torch

from eora_lab.compensate import solve
from eora_lab.compensate.factors import store_factors
from eora_lab.compress import rtn
from eora_lab.layer.linear import CompensatedLinear
from tests.interpreted import Case, cases, overflown, relative_error

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
REPEATS = 3000


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(N=4096, K=4096, bits=4, rank=128, dtype=torch.float16):
    from kernels.peers import Layer

    torch.manual_seed(0)
    return Layer.random(N, K, bits, rank, torch.device("cuda"), dtype)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_agrees_with_float64(case: Case):
    for seed in (cases().index(case), 1000):
        assert relative_error(case, seed, "cuda") < TOLERANCE[case.dtype]


@pytest.mark.parametrize("path", ["decode", "prefill", "cublas"])
def test_an_overflow_stays_in_its_row_and_is_seen_there(path: str):
    y, broken = overflown(path, "cuda")
    assert y.isfinite().all() and y[::2].equal(broken[::2]) and not broken[1::2].isfinite().any()


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_thousands_of_runs_under_load_give_the_same_bits(bits: int, pdl: bool):
    """A race of the split-K counter or of the early second launch would show as another result."""
    from eora_lab.layer.triton_kernels.configs import Config
    from eora_lab.layer.triton_kernels.launch import launch

    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    one = layer(bits=bits)
    weight, config = one.fused(), Config("decode", 16, 64, split_k=8, num_warps=2, num_stages=4, pdl=pdl)
    x = torch.randn(3, 4096, device="cuda").half()
    first = launch(x, weight, config)
    assert ((first.double() - one.exact(x)).norm() / one.exact(x).norm()) < 1e-3
    other, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            load @ load
        wrong += (launch(x, weight, config) != first).any()
    assert wrong.item() == 0


def test_two_streams_do_not_share_scratch_memory():
    from eora_lab.layer.triton_kernels import FusedLinear

    one = layer()
    module, streams = FusedLinear(one.fused()), [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.randn(2, 4096, device="cuda").half() for _ in streams]
    expected = [module(x) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(200):
        outputs = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(module(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_a_cuda_graph_replays_on_new_inputs():
    from eora_lab.layer.triton_kernels import FusedLinear
    from kernels.timing import capture

    one = layer(bits=3)
    module, x, y = FusedLinear(one.fused()), torch.zeros(1, 4096, device="cuda").half(), []
    graph = capture([lambda: y.append(module(x))])
    for _ in range(5):
        x.copy_(torch.randn(1, 4096))
        graph.replay()
        assert ((y[-1].double() - one.exact(x)).norm() / one.exact(x).norm()) < 1e-3


def test_compiles_with_inductor():
    from eora_lab.layer.triton_kernels import FusedLinear
    from eora_lab.layer.triton_kernels.repack import TENSORS

    module, x = FusedLinear(layer().fused()), torch.randn(2, 4096, device="cuda").half()
    tensors = [getattr(module, name) for name in TENSORS]

    def call(x):  # the module's own method carries a shape check, which cannot be traced
        return torch.ops.eora_lab.fused_linear(x, None, *tensors, **module.numbers)

    assert torch.equal(torch.compile(call, fullgraph=True)(x), module(x))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_cuda_kernel_agrees(bits: int):
    from eora_lab.layer.triton_kernels import FusedLinear
    from kernels.cuda.build import find_nvcc
    from kernels.cuda.driver import fused

    if find_nvcc() is None:
        pytest.skip("no nvcc")
    weight, x = layer(bits=bits).fused(), torch.randn(2, 4096, device="cuda").half()
    ours, theirs = FusedLinear(weight)(x).double(), fused(x, weight).double()
    assert ((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_compensated_layer_computes_the_same_either_way(bits: int):
    """8 bits: the kernel does not take them, and torch computes."""
    torch.manual_seed(0)
    old = torch.nn.Linear(512, 384).to("cuda", torch.float16)
    W = old.weight.detach().float()
    factors = store_factors(solve("svd", W, torch.eye(512, device="cuda"), 16))
    fused = CompensatedLinear(old, rtn(W, None, bits=bits), factors)
    plain = CompensatedLinear(old, rtn(W, None, bits=bits), factors, backend="tiles")
    assert (fused.backend_for(3), plain.backend_for(3)) == ("tiles" if bits == 8 else "triton", "tiles")
    x = torch.randn(3, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    torch.testing.assert_close(fused(x.detach()), plain(x.detach()), rtol=2e-3, atol=2e-3)
    if bits < 8:
        assert all(getattr(fused, name).is_cpu for name in fused._packed)  # W^ lies on the GPU once
    fused(x).sum().backward()  # through torch
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 33, 70, 600])
def test_every_row_takes_its_own_path(rows: int):
    """On every road, as `choose` picks it."""
    from eora_lab.layer.triton_kernels import FusedLinear

    one = layer(N=1000, K=4096, rank=16)
    module = FusedLinear(one.fused())
    paths = [(torch.randn(r, 4096, device="cuda") / 64, torch.randn(1000, r, device="cuda")) for r in (3, 0, 40)]
    module.set_paths(paths)
    ids = torch.randint(-1, 3, (rows,), device="cuda", dtype=torch.int32)
    x = torch.randn(rows, 4096, device="cuda").half()
    expected = one.without_path().exact(x)
    for path, (A, B) in enumerate(paths):
        expected += (ids == path)[:, None] * (x.double() @ A.half().double().T @ B.half().double().T)
    assert ((module(x, ids).double() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_experts(tokens: int):
    from eora_lab.layer.triton_kernels.experts import experts_linear, stack

    layers = [layer(N=768, K=2048, rank=r) for r in (8, 0, 16, 24)]
    x = torch.randn(tokens, 2048, device="cuda").half()
    chosen = torch.stack([torch.randperm(4, device="cuda")[:2] for _ in range(tokens)])
    y = experts_linear(x, stack([one.fused() for one in layers]), chosen).double()
    expected = torch.stack([one.exact(x) for one in layers], 1)[torch.arange(tokens)[:, None], chosen]
    assert ((y - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_gpu_that_is_not_the_current_one():
    from eora_lab.layer.triton_kernels import FusedLinear

    one = layer()
    x = torch.randn(3, 4096, device="cuda").half()
    there = FusedLinear(one.fused()).to("cuda:1")(x.to("cuda:1"))
    assert torch.equal(there.to("cuda:0"), FusedLinear(one.fused())(x))


@torch.no_grad()
def test_a_captured_step_writes_what_steps_one_by_one_write():
    from eora_lab.model.steps import Steps, can_capture, write
    from tests.tiny import compress, tiny_model, tiny_tokens

    model = tiny_model("llama")
    compress(model, tiny_tokens(), bits=4, rank=8, progress=False)
    model = model.to("cuda", torch.bfloat16)
    ids = tiny_tokens(3, seed=1)[:, :20].cuda()
    assert can_capture(model)
    plain, captured = (Steps(model, ids, torch.ones_like(ids).bool(), 12) for _ in range(2))
    captured.capture()
    assert torch.equal(write(plain, [], 12), write(captured, [], 12))
