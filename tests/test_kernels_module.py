"""Repacking, the operator on the CPU, and merging: what needs neither Triton nor a GPU."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import GridWeight, rtn
from eora_lab.errors import EoraLabError
from eora_lab.layer.backends import BACKENDS
from eora_lab.layer.row_paths import RowPaths
from eora_lab.layer.triton_kernels import FusedLinear, fused_rows, fused_weight, packing, why_not_triton
from eora_lab.layer.triton_kernels.configs import GPUS, SERIAL, bucket, rule
from kernels.merge import merge
from tests.test_linear import layer as stored_layer


def layer(out_features=36, in_features=96, rank=7, bits=4, group_size=32, dtype=torch.float16, bias=True, **grid):
    """A compressed weight, its factors and bias, and the float64 matrix and vector that they stand for."""
    compressed = rtn(torch.randn(out_features, in_features), None, bits=bits, group_size=group_size, **grid)
    A = (torch.randn(rank, in_features) / in_features**0.5).to(dtype)
    B, b = torch.randn(out_features, rank).to(dtype), torch.randn(out_features).to(dtype) if bias else None
    return compressed, A, B, b


def exact(compressed, A, B, b, x):
    W = compressed.dense().double()
    return x.double() @ W.T + x.double() @ A.double().T @ B.double().T + (0 if b is None else b.double())


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [16, 48, 96, -1])
@pytest.mark.parametrize(
    "grid", [{}, {"sym": True}, {"zero_point": "integer", "scale_dtype": "float16"}, {"scale_dtype": "float16"}]
)
def test_a_compressed_weight_gives_the_same_layer(bits, group_size, grid):
    torch.manual_seed(0)
    parts = layer(bits=bits, group_size=group_size, **grid)
    x = torch.randn(2, 5, 96).half()
    y = FusedLinear(fused_weight(*parts))(x)
    assert y.shape == (2, 5, 36) and y.dtype == x.dtype
    assert error(y, exact(*parts, x)) < 5e-4  # one rounding to float16


@pytest.mark.parametrize("rank", [0, 3])
def test_bfloat16_and_no_bias(rank):
    torch.manual_seed(0)
    parts = layer(rank=rank, bias=False, dtype=torch.bfloat16)
    x = torch.randn(4, 96).bfloat16()
    assert error(FusedLinear(fused_weight(*parts, dtype=torch.bfloat16))(x), exact(*parts, x)) < 4e-3


def test_merged_layers_give_each_layers_output():
    torch.manual_seed(0)
    parts = [layer(out_features=n, rank=r) for n, r in ((130, 7), (36, 0), (36, 16))]
    x = torch.randn(3, 96).half()
    merged = FusedLinear(merge([fused_weight(*p) for p in parts]))
    for y, p in zip(merged.split(merged(x)), parts, strict=True):
        assert error(y, exact(*p, x)) < 5e-4


def test_merging_twice_is_merging_once():
    weights = [fused_weight(*layer(out_features=n)) for n in (130, 36, 20)]
    once, twice = merge(weights), merge([merge(weights[:2]), weights[2]])
    for name, tensor in once.tensors().items():
        assert torch.equal(tensor, getattr(twice, name)), name
    assert once.numbers() == twice.numbers()


def test_layers_that_do_not_fit_are_not_merged():
    weights = [fused_weight(*layer(bits=bits)) for bits in (3, 4)]
    with pytest.raises(EoraLabError, match="merged only"):
        merge(weights)


def test_act_order_reads_channels_in_the_order_of_their_groups():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (36, 96), dtype=torch.uint8)
    scales, zeros = torch.rand(36, 3) + 0.1, torch.randint(0, 16, (36, 3), dtype=torch.uint8)
    index = (torch.arange(96) // 32)[torch.randperm(96)]
    A, B = torch.randn(4, 96).half() / 10, torch.randn(36, 4).half()
    x = torch.randn(5, 96).half()
    W = (codes.double() - zeros.double()[:, index]) * scales.double()[:, index]
    y = FusedLinear(fused_weight(GridWeight(codes, scales, zeros, 4, g_idx=index.int()), A, B))(x)
    assert error(y, x.double() @ W.T + x.double() @ A.double().T @ B.double().T) < 5e-4
    in_order = GridWeight(codes, scales, zeros, 4, g_idx=(torch.arange(96) // 32).int())
    assert fused_weight(in_order, A, B).order is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "3 or 4 bits"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"group_size": 8}, "divisible by 16"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(change, message):
    dtype = change.pop("dtype", torch.float16)
    with pytest.raises(EoraLabError, match=message):
        fused_weight(*layer(**change), dtype=dtype)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_last_group_that_is_shorter(act_order):
    torch.manual_seed(0)
    codes = torch.randint(0, 8, (36, 100), dtype=torch.uint8)
    scales, offsets = torch.rand(36, 3) + 0.1, torch.randn(36, 3)
    index = torch.arange(100) // 48
    if act_order:
        index = index[torch.randperm(100)]
    A, B = torch.randn(4, 100).half() / 10, torch.randn(36, 4).half()
    x = torch.randn(5, 100).half()
    W = codes.double() * scales.double()[:, index] + offsets.double()[:, index]
    grid = GridWeight(codes, scales, offsets, 3, None, 48, index.int() if act_order else None)
    weight = fused_weight(grid, A, B)
    expected = x.double() @ W.T + x.double() @ A.double().T @ B.double().T
    assert error(FusedLinear(weight)(x), expected) < 5e-4


def test_groups_of_unequal_size_are_refused():
    compressed, A, B, b = layer()
    with pytest.raises(EoraLabError, match="equal size"):
        fused_weight(replace(compressed, g_idx=torch.zeros(96, dtype=torch.int32)), A, B, b)


def test_sizes_that_do_not_fit_are_refused():
    compressed, A, B, b = layer()
    with pytest.raises(EoraLabError, match="96 channels in groups of 48 are not 3 groups"):
        fused_weight(replace(compressed, group_size=48), A, B, b)
    with pytest.raises(ValueError, match="a code of 15 has more than 3 bits"):
        fused_weight(replace(compressed, bits=3, codes=torch.full_like(compressed.codes, 15)), A, B, b)
    with pytest.raises(EoraLabError, match="does not fit into float16"):
        fused_weight(compressed, 1e6 * A.float(), B, b)
    module = FusedLinear(fused_weight(compressed, A, B, b))
    for width in (80, 112, 96 * 2):
        with pytest.raises(EoraLabError, match=f"reads 96 channels, and x has {width}"):
            module(torch.randn(1, width).half())
    with pytest.raises(EoraLabError, match="3 rows need as many int32 ids"):
        module(torch.randn(3, 96).half(), torch.zeros(2, dtype=torch.int32))


def test_rows_that_are_packed_part_by_part_give_the_same_layer():
    compressed, A, B, b = layer(out_features=300, zero_point="integer")

    def cut(start, stop):
        rows = {name: getattr(compressed, name)[start:stop] for name in ("codes", "scales", "offsets")}
        return replace(compressed, **rows)

    whole, parts = fused_weight(compressed, A, B, b), fused_rows([cut(0, 128), cut(128, 256), cut(256, 300)], A, B, b)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, getattr(parts, name)), name


@pytest.mark.parametrize("group_index", [False, True])
def test_every_row_takes_its_own_path(group_index):
    torch.manual_seed(0)
    compressed, A, B, b = layer()
    if group_index:
        compressed = replace(compressed, g_idx=(torch.arange(96) // 32)[torch.randperm(96)].int())
    paths = [(torch.randn(rank, 96).half() / 10, torch.randn(36, rank).half()) for rank in (3, 0, 16)]
    module = FusedLinear(fused_weight(compressed, A, B, b))
    planes = module.planes
    module.set_paths(paths)
    assert module.planes is planes  # another path packs nothing
    ids, x = torch.tensor([2, -1, 0, 1, 2, 0], dtype=torch.int32), torch.randn(2, 3, 96).half()
    y = module(x, ids).view(6, 36)
    none = (torch.zeros(0, 96), torch.zeros(36, 0))
    for row, path in enumerate(ids.tolist()):
        one = paths[path] if path >= 0 else none
        assert error(y[row], exact(compressed, *one, b, x.view(6, 96)[row])) < 5e-4


def test_x_of_another_dtype_is_refused():
    with pytest.raises(EoraLabError, match="packed for"):
        FusedLinear(fused_weight(*layer()))(torch.randn(1, 96))


def test_the_operator_passes_torchs_own_checks():
    module = FusedLinear(fused_weight(*layer()))
    weight = module.weight
    arguments = [getattr(weight, n) for n in ("planes", "scales", "offsets", "A", "Bt", "tiles", "bias", "order")]
    torch.library.opcheck(
        torch.ops.eora_lab.fused_linear.default, (torch.randn(2, 3, 96).half(), None, *arguments, 4, 32, [36], [7])
    )


@pytest.mark.parametrize("act_order", [False, True])
def test_x_has_the_gradient_of_the_dense_layer(act_order):
    """Also with a path a row, and differentiable itself; what else wants a gradient is told that there is none."""
    torch.manual_seed(0)
    compressed, A, B, b = layer()
    if act_order:
        compressed = replace(compressed, g_idx=(torch.arange(96) // 32)[torch.randperm(96)].int())
    module = FusedLinear(fused_weight(compressed, A, B, b))
    module.set_paths([(A, B), (3 * A[:2], B[:, :2])])
    W = compressed.dense().double()
    of_row = torch.stack([W + B.double() @ A.double(), W, W + 3 * B[:, :2].double() @ A[:2].double()])
    x, above = (torch.randn(3, columns).half().requires_grad_() for columns in (96, 36))
    y = module(x, torch.tensor([0, -1, 1], dtype=torch.int32))
    (below,) = torch.autograd.grad(y, x, above, create_graph=True)
    assert error(below, torch.einsum("ro,roi->ri", above.double(), of_row)) < 5e-4
    (again,) = torch.autograd.grad(below, above, x.detach())
    assert error(again, torch.einsum("ri,roi->ro", x.double(), of_row)) < 5e-4
    module.A.requires_grad_()
    with pytest.raises(EoraLabError, match="a gradient for x alone"):
        module(x).sum().backward()


@pytest.mark.kernels
def test_compiles_as_one_node():
    """The module traces without a break into a single call, and so does its gradient; apart, as shape checks in
    annotations cannot be traced."""
    code = """
