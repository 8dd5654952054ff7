"""Layers that aim at the outputs of the original model, on what the blocks before them have become."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eora_lab import EoraLabError, load_model
from eora_lab.calibrate.drift import DriftStream
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate.drift import drift_step
from eora_lab.run.adapters import OFF, use_only
from eora_lab.run.folder import load_run
from eora_lab.run.recipe import Recipe
from eora_lab.run.task_adapter import solve_adapter
from tests.tiny import SMALL, compress, logits, moe_model, save_tiny, tiny_model, tiny_tokens

DRIFT = SMALL | {"inputs": "drift", "held_out": 0.34}
BITS2 = {"bits": 2, "rank": 2}  # so that there is a drift to speak of
LAST = "model.layers.1"


def inputs_of(model, tokens):
    """Name -> inputs of the linears of the last block, (tokens, in), in a plain pass."""
    found = {}
    for name, module in model.get_submodule(LAST).named_modules():
        if hasattr(module, "in_features"):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({f"{LAST}.{name}": args[0]}))
    logits(model, tokens)
    return {name: x.flatten(0, -2).double() for name, x in found.items()}


def test_both_streams_measure_what_the_two_models_do():
    tokens, model = tiny_tokens(), tiny_model("llama")
    stream = DriftStream(model, tokens)
    stream.begin(0)
    for statistics in stream.statistics(0, keep_outputs=False).values():
        assert not statistics.drift.any()  # nothing is compressed yet
    compress(model, tokens, **SMALL, skip=LAST.replace(".", "[.]"))
    stream.advance(0)
    stream.begin(1)
    found = stream.statistics(1, keep_outputs=False)
    was, now = inputs_of(tiny_model("llama"), tokens), inputs_of(model, tokens)
    assert len(found) == 7
    for name, statistics in found.items():
        x, seen = was[name], now[name]
        wanted = (x - seen).T @ seen / len(seen)
        assert wanted.abs().max() > 1e-3 * x.square().mean()
        torch.testing.assert_close(statistics.drift.double(), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@given(seed=st.integers(0, 999), noise=st.sampled_from([0.0, 0.3, 3.0]), dead=st.booleans())
@settings(deadline=None, max_examples=20)
def test_no_other_share_of_the_step_leaves_less_on_held_out_tokens(seed, noise, dead):
    generator = torch.Generator().manual_seed(seed)
    W, M = torch.randn(6, 8, generator=generator), 0.3 * torch.randn(8, 8, generator=generator)
    scale = torch.logspace(0, -6, 8)  # an ill-conditioned S
    scale[3] *= not dead  # a channel that is always zero

    def seen(tokens):
        now = torch.randn(tokens, 8, generator=generator) * scale
        was = now + now @ M + noise * torch.randn(tokens, 8, generator=generator)
        statistics = InputStatistics(8)
        statistics.update(now)
        statistics.update_drift(now, was)
        return was, now, statistics

    statistics = seen(12)[2]
    was, now, statistics.held_out = seen(30)
    step, share = drift_step(W, statistics)

    def left(times):
        return ((was - now) @ W.T - times * (now @ step.T)).square().sum().item()

    assert 0 <= share <= 1
    if step is None:
        assert share == 0
        return
    assert left(1) <= left(0) * (1 + 1e-5)
    best = min((0.0, 0.5, 0.9, 1.1, 2.0), key=left)
    assert left(1) <= left(best) * (1 + 1e-5) or (share == 1 and best > 1)


@pytest.mark.parametrize("sequential", [False, True])
def test_held_out_outputs_of_a_block_are_never_further_away_than_without(sequential):
    """Whatever the step: the block is judged, and one that aims at its own weights is among those tried."""
    tokens = tiny_tokens()

    def outputs(model):
        found = []
        model.get_submodule(LAST).register_forward_hook(lambda _, args, output: found.append(output))
        logits(model, tokens[-2:])
        return found[0] if torch.is_tensor(found[0]) else found[0][0]

    wanted, error = outputs(tiny_model("llama")), {}
    for inputs in ("compensated", "drift"):
        model = tiny_model("llama")
        compress(model, tokens, **DRIFT | BITS2 | {"inputs": inputs, "true_sequential": sequential})
        error[inputs] = ((outputs(model) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()
    assert error["drift"] <= error["compensated"] * (1 + 1e-5)


def test_what_was_lost_before_is_made_good_where_it_can_be():
    model, tokens = tiny_model("llama"), tiny_tokens(24)
    report = compress(model, tokens, **DRIFT | BITS2)
    shares = {layer.name: layer.drift for layer in report.layers}
    assert not any(share for name, share in shares.items() if not name.startswith(LAST))
    assert any(share > 0.1 for name, share in shares.items() if name.startswith(LAST))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bytes(sequential, tmp_path):
    name = save_tiny(tmp_path / "model")
    settings = DRIFT | BITS2 | {"true_sequential": sequential, "rounds": 2}
    whole = load_model(name)[0]
    compress(whole, tiny_tokens(), **settings, folder=tmp_path / "run")
    files = ["blocks/000.safetensors", "blocks/001.safetensors", "adapter/adapter_model.safetensors"]
    held = {file: load_file(tmp_path / "run" / file) for file in files}
    for file in (*files[1:], "report.json"):
        (tmp_path / "run" / file).unlink()
    compress(load_model(name)[0], tiny_tokens(), **settings, folder=tmp_path / "run")
    for file in files:
        assert all(torch.equal(tensor, load_file(tmp_path / "run" / file)[key]) for key, tensor in held[file].items())
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(whole, tiny_tokens(2)))


def test_tokens_that_experts_choose_have_no_drift():
    report = compress(moe_model(), tiny_tokens(), **DRIFT | BITS2)
    assert all(layer.drift == 0 for layer in report.layers if "experts" in layer.name)


def test_weights_that_came_compressed_and_adapters_for_tasks_aim_there_too(tmp_path):
    name = save_tiny(tmp_path / "model")
    compress(load_model(name)[0], tiny_tokens(), **SMALL | {"method": "none"}, folder=tmp_path / "run")
    model, original = load_run(tmp_path / "run")[0], load_model(name)[0]
    before = dict(original.named_modules())
    wanted, bare = logits(original, tiny_tokens()), logits(model, tiny_tokens())
    solve_adapter(model, original, tiny_tokens(), Recipe(rank=8, inputs="drift", held_out=0.34), progress=False)
    assert (logits(model, tiny_tokens()) - wanted).norm() < 0.9 * (bare - wanted).norm()
    assert dict(original.named_modules()) == before
    use_only(model, OFF)
    assert torch.equal(logits(model, tiny_tokens()), bare)


def test_it_needs_held_out_samples():
    with pytest.raises(EoraLabError, match=r"chosen on held-out samples: hold out a share, such as 0\.125"):
        compress(tiny_model("llama"), tiny_tokens(), **SMALL, inputs="drift")
