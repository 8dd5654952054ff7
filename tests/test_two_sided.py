"""EoRA in the metric of both sides, from the backward pass to the model, the run folder, the sweep and the command."""

import json

import pytest
import torch
from torch import nn

from eora_lab import (
    EoraLabError,
    InputStatistics,
    OutputStatistics,
    Recipe,
    Report,
    collect_output_statistics,
    collect_statistics,
    plan_ranks,
    solve,
)
from eora_lab.cli import main
from eora_lab.compensate.factors import store_factors
from eora_lab.compensate.shrinkage import DAMPINGS, solve_shrunk
from eora_lab.experiment import sweep
from eora_lab.experiment.store import ResultStore
from eora_lab.model.structure import block_linears
from eora_lab.run.budget import Budget
from eora_lab.run.ranks import layer_spectra
from tests.test_experts import starved
from tests.tiny import CELL, SMALL, compress, logits, tiny_model, tiny_tokens

FISHER = SMALL | {"method": "eora_fisher", "inputs": "original"}
TEXTS = ["--model", "model", "--calibration.source", "text.txt", "--calibration.nsamples", "4"]
TEXTS += ["--calibration.seqlen", "32", "--evaluation.perplexity", "text.txt", "--evaluation.windows", "2"]
TEXTS += ["--evaluation.window-length", "32", "--bits", "3", "--group-size", "32", "--compressor", "rtn"]


