"""Layers that are handed the same rows of x compute in one call, and nothing changes by it."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.layer.cpu_kernels import joined
from eora_lab.layer.linear import CompensatedLinear
from tests.test_linear import layer


def several(outs, **kind) -> list[CompensatedLinear]:
    """Layers for one input, that the kernel computes."""
    layers = [layer(out=out, **kind) for out in outs]
    for one in layers:
        one.backend = "numba"
    return layers


def apart(layers: list[CompensatedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """What each makes of a tensor of its own."""
    return [copy.deepcopy(one)(x.clone()) for one in layers]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call of the kernel computed."""
    found, run = [], joined.run

    def counted(function, call):
        found.append(call.count)
        run(function, call)

    monkeypatch.setattr(joined, "run", counted)
    return found


@given(st.data())
@settings(max_examples=30)
def test_together_they_make_what_they_make_apart(data):
    """Bit by bit, whatever their bits, ranks, grids and outputs, and in whatever order they are called."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kinds = st.fixed_dictionaries(
        {"bits": st.sampled_from([3, 4]), "out": st.integers(1, 70), "rank": st.integers(0, 20)}
        | {"sparse": st.booleans(), "zero_point": st.just("integer"), "group_size": st.sampled_from([32, 64])}
    )
    layers = [layer(dtype=dtype, **kind) for kind in data.draw(st.lists(kinds, min_size=2, max_size=4))]
    for one in layers:
        one.backend = "numba"
    for turn in range(4):
        x = torch.randn(data.draw(st.integers(1, 6)), 128, generator=torch.Generator().manual_seed(turn)).to(dtype)
        order = data.draw(st.permutations(range(len(layers))))
        made = {i: layers[i](x) for i in order}
        for i, expected in enumerate(apart(layers, x)):
            assert torch.equal(made[i], expected)


def test_from_the_second_time_on_the_first_computes_for_all(calls):
    q, k, v = several((96, 32, 32))
    o = several((128,))[0]
    for _ in range(3):
        x = torch.randn(1, 128)
        o(torch.cat([q(x), k(x), v(x)], 1)[:, :128].clone())
    assert calls == [1, 1, 1, 1, 3, 1, 3, 1]


def test_who_does_not_come_is_left_out(calls):
    q, k, v = several((96, 32, 32))
    for _ in range(2):
        x = torch.randn(1, 128)
        assert [torch.equal(one(x), alone) for one, alone in zip((q, k, v), apart([q, k, v], x), strict=True)]
    calls.clear()
    for _ in range(3):
        x = torch.randn(1, 128)
        q(x), v(x)
    assert calls == [3, 2, 2]


def test_a_tensor_that_was_written_to_is_another_one():
    q, k = several((96, 32))
    for change in (None, None, lambda x: x.mul_(2), lambda x: x[:, 3].zero_(), None):
        x = torch.randn(2, 128)
        assert torch.equal(q(x), apart([q], x)[0])
        if change:
            change(x)
        assert torch.equal(k(x), apart([k], x)[0])
    q, k = several((96, 32))
    with torch.inference_mode():  # where nobody counts
        for change in (None, None, lambda x: x.mul_(2), lambda x: x[:, 3].zero_()):
            x = torch.randn(2, 128)
            q(x)
            if change:
                change(x)
            assert torch.equal(k(x), apart([k], x)[0])


def test_in_inference_mode_they_compute_together_too(calls):
    q, k, v = several((96, 32, 32))
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, 128)
            q(x), k(x), v(x)
    assert calls == [1, 1, 1, 3, 3]


def test_a_layer_that_changes_computes_again():
    q, k = several((96, 32))
    changes = (
        None,
        lambda: k.set_factors(StoredFactors(torch.zeros(0, 128), torch.zeros(32, 0))),
        lambda: k.scales.mul_(2),
        lambda: setattr(k, "bias", torch.ones(32)),
        lambda: setattr(k, "backend", "tiles"),
    )
    for change in changes:
        for _ in range(3):
            x = torch.randn(1, 128)
            q(x)
            if change:
                change()
            assert torch.equal(k(x), apart([k], x)[0])


def test_layers_of_other_kinds_are_left_alone(calls):
    q, k, v = several((96,)) + several((96,), bits=3) + several((96,), group_size=128)
    for _ in range(3):
        x = torch.randn(1, 128)
        made = [one(x) for one in (q, k, v)]
    assert calls == [1] * 9 and all(torch.equal(a, b) for a, b in zip(made, apart([q, k, v], x), strict=True))


def test_threads_do_not_mix():
    layers, wrong = several((96, 32, 32)), []
    xs = [torch.randn(1, 128) for _ in range(4)]
    expected = [apart(layers, x) for x in xs]

    def work(number: int) -> None:
        for _ in range(200):
            x = xs[number].clone()
            made = [one(x) for one in layers]
            wrong.extend(i for i, y in enumerate(made) if not torch.equal(y, expected[number][i]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_they_are_freed_when_nobody_holds_them():
    gc.disable()
    try:
        model = nn.ModuleList(several((96, 32, 32)))
        for asked in (3, 3, 2):  # one is left over
            x = torch.randn(1, 128)
            for one in list(model)[:asked]:
                one(x)
        alive = [weakref.ref(one) for one in (*model, model[1].codes, model[2].codes, x)]
        del model, one, x
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