import torch
from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import FusedLinear, fused_weight
from eora_lab.layer.triton_kernels.repack import TENSORS
calls = []
def backend(graph, _):
    calls.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
    return graph.forward
codes = torch.randint(0, 16, (40, 32), dtype=torch.uint8)
grid = GridWeight(codes, torch.ones(40, 1), torch.zeros(40, 1), 4)
weight = fused_weight(grid, torch.randn(3, 32), torch.randn(40, 3))
module, x = FusedLinear(weight), torch.randn(2, 32).half()
assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
assert len(calls) == 1 and "fused_linear" in str(calls[0]), calls
tensors = [getattr(weight, name) for name in TENSORS]
arguments = x.requires_grad_(), None, *tensors, *weight.numbers().values()
torch.library.opcheck(torch.ops.eora_lab.fused_linear.default, arguments)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [{}, {"bits": 3, "sparse": True, "zero_point": "integer"}])
def test_a_layer_holds_its_weight_once_and_packs_it_once(kind, monkeypatch):
    """What the backend makes of a layer on a GPU, on the CPU."""
    monkeypatch.setattr(packing, "AT_ONCE", 128 * 128)  # a tile of rows at a time
    module, x = stored_layer(out=300, dtype=torch.bfloat16, **kind), torch.randn(2, 3, 128).bfloat16()
    triton = BACKENDS["triton"]
    expected = module(x).double()
    assert error(triton.prepare(module)(module, x), expected) < 1e-2
    planes = module.made["triton"].planes
    module.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(300, 0)))
    paths = [(torch.randn(4, 128) / 16, torch.randn(300, 4)), (torch.randn(2, 128) / 16, torch.randn(300, 2))]
    module.set_row_paths(RowPaths.of(paths, [1, -1], module.lora_A))
    product = triton.prepare(module)
    assert module.made["triton"].planes is planes
    assert error(product(module, x), module(x).double()) < 1e-2
    with pytest.raises(EoraLabError, match="one adapter at a time"):
        product(module, x[0])


