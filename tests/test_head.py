"""The head of a model reads its weight by the kernel: the same product, and torch's own where that is asked for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eora_lab.layer.head import FewRowsLinear, quicken_head
from tests.tiny import tiny_model

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def head(features: int, dtype: torch.dtype, out: int = 301, bias: bool = False) -> FewRowsLinear:
    return FewRowsLinear(nn.Linear(features, out, bias).to(dtype).requires_grad_(False))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("features", [16, 48, 64, 576, 1000])
def test_the_product_is_exact_to_rounding(dtype, features):
    module = head(features, dtype)
    for shape in ((1,), (1, 1), (2, 3), (16,), (0,)):
        x = torch.randn(*shape, features).to(dtype)
        exact = x.double() @ module.weight.double().T
        y = module(x)
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y.double() - exact).norm() <= ROUNDING[dtype] * exact.norm()


@pytest.mark.parametrize("kind", [{"bias": True}, {"dtype": torch.float64}, {"features": 100}], ids=str)
def test_torch_computes_what_the_kernel_does_not(kind):
    module = head(**{"features": 64, "dtype": torch.float32} | kind)
    x = torch.randn(1, module.in_features, dtype=module.weight.dtype)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    many = torch.randn(40, module.in_features, dtype=module.weight.dtype)
    assert torch.equal(module(many), F.linear(many, module.weight, module.bias))


def test_gradients_reach_x_and_the_weight():
    module, x = head(64, torch.float32).requires_grad_(), torch.randn(1, 64, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad[0], module.weight.detach().sum(0))
    torch.testing.assert_close(module.weight.grad, x.detach().expand(301, -1))


def test_a_weight_that_changes_counts_at_once():
    module, x = head(64, torch.float32), torch.randn(1, 64)
    for change in (
        lambda: None,
        lambda: module.weight.mul_(2),
        lambda: setattr(module, "weight", nn.Parameter(torch.randn(301, 64), requires_grad=False)),
        lambda: module.bfloat16(),
        lambda: module.float(),
    ):
        change()
        of_now = F.linear(x.to(module.weight.dtype), module.weight)
        torch.testing.assert_close(module(x.to(module.weight.dtype)), of_now, rtol=1e-2, atol=1e-4)
    other = copy.deepcopy(module)
    other.weight.zero_()
    assert not other(x).any() and module(x).any()


def test_a_model_keeps_its_tied_weight_and_its_logits():
    model = tiny_model("gemma")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids).logits
        quicken_head(model)
        assert isinstance(model.lm_head, FewRowsLinear)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quicken_head(nn.Linear(2, 2))  # has no head