def apart(model: nn.Module, other: nn.Module, tokens: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the predictions from those of the first model, in nats a token."""
    ours, theirs = (logits(one, tokens).double().log_softmax(-1) for one in (model, other))
    return (ours.exp() * (ours - theirs)).sum(-1).mean().item()


def test_the_cost_of_a_small_error_is_what_it_adds_in_nats():
    """tr(F D S Dᵀ) / 2 against the divergence itself, which is what a loss grows by to second order."""
    tokens = tiny_tokens(24, 16)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # predictions that are worth something
    inputs = collect_statistics(model, tokens, progress=False)
    outputs = collect_output_statistics(model, tokens, progress=False)
    generator, measured, predicted = torch.Generator().manual_seed(0), 0.0, 0.0
    for name, linear in block_linears(model).items():
        D = (
            0.01
            * linear.weight.norm()
            * torch.randn(linear.weight.shape, generator=generator)
            / linear.weight.numel() ** 0.5
        )
        other = tiny_model("llama")
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.get_submodule(name).weight += D
        measured += apart(model, other, tokens)
        predicted += outputs[name].cost(D, inputs[name].metric) / 2
    assert predicted == pytest.approx(measured, rel=0.3)  # F from as many draws as tokens, x and g as if independent


def test_a_pass_solves_in_the_metric_and_reports_nats(tmp_path):
    model, tokens = tiny_model("llama"), tiny_tokens()
    inputs = collect_statistics(model, tokens, progress=False)
    outputs = collect_output_statistics(model, tokens, progress=False)
    reports = {}
    for method in ("eora", "eora_fisher"):
        model = tiny_model("llama")
        dense = {name: linear.weight.detach().clone() for name, linear in block_linears(model).items()}
        reports[method] = report = compress(model, tokens, **FISHER | {"method": method}, folder=tmp_path / method)
        for layer in report.layers:
            module = model.get_submodule(layer.name)
            R = dense[layer.name] - module.compressed.dense()
            wanted = solve(method, R, inputs[layer.name], layer.rank, outputs[layer.name])
            path = module.lora_B.float() @ module.lora_A.float()
            torch.testing.assert_close(path, wanted.dense(), rtol=0, atol=2e-3 * wanted.dense().abs().max().item())
            if method == "eora_fisher":
                left = outputs[layer.name].cost(R - path, inputs[layer.name].metric) / 2
                assert layer.nats_after == pytest.approx(left, rel=1e-3) and layer.nats_after < layer.nats_before
    assert {layer.nats_after for layer in reports["eora"].layers} == {None}
    assert "nats a token, to second order, all layers added" in reports["eora_fisher"].summary()
    assert Report.from_json(reports["eora_fisher"].to_json()) == reports["eora_fisher"]


def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    settings = FISHER | {"inputs": "compensated", "ranks": Budget("nats"), "labels": "text"}
    whole = compress(tiny_model("llama"), tiny_tokens(), **settings, folder=tmp_path / "whole")
    compress(tiny_model("llama"), tiny_tokens(), **settings, folder=tmp_path / "stopped")
    (tmp_path / "stopped" / "report.json").unlink()
    (tmp_path / "stopped" / "blocks" / "001.safetensors").unlink()
    again = compress(tiny_model("llama"), tiny_tokens(), **settings, folder=tmp_path / "stopped")
    assert [(la.rank, la.error_after, la.nats_after) for la in again.layers] == [
        (la.rank, la.error_after, la.nats_after) for la in whole.layers
    ]
    (tmp_path / "stopped" / "report.json").unlink()  # nothing is left to do: then nothing is measured
    monkeypatch.setattr("eora_lab.run.pipeline.collect_output_statistics", lambda *_, **__: pytest.fail("measured"))
    compress(tiny_model("llama"), tiny_tokens(), **settings, folder=tmp_path / "stopped")
    with pytest.raises(EoraLabError, match=r"holds another run .labels was 'text', now 'model'"):
        compress(tiny_model("llama"), tiny_tokens(), **settings | {"labels": "model"}, folder=tmp_path / "stopped")


def test_a_budget_in_nats_removes_more_of_the_predicted_loss_for_the_same_parameters():
    model, tokens = tiny_model("llama"), tiny_tokens()
    inputs = collect_statistics(model, tokens, progress=False)
    outputs = collect_output_statistics(model, tokens, progress=False)
    recipe = Recipe("rtn", bits=3, group_size=32, rank=8, method="eora_fisher", inputs="original")
    left = {}
    for objective in ("uniform", "relative", "nats"):
        budget = Budget(objective, multiple=1)
        ranks = plan_ranks(model, inputs, recipe, budget, progress=False, outputs=outputs)
        cost = {name: sum(linear.weight.shape) for name, linear in block_linears(model).items()}
        assert sum(ranks[name] * cost[name] for name in cost) <= 8 * sum(cost.values())
        given = {"statistics": inputs, "outputs": outputs, "ranks": ranks}
        report = compress(tiny_model("llama"), None, **FISHER, **given)
        left[objective] = sum(layer.nats_after for layer in report.layers)
    assert left["nats"] < min(left["uniform"], left["relative"])


def test_spectra_in_nats_are_the_predicted_loss_of_each_rank():
    model, tokens = tiny_model("llama"), tiny_tokens()
    inputs = collect_statistics(model, tokens, progress=False)
    outputs = {name: one.damped(1e-2) for name, one in collect_output_statistics(model, tokens, progress=False).items()}
    from eora_lab.run.fit import Steps

    recipe = Recipe("rtn", bits=3, group_size=32, method="eora_fisher")
    steps = Steps(recipe, outputs=outputs)
    layers = layer_spectra(model, inputs, recipe, progress=False, steps=steps, nats=True)
    for name, linear in block_linears(model).items():
        R = linear.weight - steps.compress(name, linear.weight.float(), inputs[name]).dense()
        whole = layers[name].spectrum.sum().item()
        assert whole == pytest.approx(outputs[name].cost(R.detach(), inputs[name].metric) / 2, rel=0.05)  # the damping


def test_experts_and_layers_without_tokens():
    tokens, errors = tiny_tokens(8), {}
    for method in ("none", "eora_fisher"):
        model = starved()
        report = compress(
            model,
            tokens,
            **FISHER | {"method": method, "held_out": 0.25},
            ranks=Budget("nats") if method != "none" else None,
        )
        errors[method] = apart(starved(), model, tokens)
    assert errors["eora_fisher"] < errors["none"]
    layers = {layer.name: layer for layer in report.layers}
    assert layers["model.layers.1.mlp.experts.2.gate_up_proj"].tokens == 0
    assert max(layer.rank for layer in report.layers) > 8


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_are_judged_by_the_metric_of_the_method(rounds):
    report = compress(tiny_model("llama"), tiny_tokens(), **FISHER, rounds=rounds)
    once = compress(tiny_model("llama"), tiny_tokens(), **FISHER)
    assert sum(la.nats_after for la in report.layers) <= 1.001 * sum(la.nats_after for la in once.layers)


def test_factors_in_few_bits_are_fitted_in_the_metric():
    left = {}
    for refit in (True, False):
        report = compress(tiny_model("llama"), tiny_tokens(), **FISHER, factor_bits=3, refit=refit)
        left[refit] = sum(layer.nats_after for layer in report.layers)
    assert left[True] < left[False]


def test_few_bit_factors_keep_to_the_two_sided_optimum():
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    R, x, g = normal(96, 128), normal(500, 128) @ normal(128, 128), normal(500, 96) * torch.logspace(0, 2, 96)
    inputs, outputs = InputStatistics(128), OutputStatistics(96)
    inputs.update(x)
    outputs.update(g)
    answer = solve("eora_fisher", R, inputs, 32, outputs)

    def lost(*fitted) -> float:
        A, B = store_factors(answer, 4, (R, inputs), *fitted).dense()
        error = outputs.whitened(R - B @ A)
        return (error @ inputs.second_moment.double() * error).sum().item()

    assert lost(outputs) < lost()


def test_shrinkage_chooses_a_damping_on_held_out_tokens():
    model, tokens = tiny_model("llama"), tiny_tokens(8)
    inputs = collect_statistics(model, tokens, held_out=0.5, progress=False)
    outputs = collect_output_statistics(model, tokens, held_out=0.5, progress=False)
    name = "model.layers.0.mlp.up_proj"
    R = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))

    def left(answer) -> float:
        return outputs[name].held_out.cost(R - answer.dense(), inputs[name].held_out.metric)

    answer, _ = solve_shrunk("eora_fisher", R, inputs[name], 8, outputs[name])
    assert all(
        left(answer) <= left(solve("eora_fisher", R, inputs[name], 8, outputs[name].damped(damping))) * (1 + 1e-6)
        for damping in DAMPINGS
    )
    report = compress(model, tokens, **FISHER, held_out=0.5, shrink=True)
    assert all(layer.held_out_after < layer.held_out_before for layer in report.layers)
    outputs[name].held_out = None
    with pytest.raises(EoraLabError, match="hold out a share"):
        solve_shrunk("eora_fisher", R, inputs[name], 8, outputs[name])


def test_shared_cells_are_what_compress_model_gives(workplace):
    from eora_lab import calibration_batches, load_model

    grid = CELL | {"bits": 3, "method": "eora_fisher", "rank": [4, 8], "budget": ["uniform", "nats"]}
    sweep(grid, "store", announce=lambda _: None)
    found = {(cell["config"]["rank"], cell["config"]["budget"]): cell for cell in ResultStore("store").cells()}
    assert len(found) == 4
    for (rank, objective), cell in found.items():
        model, tokenizer = load_model("model")
        batches = calibration_batches(tokenizer, "text.txt", 4, 32)
        report = compress(model, batches, **FISHER | {"rank": rank}, ranks=Budget(objective))
        assert cell["error"] == ""
        for (name, own, _, after), layer in zip(cell["result"]["layers"], report.layers, strict=True):
            assert (name, own) == (layer.name, layer.rank) and after == pytest.approx(layer.error_after, rel=1e-3)
    assert len(list((workplace / "store/cache/outputs").glob("*/index.json"))) == 1
    sweep(grid | {"labels": "text"}, "store", announce=lambda _: None)
    assert len(list((workplace / "store/cache/outputs").glob("*/index.json"))) == 2
    assert len(list((workplace / "store/cache/statistics").glob("*/index.json"))) == 1


def test_the_commands(workplace, capsys):
    assert (
        main(["compress", "run", *TEXTS, "--rank", "8", "--method", "eora_fisher", "--budget.objective", "nats"]) == 0
    )
    assert "predicted loss" in capsys.readouterr().out
    ranks = json.loads((workplace / "run" / "ranks.json").read_text())
    assert len(set(ranks.values())) > 1
    assert main(["compare", *TEXTS, "--rank", "8", "--method", "eora", "eora_fisher"]) == 0
    assert "eora_fisher" in capsys.readouterr().out
    assert main(["compress", "other", *TEXTS, "--rank", "8", "--budget.objective", "nats"]) == 1
    assert (
        "a budget in nats needs the gradients at every layer's output: use method eora_fisher"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": {}}, "eora_fisher needs gradients: give token ids, or measure them before"),
        ({"method": "eora", "ranks": Budget("nats")}, "a budget in nats needs the gradients at every layer's output"),
        ({"labels": "own"}, "unknown labels 'own'; known: model, text"),
    ],
)
def test_what_cannot_be_is_told_before_anything_changes(settings, message):
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=message):
        compress(model, None if "statistics" in settings else tiny_tokens(), **FISHER | settings)
    assert all(isinstance(linear, nn.Linear) for linear in block_linears(model).values())