def test_moving_a_module_keeps_its_dtypes():
    module = FusedLinear(fused_weight(*layer()))
    before = {name: tensor.dtype for name, tensor in module.named_buffers()}
    module.to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in module.named_buffers()} == before
    assert module.to("meta").planes.is_meta


def test_what_triton_lacks_here_is_said():
    assert why_not_triton(torch.device("cpu"), torch.float16) == "an NVIDIA GPU, and the layer is on cpu"


def test_imports_no_triton_and_works_without():
    code = """
import sys
sys.modules["triton"] = None
import torch
from eora_lab.compress import GridWeight
from eora_lab.layer.triton_kernels import FusedLinear, fused_weight
codes = torch.randint(0, 16, (8, 32), dtype=torch.uint8)
grid = GridWeight(codes, torch.ones(8, 1), torch.zeros(8, 1), 4)
weight = fused_weight(grid, torch.zeros(0, 32), torch.zeros(8, 0))
x = torch.ones(1, 32).half()
assert torch.equal(FusedLinear(weight)(x)[0].double(), codes.double().sum(1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_masked_weight_keeps_its_zeros():
    """2:4 and integer zero points: a dropped weight is stored as its zero point."""
    compressed, A, B, b = layer(zero_point="integer")
    mask = (torch.arange(96) % 4 < 2).repeat(36, 1)
    masked = replace(compressed, codes=compressed.codes * mask, mask=mask)
    x = torch.randn(3, 96).half()
    expected = exact(replace(compressed, codes=torch.where(mask, compressed.codes, zero_codes(compressed))), A, B, b, x)
    assert error(FusedLinear(fused_weight(masked, A, B, b))(x), expected) < 5e-4
    assert torch.equal(masked.dense() == 0, ~mask | (compressed.dense() == 0))


def test_a_checkpoints_group_index_is_followed():
    """desc_act: groups are no runs of neighbours."""
    torch.manual_seed(0)
    compressed, A, B, b = layer()
    g_idx = (torch.arange(96) // compressed.group_size)[torch.randperm(96)].int()
    shuffled = replace(compressed, g_idx=g_idx)
    x = torch.randn(3, 96).half()
    y = FusedLinear(fused_weight(shuffled, A, B, b))(x)
    W = shuffled.dense().double() + B.half().double() @ A.half().double()
    assert error(y, x.double() @ W.T + b.half().double()) < 1e-3


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 513])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
def test_the_rule_gives_blocks_that_fit(rows, bits, gpu, group):
    for columns, channels in ((128, 128), (1024, 4096), (14336, 4096), (4096, 14336), (28672, 8192)):
        config, block = rule(rows, columns, channels, bits, group, gpu), 128 if bits == 4 else 256
        blocks = -(-channels // block)
        assert 128 % config.block_n == 0 and 1 <= config.split_k <= blocks
        many = "cublas" if gpu.capability == 100 or rows > 512 else "prefill"
        assert config.path == ("decode" if rows <= 64 else many)
        if config.path == "decode":
            assert -(-blocks // config.split_k) * block <= SERIAL
        if config.path != "cublas":
            assert config.shared(bits, group) + 1024 <= gpu.shared


def test_buckets():
    assert [bucket(m) for m in (1, 16, 17, 64, 65, 4096)] == [16, 16, 32, 64, 128, 4096]


def zero_codes(compressed):
    group_size = compressed.codes.shape[1] // compressed.offsets.shape[1]
    return compressed.offsets.repeat_interleave(group_size, 1)
