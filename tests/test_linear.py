"""The packed layer against the same product with dense matrices."""

import copy

import pytest
import torch
from torch import nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.compress import GridWeight, SparseWeight
from eora_lab.layer.linear import CompensatedLinear, unpacked


def layer(
    bits: int = 4, out: int = 96, features: int = 128, group_size: int = 32, sparse: bool = False, rank: int = 8,
    dtype: torch.dtype = torch.float32, zero_point: str = "float",
) -> CompensatedLinear:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    mask = (torch.rand(out, features // 4, 4, generator=generator).argsort(-1) < 2).flatten(1) if sparse else None
    if bits == 16:
        weight = SparseWeight(random(out, features).half(), mask)
    else:
        codes = torch.randint(2**bits, (out, features), generator=generator, dtype=torch.uint8)
        scales = 0.02 + 0.02 * torch.rand(out, -(-features // group_size), generator=generator)
        offsets = -scales * (2**bits - 1) / 2 + 0.01 * random(*scales.shape)
        if zero_point == "integer":
            offsets = torch.randint(2**bits, scales.shape, generator=generator, dtype=torch.uint8)
        weight = GridWeight(codes if mask is None else codes * mask, scales, offsets, bits, mask, group_size)
    old = nn.Linear(features, out).to(dtype)
    return CompensatedLinear(old, weight, StoredFactors(random(rank, features).half() / 16, random(out, rank).half()))


EVERY_KIND = [
    *({"bits": bits, "sparse": sparse} for bits in (2, 3, 4, 8) for sparse in (False, True)),
    {"bits": 16, "sparse": True},
    {"group_size": 48},  # a shorter last group
    {"group_size": 16},  # none of torch's int4 product
    {"group_size": 128, "zero_point": "integer"},
    {"out": 100},
    {"out": 3000},  # several tiles
    {"rank": 0},
]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
@pytest.mark.parametrize("tokens", [(1,), (2, 1), (3, 20)])
def test_the_product_is_that_of_the_dense_weight_to_rounding(kind, dtype, tokens):
    module = layer(**kind, dtype=dtype)
    x = torch.randn(*tokens, module.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    W = module.compressed.dense().double() + module.lora_B.double() @ module.lora_A.double()
    exact = x.double() @ W.T + module.bias.double()
    y = module(x)
    assert y.dtype == dtype and y.shape == exact.shape
    assert (y.double() - exact).norm() <= ROUNDING[dtype] * exact.norm()


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_gradients_for_x_are_those_of_the_dense_weight(kind):
    module = layer(**kind)
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradient = torch.randn(5, module.out_features, generator=torch.Generator().manual_seed(2))
    (actual,) = torch.autograd.grad(module(x), x, gradient)
    torch.testing.assert_close(
        actual, gradient @ (module.dense() + module.lora_B @ module.lora_A), rtol=1e-4, atol=1e-4
    )


def test_factors_can_be_trained():
    module = layer()
    module.lora_A = module.lora_A.clone().requires_grad_()
    module(torch.ones(3, 128)).sum().backward()
    assert module.lora_A.grad.abs().sum() > 0


def test_the_weight_is_held_packed():
    module = layer(bits=3, out=256, features=512, group_size=64)
    held = sum(b.nbytes for name, b in module.named_buffers() if name not in ("lora_A", "lora_B", "bias"))
    assert held == module.compressed.nbytes == 256 * 512 * 3 // 8 + 256 * 8 * 2 * 4
    module(torch.ones(7, 512))
    assert held == sum(b.nbytes for name, b in module.named_buffers() if name not in ("lora_A", "lora_B", "bias"))


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_unpacked_for_a_while_it_computes_the_same(kind, monkeypatch):
    module = layer(**kind)
    x = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(1))
    before = module(x)
    with unpacked(nn.Sequential(module)), monkeypatch.context() as patch:
        module(x)
        patch.setattr(module, "rows", lambda *_: pytest.fail("unpacked once more"))
        inside = module(x)
    torch.testing.assert_close(inside, before, rtol=0, atol=1e-5 * before.abs().max().item())
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_stored_tensors_give_the_same_layer(kind):
    module = layer(**kind)
    again = CompensatedLinear.from_stored(module.stored(), nn.Linear(module.in_features, module.out_features))
    assert torch.equal(again.dense(), module.dense()) and again.nbytes == module.nbytes
    with pytest.raises(KeyError, match="for a layer of"):
        CompensatedLinear.from_stored(module.stored(), nn.Linear(module.in_features, module.out_features + 1))


def test_a_layer_that_is_cast_forgets_what_it_had_made():
    module, x = layer(), torch.randn(3, 128)
    with unpacked(nn.Sequential(module)):
        before = module(x)
        half = module.bfloat16()(x.bfloat16())
    assert (half.float() - before).norm() < 2e-2 * before.norm()


@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 16, "sparse": True}], ids=str)
def test_a_change_of_dtype_keeps_the_weight(kind):
    module = layer(**kind)
    before = module.dense()
    module(torch.ones(1, 128))
    half = copy.deepcopy(module).bfloat16()
    assert half(torch.ones(1, 128).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.float().dense(), before)
