"""Both sides of the weight, ranks in nats, drift and rounds in one pass: each part does what it does alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eora_lab import (
    OutputStatistics,
    Recipe,
    collect_output_statistics,
    collect_statistics,
    load_model,
    plan_ranks,
)
from eora_lab.calibrate.drift import DriftStream
from eora_lab.calibrate.stream import BlockStream
from eora_lab.model.structure import block_linears
from eora_lab.run.budget import Budget
from eora_lab.run.fit import Steps, fit_group
from tests.test_drift import LAST
from tests.test_rounds import layer
from tests.tiny import SMALL, compress, logits, save_tiny, tiny_model, tiny_tokens

TOGETHER = SMALL | {"method": "eora_fisher", "inputs": "drift", "held_out": 0.25, "true_sequential": True, "rounds": 3}
BASES = [
    {"compressor": "rtn", "bits": 2},
    {"compressor": "gptq", "bits": 2, "factor_bits": 4},
    {"compressor": "wanda", "sparsity": "2:4", "bits": 16},
    {"compressor": "sparsegpt", "sparsity": "2:4", "bits": 4, "shrink": True},
]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["compressor"])
def test_ranks_and_gradients_are_those_of_the_original_and_drift_is_made_good(base):
    tokens, budget, given = tiny_tokens(24), Budget("nats"), TOGETHER | base | {"rank": 4}
    recipe = Recipe(**{name: value for name, value in given.items() if name != "progress"})
    model = tiny_model("llama")
    inputs = collect_statistics(model, tokens, recipe.held_out, progress=False)
    outputs = collect_output_statistics(model, tokens, recipe.held_out, progress=False)
    ranks = plan_ranks(model, inputs, recipe, budget, progress=False, outputs=outputs)
    report = compress(model, tokens, **given, ranks=budget)
    assert {one.name: one.rank for one in report.layers} == ranks
    cost = {name: sum(linear.weight.shape) for name, linear in block_linears(tiny_model("llama")).items()}
    assert sum(ranks[name] * cost[name] for name in cost) <= recipe.rank * sum(cost.values())
    assert all(one.nats_after <= one.nats_before for one in report.layers)
    first = report.layers[0]  # its inputs are still those of the original model
    W, now = block_linears(tiny_model("llama"))[first.name].weight, model.get_submodule(first.name)
    left = W - now.compressed.dense() - now.lora_B.float() @ now.lora_A.float()
    assert first.nats_after == pytest.approx(outputs[first.name].cost(left, inputs[first.name].metric) / 2, rel=1e-3)
    assert any(one.drift > 0.1 for one in report.layers if one.name.startswith(LAST))


@given(seed=st.integers(0, 999), base=st.sampled_from(BASES[:3]), decades=st.integers(0, 4))
@settings(deadline=None, max_examples=15)
def test_more_rounds_cost_no_more_in_the_metric_of_both_sides(seed, base, decades):
    weight, statistics = layer(seed)
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(30, len(weight), generator=generator) * torch.logspace(0, -decades, len(weight))
    outputs = OutputStatistics.from_second_moment(g.T @ g / 30)
    step = 0.1 * torch.randn(weight.shape, generator=generator)
    F = outputs.second_moment.double()
    F += outputs.damping * F.diagonal().mean() * torch.eye(len(F), dtype=F.dtype)

    def cost(rounds):
        recipe = Recipe(method="eora_fisher", group_size=16, rounds=rounds, **base)
        steps = Steps(recipe, outputs={"layer": outputs})
        fit = fit_group(steps.group(["layer"], [weight], statistics), statistics, steps, 4, step)
        left = weight.double() + step.double() - fit.compressed[0].dense().double() - fit.path.double()
        return (F @ left @ statistics.second_moment.double() @ left.T).trace().item()

    once, more = cost(1), cost(4)
    assert more <= once * (1 + 1e-4)


def test_an_interrupted_run_of_all_parts_resumes_to_the_same_bytes(tmp_path):
    name, given = save_tiny(tmp_path / "model"), TOGETHER | {"bits": 2, "rank": 4, "ranks": Budget("nats")}
    whole = load_model(name)[0]
    compress(whole, tiny_tokens(), **given, folder=tmp_path / "run")
    last = tmp_path / "run" / "blocks" / "001.safetensors"
    held = load_file(last)
    last.unlink()
    (tmp_path / "run" / "report.json").unlink()
    again = load_model(name)[0]
    compress(again, tiny_tokens(), **given, folder=tmp_path / "run")
    assert all(torch.equal(tensor, load_file(last)[key]) for key, tensor in held.items())
    assert torch.equal(logits(again, tiny_tokens(2)), logits(whole, tiny_tokens(2)))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", [BlockStream, DriftStream])
def test_a_block_runs_no_further_than_what_is_measured(kind, told):
    """But on the first mini-batch, unless `groups` told how often linears run; and what is measured does not change."""
    model, tokens, runs = tiny_model("llama"), tiny_tokens(12), []
    stream = kind(model, tokens)
    stream.begin(0)
    if told:
        stream.groups(0)
    block = model.model.layers[0]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    found = stream.statistics(0, False, ["self_attn.o_proj"])["model.layers.0.self_attn.o_proj"]
    streams = 2 if kind is DriftStream else 1
    assert len(stream.sizes) == 3
    assert runs.count("self_attn.q_proj") == 3 * streams and runs.count("mlp.down_proj") == (0 if told else streams)
    whole = collect_statistics(tiny_model("llama"), tokens, progress=False)["model.layers.0.self_attn.o_proj"]
    assert found.tokens == whole.tokens and torch.equal(found.second_moment, whole.second_moment)


def test_the_root_of_a_second_moment_that_grows_is_made_anew():
    outputs, g = OutputStatistics(6), torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    outputs.update(g[:20])
    assert outputs.root() is outputs.root()
    outputs.update(g[20:])
    L = outputs.root()
    F = outputs.second_moment.double()
    wanted = F + outputs.damping * F.diagonal().mean() * torch.eye(6, dtype=F.dtype)
    torch.testing.assert_close(L @ L.T, wanted, rtol=0, atol=1e-6)  # F is float32
    assert torch.equal(outputs.damped(outputs.damping).root(), L)
