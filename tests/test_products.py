"""Products of float32 matrices by the faster library: as exact as torch's, whatever lies how in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eora_lab import products
from eora_lab.products import fast_products

EPS = torch.finfo(torch.float32).eps
SIZES = st.sampled_from([1, 3, products.LEAST - 1, products.LEAST, 150, 257])
LAYOUTS = {
    "plain": lambda rows, columns: torch.randn(rows, columns),
    "transposed": lambda rows, columns: torch.randn(columns, rows).T,
    "part of columns": lambda rows, columns: torch.randn(rows, columns + 5)[:, 2 : 2 + columns],
    "part, transposed": lambda rows, columns: torch.randn(columns, rows + 5)[:, 5:].T,
    "every second": lambda rows, columns: torch.randn(2 * rows, 2 * columns)[::2, ::2],
    "one row again and again": lambda rows, columns: torch.randn(1, columns).expand(rows, columns),
    "one number": lambda rows, columns: torch.randn(1, 1).expand(rows, columns),
}
LAYOUT = st.sampled_from(sorted(LAYOUTS))


def assert_product(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rest: torch.Tensor | float = 0.0) -> None:
    """Every entry within the bound of a float32 sum of k terms (Higham, Accuracy and Stability, 3.5)."""
    a, b = a.detach().double(), b.detach().double()
    bound = 2 * (a.shape[1] + 3) * EPS * (a.abs() @ b.abs() + abs(rest))
    assert ((found.detach().double() - (a @ b + rest)).abs() <= bound + 1e-30).all()


@settings(deadline=None)
@given(m=SIZES, k=SIZES, n=SIZES, left=LAYOUT, right=LAYOUT, seed=st.integers(0, 99))
def test_every_way_to_multiply(m, k, n, left, right, seed):
    torch.manual_seed(seed)
    a, b = LAYOUTS[left](m, k), LAYOUTS[right](k, n)
    bias, c = torch.randn(n), LAYOUTS[left](m, n).clone()
    with fast_products():
        assert_product(a @ b, a, b)
        assert_product(torch.nn.functional.linear(a, b.T, bias), a, b, bias.double())
        assert_product(torch.addmm(c, a, b, beta=0.5, alpha=-2), -2 * a, b, 0.5 * c.double())
        assert_product(c.clone().addmm_(a, b, beta=0.5, alpha=-2), -2 * a, b, 0.5 * c.double())


def test_wide_right_sides_are_multiplied_in_parts(monkeypatch):
    a, b, bias = torch.randn(200, 300), torch.randn(300, 777), torch.randn(777)
    for size in (1, 300 * 200, 300 * 776, 300 * 777):
        monkeypatch.setattr(products, "COPIED", size)
        with fast_products():
            assert_product(a @ b, a, b)
            assert_product(torch.nn.functional.linear(a, b.T, bias), a, b, bias.double())


def test_gradients():
    x, W = torch.randn(150, 200), torch.randn(180, 200, requires_grad=True)
    with fast_products():
        torch.nn.functional.linear(x, W).square().sum().backward()
    wanted = 2 * (x.double() @ W.detach().double().T).T @ x.double()
    assert ((W.grad - wanted).norm() / wanted.norm()).item() < 1e-5


def test_a_beta_of_zero_takes_no_nan_over():
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    with fast_products():
        assert_product(torch.full((200, 200), torch.nan).addmm_(a, b, beta=0), a, b)


def test_nan_and_inf_stay():
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    a[3, 5], a[7, 9] = torch.nan, torch.inf
    with fast_products():
        found = a @ b
    assert found[3].isnan().all() and not found[7].isfinite().any()
    assert found.isfinite().sum() == 198 * 200


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(dtype):
    a, b = torch.randn(200, 200, dtype=dtype), torch.randn(200, 200, dtype=dtype)
    plain = a @ b
    with fast_products():
        assert torch.equal(a @ b, plain)


@pytest.mark.parametrize("shape", [(199, 200), (200,)])
def test_what_does_not_fit_is_refused_as_ever(shape):
    with fast_products(), pytest.raises(RuntimeError, match=r"shape|size"):
        torch.mm(torch.randn(200, 200), torch.randn(shape).reshape(-1, shape[-1]))


def test_all_is_as_before_in_the_end():
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    plain = a @ b

    @fast_products()
    def product() -> torch.Tensor:
        with fast_products():
            pass
        return a @ b

    with pytest.raises(RuntimeError), fast_products():
        a @ b[1:]
    inside = product()
    assert torch.equal(a @ b, plain)
    if products.helps():
        assert not torch.equal(inside, plain), "the other library was not asked"
    assert_product(inside, a, b)
