"""Who multiplies a compressed layer: which backend, why not the others, and the door for one more."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.errors import EoraLabError
from eora_lab.layer import backends
from eora_lab.layer.linear import backends_in_use, unpacked, use_backend
from tests.test_linear import layer


def test_the_first_backend_that_takes_a_layer_computes_it():
    quarter = layer(dtype=torch.bfloat16)
    assert [quarter.backend_for(rows) for rows in (1, 4, 5, 32, 33)] == ["numba", "numba", "int4", "int4", "numba"]
    assert [layer(bits=3).backend_for(rows) for rows in (1, 5, 1000)] == ["numba"] * 3
    half = layer(bits=16, sparse=True)
    assert half.backend_for(1) == "tiles"
    model = nn.Sequential(quarter, half)
    assert backends_in_use(model) == {"numba": 1, "tiles": 1}
    with unpacked(model):
        assert backends_in_use(model) == {"numba": 1, "merged": 1}
        assert backends_in_use(model, 1000) == {"dense": 1, "merged": 1}
    assert "backend=numba" in repr(quarter)


def test_a_layer_follows_the_rows_of_x():
    module, W = layer(dtype=torch.bfloat16), layer(dtype=torch.bfloat16).dense().float()
    for rows in (1, 8, 65, 2, 128, 1):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
        exact = x.float() @ (W + module.lora_B.float() @ module.lora_A.float()).T + module.bias.float()
        assert (module(x).float() - exact).norm() < 8e-3 * exact.norm()
    assert set(module._products) == {"numba", "int4"}


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ({}, "triton", "it needs an NVIDIA GPU, and the layer is on cpu"),
        ({}, "int4", "it needs bfloat16 on a CPU"),
        ({"bits": 3, "dtype": torch.bfloat16}, "int4", "it reads 4-bit grids of neighbouring channels"),
        ({"bits": 16, "sparse": True, "dtype": torch.bfloat16}, "int4", "it reads 4-bit grids"),
        ({"group_size": 16, "dtype": torch.bfloat16}, "int4", "groups of 32, 64, 128, 256"),
        ({}, "dense", "kept dense only while a model is measured"),
        ({}, "merged", "kept dense only while a model is measured"),
        ({"dtype": torch.bfloat16}, "int4", "slower than numba for 1 rows"),
        ({}, "numba", ""),
        ({"bits": 16, "sparse": True}, "tiles", ""),
    ],
)
def test_every_backend_says_why_it_does_not_compute(kind, name, reason):
    found = backends.reasons(layer(**kind))
    assert set(found) == set(backends.BACKENDS) and list(found.values()).count("") == 1
    assert (reason in found[name]) if reason else found[name] == ""


@pytest.mark.parametrize("kind", [{}, {"rank": 0}, {"bits": 16, "sparse": True}, {"dtype": torch.float64}])
def test_w_and_path_in_one_matrix_are_the_layer_and_gradients_go_the_other_way(kind):
    module, x = layer(**kind), torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    x = x.to(module.lora_A.dtype)
    exact = x.double() @ (module.dense(torch.float64) + module.lora_B.double() @ module.lora_A.double()).T
    exact += module.bias.double()
    with unpacked(module):
        assert module.backend_for(40) == "merged"
        assert (module(x) - exact).norm() < 1e-6 * exact.norm()
        assert backends.choose(module, x, True).name == "dense"
        module.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(96, 0)))
        exact = x.double() @ module.dense(torch.float64).T + module.bias.double()
        assert (module(x) - exact).norm() < 1e-6 * exact.norm()
    assert not {"merged", "dense"} & module._products.keys()


def test_a_path_is_not_lost_in_the_rounding_of_a_sum():
    module, x = layer(dtype=torch.bfloat16), torch.ones(40, 128).bfloat16()
    with unpacked(module):
        assert backends.choose(module, x, False).name == "dense"
        assert "lost in the rounding" in backends.BACKENDS["merged"].why_not(module, x, False)


def test_a_backend_can_be_forced_and_refused():
    model, x = nn.Sequential(layer(dtype=torch.bfloat16)), torch.ones(1, 128).bfloat16()
    auto = model(x)
    use_backend(model, "tiles")
    assert backends_in_use(model) == {"tiles": 1}
    torch.testing.assert_close(model(x), auto, rtol=0, atol=8e-3 * auto.abs().max().item())
    with pytest.raises(EoraLabError, match="the triton backend cannot take this layer: it needs an NVIDIA GPU"):
        use_backend(model, "triton")
    with pytest.raises(EoraLabError, match="unknown backend 'cuda'; known: auto, triton, int4, numba, "):
        use_backend(model, "cuda")
    with pytest.raises(EoraLabError, match="this model has none"):
        use_backend(nn.Linear(2, 2), "tiles")


def test_one_more_backend_computes_when_it_is_in_the_list(monkeypatch):
    class Zeros(backends.Backend):
        name = "zeros"

        def why_not(self, layer, x, gradients):
            return None if layer.sample.kind == "grid" else "grids only"

        def prepare(self, layer):
            return lambda layer, x: x.new_zeros(*x.shape[:-1], layer.out_features)

    monkeypatch.setattr(backends, "BACKENDS", {"zeros": Zeros()} | backends.BACKENDS)
    assert not layer()(torch.ones(1, 128)).any()
    assert layer(bits=16, sparse=True)(torch.ones(1, 128)).any()


def test_a_copy_computes_with_its_own_path():
    module, x = layer(), torch.ones(1, 128)
    before = module(x)
    other = copy.deepcopy(module)
    other.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(96, 0)))
    assert not torch.equal(other(x), before) and torch.equal(module(x), before)
    other.lora_A = module.lora_A  # as a copy that never computed would
    third = copy.deepcopy(module)
    third.bias.data.add_(1)
    assert torch.allclose(third(x), before + 1, atol=1e-5) and torch.equal(module(x), before)


@pytest.mark.parametrize("name", ["int4", "numba", "tiles"])
def test_a_buffer_that_is_written_to_counts_at_once(name):
    module, x = layer(dtype=torch.bfloat16), torch.ones(8, 128).bfloat16()
    module.backend = name
    for change in (
        lambda: module.lora_A.mul_(-2),
        lambda: setattr(module, "lora_B", module.lora_B * 3),
        lambda: module.bias.requires_grad_(False).add_(5),
        lambda: module.scales.mul_(2),
        lambda: module.load_state_dict(layer(dtype=torch.bfloat16).state_dict()),
    ):
        module(x)
        change()
        exact = x.double() @ (module.dense(torch.float64) + module.lora_B.double() @ module.lora_A.double()).T
        exact += module.bias.double()
        assert (module(x) - exact).norm() < 1e-2 * exact.norm()


def test_a_layer_that_is_made_in_inference_mode():
    with torch.inference_mode():
        module, x = layer(), torch.ones(1, 128)
        exact = x @ (module.dense() + module.lora_B @ module.lora_A).T + module.bias
        torch.testing.assert_close(module(x), exact)
    torch.testing.assert_close(module(x), exact.clone())


@pytest.mark.parametrize("name", ["int4", "numba"])
def test_another_path_leaves_what_was_made_of_the_weight(name):
    module, x = layer(dtype=torch.bfloat16), torch.ones(8, 128).bfloat16()
    module.backend = name
    module(x)
    made = module.made[name]
    module.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(96, 0)))
    exact = x.double() @ module.dense(torch.float64).T + module.bias.double()
    assert (module(x) - exact).norm() < 8e-3 * exact.norm() and module.made[name] is made


def test_a_layer_is_freed_when_nobody_holds_it():
    gc.disable()
    try:
        module = layer()
        module(torch.ones(1, 128))
        alive = weakref.ref(module)
        del module
        assert alive() is None
    finally:
        gc.enable()


def test_a_model_may_change_an_output_in_place():
    """As Falcon does, with gradients on."""
    module, x = layer(rank=0), torch.ones(2, 3, 128, requires_grad=True)
    module.bias = None
    y = module(x)
    y += 1
    y.sum().backward()
    assert x.grad.abs().sum() > 0
