"""The pass on small models of three architectures: what it measures, replaces, reports, stores and resumes."""

import json
import re
import time
from dataclasses import fields

import pytest
import torch
from torch import nn

from eora_lab import (
    Calibration,
    EoraLabError,
    Evaluation,
    InputStatistics,
    Report,
    collect_statistics,
    perplexity,
    window_losses,
)
from eora_lab.calibrate.statistics import output_energy
from eora_lab.compress import COMPRESSORS, PRUNERS
from eora_lab.environment import seconds_by_step, step, timed
from eora_lab.finetune.settings import Training
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import decoder_blocks
from eora_lab.run.adapters import use_only
from eora_lab.run.budget import Budget
from eora_lab.run.ranks import plan_ranks
from eora_lab.run.recipe import Recipe
from tests.tiny import CONFIGS, SMALL, compress, logits, tiny_model, tiny_tokens

K_PROJ = "model.layers.0.self_attn.k_proj"


def test_the_report_tells_where_the_time_went():
    report = compress(tiny_model("llama"), tiny_tokens(), **SMALL, judge=lambda _model: {"text": [2.0, 3.0]})
    assert {"checks", "forward", "statistics", "compress", "solve", "errors", "judging", "other"} == report.steps.keys()
    assert all(seconds > 0 for seconds in report.steps.values())
    for name in ("compress", "solve"):  # as the layers say it
        layers = sum(getattr(layer, f"seconds_{name}") for layer in report.layers)
        assert report.steps[name] == pytest.approx(layers, rel=0.5)
    assert report.seconds < sum(report.steps.values())
    line = report.steps_line()
    assert line in report.summary() and line.split(", ")[-1].startswith("other ")
    assert Report.from_json(report.to_json()).steps == report.steps


def test_steps_within_steps_count_once():
    assert seconds_by_step() == {}
    with timed():
        with step("outer"):
            with step("inner"), timed():  # goes on
                time.sleep(0.02)
            assert seconds_by_step()["outer"] < 0.02 <= seconds_by_step()["inner"]
        with pytest.raises(KeyError), step("failed"):
            raise KeyError
        assert seconds_by_step().keys() == {"other", "outer", "inner", "failed"}
    assert seconds_by_step() == {}


@pytest.mark.parametrize("kind", CONFIGS)
def test_statistics_are_those_of_a_plain_forward_pass(kind):
    model, tokens = tiny_model(kind), tiny_tokens()
    found = collect_statistics(model, tokens, progress=False)
    seen: dict[str, list[torch.Tensor]] = {}
    names = {
        f"{prefix}.{n}"
        for prefix, b in decoder_blocks(model).items()
        for n, m in b.named_modules()
        if isinstance(m, nn.Linear)
    }
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
    logits(model, tokens)  # all samples at once, all blocks in one go
    assert set(found) == names == set(seen)
    for name in names:
        x = torch.cat(seen[name]).double()
        assert found[name].tokens == tokens.numel()
        exact = x.T @ x / len(x)
        torch.testing.assert_close(
            found[name].second_moment.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item()
        )
        torch.testing.assert_close(found[name].mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_linears_that_share_an_input_share_statistics(kind):
    found = collect_statistics(tiny_model(kind), tiny_tokens(2), progress=False)
    for block in ("model.layers.0", "model.layers.1"):
        at = {name.rsplit(".", 1)[-1]: id(s) for name, s in found.items() if name.startswith(block)}
        assert at["q_proj"] == at["k_proj"] == at["v_proj"]
        assert at["gate_proj"] == at["up_proj"]
        assert len(set(at.values())) == 4


def test_statistics_of_some_layers_are_those_of_the_whole_pass():
    model, tokens = tiny_model("llama"), tiny_tokens()
    whole = collect_statistics(model, tokens, progress=False)
    names = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    for only, wanted in {r"1\.self_attn\.[qkv]_proj": names, K_PROJ: {K_PROJ}}.items():
        some = collect_statistics(model, tokens, progress=False, only=only)
        assert set(some) == wanted
        assert all(torch.equal(some[name].second_moment, whole[name].second_moment) for name in wanted)
    with pytest.raises(EoraLabError, match=r"no layer matches 'x\{9\}'; names are like model"):
        collect_statistics(model, tokens, only="x{9}")


def sparsity_for(compressor: str) -> dict:
    return {"sparsity": "2:4"} if compressor in PRUNERS else {}


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_compensated_model_is_closer_and_rank_decides(kind, compressor):
    tokens = tiny_tokens()
    dense = logits(tiny_model(kind), tokens)
    distance = {}
    for rank in (0, 8, 32):
        model = tiny_model(kind)
        report = compress(model, tokens, compressor, **SMALL | {"rank": rank} | sparsity_for(compressor))
        distance[rank] = (logits(model, tokens) - dense).norm().item()
        for layer in report.layers:
            assert layer.rank == rank and layer.tokens == tokens.numel()
            assert layer.error_after <= layer.error_before * (1 + 1e-6)
            if rank:  # predicted by the spectrum = measured, up to 16-bit factors
                left = layer.error_before * (1 - layer.spectrum[rank])
                assert layer.error_after == pytest.approx(left, rel=2e-3, abs=1e-5 * layer.error_before)
    assert distance[32] < distance[8] < distance[0]


def test_a_layer_smaller_than_the_rank_is_restored_whole():
    report = compress(tiny_model("llama"), tiny_tokens(), **SMALL | {"rank": 48})
    ranks = {layer.name.split(".")[-1]: layer.rank for layer in report.layers}
    assert ranks["k_proj"] == ranks["v_proj"] == 32 and ranks["q_proj"] == ranks["down_proj"] == 48
    assert all(la.error_after < 1e-5 * la.error_before for la in report.layers if la.rank == 32)


def test_no_compensation_fits_whatever_the_rank():
    report = compress(tiny_model("llama"), tiny_tokens(), method="none", rank=1000, group_size=16)
    assert all(layer.rank == 0 for layer in report.layers)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_rounds_in_turn_lower_the_error(compressor):
    left = {}
    for rounds in (1, 3):
        settings = SMALL | {"rounds": rounds, "inputs": "original"} | sparsity_for(compressor)
        report = compress(tiny_model("llama"), tiny_tokens(), compressor, **settings)
        left[rounds] = [layer.error_after for layer in report.layers]
    assert all(after <= before * 1.001 for before, after in zip(left[1], left[3], strict=True))  # 16-bit factors
    assert sum(left[3]) < 0.95 * sum(left[1]) or compressor == "gptq"  # whose errors leave a path little to take up
    with pytest.raises(EoraLabError, match="rounds must be 1 or more"):
        compress(tiny_model("llama"), tiny_tokens(), **SMALL, rounds=0)


def test_factors_in_few_bits_are_fitted_to_the_error_unless_they_are_not():
    left = {}
    for refit in (True, False):
        settings = SMALL | {"factor_bits": 3, "refit": refit, "inputs": "original"}
        report = compress(tiny_model("llama"), tiny_tokens(), **settings)
        left[refit] = [layer.error_after for layer in report.layers]
    assert sum(left[True]) < 0.99 * sum(left[False])


def test_a_rank_for_a_layer_that_is_not_there_is_refused():
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match="a rank is given for typo, which is no linear"):
        compress(model, tiny_tokens(), **SMALL, ranks={"typo": 3})
    assert isinstance(model.get_submodule(K_PROJ), nn.Linear)


def test_a_budget_is_spent_by_the_pass_and_kept_for_a_resumed_one(tmp_path, monkeypatch):
    settings = SMALL | {"ranks": Budget("relative", multiple=1), "folder": tmp_path / "run"}
    for inputs in ("original", "compensated"):
        model, recipe = tiny_model("llama"), Recipe("rtn", bits=3, group_size=32, rank=8, inputs=inputs)
        statistics = collect_statistics(model, tiny_tokens(), progress=False)
        planned = plan_ranks(model, statistics, recipe, Budget("relative", multiple=1), progress=False)
        report = compress(model, tiny_tokens(), **settings | {"inputs": inputs, "folder": tmp_path / inputs})
        assert {layer.name: layer.rank for layer in report.layers} == planned and len(set(planned.values())) > 1
    monkeypatch.setattr("eora_lab.run.pipeline.spread", lambda *_: pytest.fail("planned once more"))
    (tmp_path / "compensated" / "report.json").unlink()
    again = compress(tiny_model("llama"), tiny_tokens(), **settings | {"folder": tmp_path / "compensated"})
    assert [layer.rank for layer in again.layers] == [layer.rank for layer in report.layers]


def test_a_judge_measures_before_and_after(tmp_path):
    windows = tiny_tokens(4, 20)
    model = tiny_model("llama")
    losses = {"dense": window_losses(model, windows)}
    judge = lambda one: {"text": window_losses(one, windows).tolist()}  # noqa: E731
    report = compress(model, tiny_tokens(), **SMALL, judge=judge, folder=tmp_path / "run")
    losses["compressed"] = window_losses(model, windows)
    use_only(model, "off")
    losses["bare"] = window_losses(model, windows)
    assert report.losses == {"text": {state: found.tolist() for state, found in losses.items()}}
    found = {state: pytest.approx(found.mean().exp().item()) for state, found in losses.items()}
    assert report.perplexity == {"text": found}
    assert Report.from_json((tmp_path / "run" / "report.json").read_text()).losses == report.losses
    ratio, gap = report.ratio("text", "compressed", "bare"), losses["compressed"] - losses["bare"]
    assert ratio.value == pytest.approx(gap.mean().exp().item())
    assert gap.min().exp() <= ratio.low <= ratio.value <= ratio.high <= gap.max().exp() and ratio.low < ratio.high
    line = next(line for line in report.summary().splitlines() if line.startswith("perplexity on text: dense"))
    assert f"; compressed / without the path {ratio}" in line and "; compressed / dense " in line
    assert re.search(r"computed by \w+ \(14 layers\)", report.summary())
    plain = compress(tiny_model("llama"), tiny_tokens(), **SMALL | {"rank": 0}, judge=judge)
    assert set(plain.losses["text"]) == {"dense", "compressed"}
    with pytest.raises(EoraLabError, match=r"what the judge finds\.text must be a list, not 9\.0"):
        compress(tiny_model("llama"), tiny_tokens(), **SMALL, judge=lambda _: {"text": 9.0})


def test_a_report_of_former_days_has_perplexities_without_intervals(tmp_path):
    compress(tiny_model("llama"), tiny_tokens(), **SMALL, folder=tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    del data["losses"]
    report = Report.from_data(data | {"perplexity": {"text": {"dense": 36.02, "compressed": 37.72}}})
    assert report.perplexity == {"text": {"dense": pytest.approx(36.02), "compressed": pytest.approx(37.72)}}
    assert "perplexity on text: dense 36.02, compressed 37.72" in report.summary().splitlines()
    for wrong in ({"dense": 36.02}, {"dense": 36.02, "compressed": -1}, {"dense": 1, "compressed": 2, "other": 3}):
        with pytest.raises(EoraLabError, match=r"losses\.text must be numbers for every window, of dense, bare"):
            Report.from_data(data | {"perplexity": {"text": wrong}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnk": 3}, "unknown setting 'rnk'; known: compressor, bits,"),
        ({"bits": "3"}, "bits must be a whole number or nothing, not '3'"),
        ({"rank": 8.5}, "rank must be a whole number, not 8.5"),
        ({"mse": 1}, "mse must be true or false, not 1"),
        ({"zero_point": "half"}, "unknown zero_point 'half'; known: float, integer"),
        ({"compressor": "gtpq"}, "(did you mean gptq?)"),
        ({"held_out": True}, "held_out must be a number, not True"),
        ({"held_out": 1}, "must be at least 0 and below 1"),
    ],
)
def test_a_recipe_checks_names_types_and_values_when_it_is_made(settings, message):
    with pytest.raises(EoraLabError, match=re.escape(message)):
        Recipe(**settings)
    with pytest.raises(EoraLabError, match="Recipe has"):
        Recipe(*range(30))


def test_a_recipe_takes_what_means_the_same():
    assert Recipe("gptq", torch.tensor(3).item(), held_out=0) == Recipe(bits=3, held_out=0.0)
    assert isinstance(Recipe(held_out=0).held_out, float)
    assert Recipe() == Recipe("gptq", bits=4, group_size=64, method="eora", rank=64, inputs="compensated")


@pytest.mark.parametrize("kind", CONFIGS)
def test_embeddings_head_norms_and_biases_stay(kind):
    model, before = tiny_model(kind), tiny_model(kind).state_dict()
    compress(model, tiny_tokens(), **SMALL)
    after = model.state_dict()
    blocks = decoder_blocks(tiny_model(kind))
    for name, tensor in before.items():
        if name.endswith("_proj.weight"):
            assert isinstance(model.get_submodule(name.removesuffix(".weight")), CompensatedLinear)
        else:
            assert torch.equal(after[name], tensor), name
    assert sum(isinstance(m, CompensatedLinear) for m in model.modules()) == 7 * len(blocks)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind == "gemma")


def test_original_inputs_do_not_see_compression_and_compensated_ones_do():
    tokens = tiny_tokens()
    statistics = collect_statistics(tiny_model("llama"), tokens, progress=False)
    reports = {}
    for name, kwargs in {
        "pass": {"inputs": "original"},
        "given": {"inputs": "original", "statistics": statistics},
        "compensated": {"inputs": "compensated"},
    }.items():
        reports[name] = compress(tiny_model("llama"), tokens, **SMALL, **kwargs)
    errors = {name: [layer.error_after for layer in report.layers] for name, report in reports.items()}
    assert errors["pass"] == pytest.approx(errors["given"], rel=1e-4)
    assert errors["pass"][:4] == pytest.approx(errors["compensated"][:4], rel=1e-4)  # q, k, v, o read original inputs
    assert errors["pass"][7:] != pytest.approx(errors["compensated"][7:], rel=1e-4)


def test_compensated_inputs_are_those_of_the_compressed_model():
    """What block 1 was calibrated on is what the finished model feeds it."""
    model, tokens = tiny_model("llama"), tiny_tokens()
    report = compress(model, tokens, **SMALL)
    name = "model.layers.1.mlp.down_proj"
    statistics = InputStatistics(64)
    block = model.model.layers[1]
    block.self_attn.q_proj.register_forward_pre_hook(lambda module, args: statistics.update(args[0]))
    logits(model, tokens)
    layer = next(layer for layer in report.layers if layer.name == "model.layers.1.self_attn.q_proj")
    original = tiny_model("llama").get_submodule(layer.name).weight
    module = model.get_submodule(layer.name)
    left = original - module.dense() - module.lora_B @ module.lora_A
    S = statistics.second_moment
    assert layer.error_after == pytest.approx(
        ((left @ S * left).sum() / (original @ S * original).sum()).item(), rel=1e-4
    )
    assert model.get_submodule(name).rank == 8


def test_report_counts_what_is_stored_and_survives_json(tmp_path):
    model = tiny_model("llama")
    report = compress(model, tiny_tokens(), **SMALL, folder=tmp_path / "run")
    on_disk = sum(f.stat().st_size for f in tmp_path.glob("run/**/*.safetensors"))
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size
    assert report.nbytes < on_disk - adapter < report.nbytes + 24_000  # headers
    assert report.weights == sum(layer.in_features * layer.out_features for layer in report.layers)
    assert report.bits_per_weight == 8 * report.nbytes / report.weights
    assert report.peak_memory > 1e7 and report.seconds > 0
    assert Report.from_json(report.to_json()) == report
    assert json.loads((tmp_path / "run/report.json").read_text())["bits_per_weight"] == report.bits_per_weight
    for text in ("model.layers.0.mlp.down_proj", "64x128", "bits", "peak memory"):
        assert text in str(report)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 1}, "bits must be between 2 and 8, not 1"),
        ({"group_size": 0}, "group size must be 1 or more, or -1 for one group per output row, not 0"),
        ({"rank": 65}, "rank 65 is larger than any layer allows: at most 64"),
        ({"ranks": {K_PROJ: 33}}, rf"rank 33 is larger than {re.escape(K_PROJ)} allows: at most 32"),
        ({"rank": -1}, "rank must be 0 or more"),
        ({"compressor": "gtpq"}, "unknown compressor 'gtpq'; known: rtn, gptq, .*magnitude"),
        ({"compressor": "wanda"}, "wanda needs a sparsity, such as 2:4"),
        ({"sparsity": "2:4"}, "rtn does not prune: leave sparsity out, or use one of magnitude, wanda, sparsegpt"),
        ({"compressor": "wanda", "sparsity": "2:3"}, "sparsity 2:3 does not fit 64 input features"),
        ({"compressor": "wanda", "sparsity": "half"}, "sparsity must be n:m such as 2:4"),
        ({"bits": 16}, "bits must be between 2 and 8, not 16"),
        ({"inputs": "original", "true_sequential": True}, 'use inputs="compensated"'),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"inputs": "none"}, "unknown inputs 'none'; known: compensated, original"),
        ({"statistics": {}}, 'pass inputs="original"'),
    ],
)
def test_bad_settings_are_told_before_anything_changes(kwargs, message):
    model, before = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(EoraLabError, match=message):
        compress(model, tiny_tokens(), **SMALL | kwargs)
    assert torch.equal(logits(model, tiny_tokens(1)), logits(before, tiny_tokens(1)))


def test_non_finite_activations_stop_with_the_layers_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(EoraLabError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or Inf"):
        collect_statistics(model, tiny_tokens(), progress=False)


def test_a_weight_that_is_not_finite_stops_with_the_layers_name():
    model, tokens = tiny_model("llama"), tiny_tokens()
    statistics = collect_statistics(model, tokens, progress=False)
    model.get_submodule(K_PROJ).weight.data[0, 0] = float("inf")
    for run in (
        lambda: plan_ranks(model, statistics, Recipe(bits=3, rank=8), Budget("relative"), progress=False),
        lambda: compress(model, tokens, **SMALL, inputs="original", statistics=statistics),
    ):
        with pytest.raises(
            EoraLabError, match=f"^{re.escape(K_PROJ)}(: weights are not finite|.weight holds NaN or Inf)"
        ):
            run()


def test_a_model_without_blocks_of_linears():
    with pytest.raises(EoraLabError, match="Sequential: no list of decoder blocks"):
        compress(nn.Sequential(nn.Linear(2, 2)), tiny_tokens())


def test_statistics_that_lack_a_layer():
    with pytest.raises(EoraLabError, match=r"model\.layers\.0\.self_attn\.q_proj: no statistics"):
        compress(tiny_model("llama"), tiny_tokens(), **SMALL, inputs="original", statistics={})


def test_half_precision_models_stay_in_their_dtype():
    model = tiny_model("llama").to(torch.bfloat16)
    compress(model, tiny_tokens(), **SMALL)
    module = model.model.layers[0].mlp.up_proj
    assert module.dense().dtype == module.lora_A.dtype == torch.bfloat16
    assert torch.isfinite(logits(model, tiny_tokens(1))).all()


def test_perplexity_is_the_mean_over_predicted_tokens():
    model, windows = tiny_model("llama"), tiny_tokens(3, 20)
    expected = torch.stack([model(w[None], labels=w[None]).loss for w in windows]).mean().exp()
    assert perplexity(model, windows) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(EoraLabError, match="seqlen >= 2"):
        perplexity(model, windows[:, :1])
    model.lm_head.weight.data[0] = float("inf")
    with pytest.raises(EoraLabError, match="logits are not finite"):
        perplexity(model, windows)


def test_held_out_samples_are_measured_apart():
    tokens = tiny_tokens(8)
    whole = collect_statistics(tiny_model("llama"), tokens[:6], progress=False)
    split = collect_statistics(tiny_model("llama"), tokens, held_out=0.25, progress=False)
    rest = collect_statistics(tiny_model("llama"), tokens[6:], progress=False)
    for name, statistics in split.items():
        assert (statistics.tokens, statistics.held_out.tokens) == (6 * 32, 2 * 32)
        torch.testing.assert_close(statistics.second_moment, whole[name].second_moment)
        torch.testing.assert_close(statistics.held_out.second_moment, rest[name].second_moment)
    report = compress(tiny_model("llama"), tokens, **SMALL, held_out=0.25)
    for layer in report.layers:
        assert layer.held_out_after < layer.held_out_before
    gained = [sum(getattr(layer, f) for layer in report.layers) for f in ("error_after", "held_out_after")]
    assert gained[0] < gained[1]  # less is gained on tokens that were not calibrated on
    assert "held-out tokens" in report.summary()
    with pytest.raises(EoraLabError, match="leaves none on one side"):
        compress(tiny_model("llama"), tiny_tokens(2), **SMALL, held_out=0.1)
    with pytest.raises(EoraLabError, match="hold out a share"):
        compress(tiny_model("llama"), tokens, **SMALL, shrink=True)


def test_budgeted_ranks_remove_more_error_for_the_same_parameters():
    tokens = tiny_tokens()
    recipe = Recipe(bits=3, group_size=32, rank=8, inputs="original")
    statistics = collect_statistics(tiny_model("llama"), tokens, progress=False)
    left = {}
    for objective in ("uniform", "absolute"):
        model = tiny_model("llama")
        ranks = plan_ranks(model, statistics, recipe, Budget(objective, multiple=1), progress=False)
        report = compress(model, tokens, **SMALL, inputs="original", statistics=statistics, ranks=ranks)
        assert sum(layer.rank * (layer.in_features + layer.out_features) for layer in report.layers) <= 8 * sum(
            layer.in_features + layer.out_features for layer in report.layers
        )
        left[objective] = sum(
            layer.error_after * output_energy(tiny_model("llama").get_submodule(layer.name).weight, S.second_moment)
            for layer, S in ((layer, statistics[layer.name]) for layer in report.layers)
        )
    assert left["absolute"] < left["uniform"]


TOKENS = tiny_tokens()
DOORS = {
    "compress_model": lambda model, batches: compress(model, batches, **SMALL),
    "collect_statistics": lambda model, batches: collect_statistics(model, batches, progress=False),
    "perplexity": lambda model, batches: perplexity(model, batches),
}
ALIKE = {
    "lists": TOKENS.tolist(),
    "tuples": tuple(map(tuple, TOKENS.tolist())),
    "tensors": list(TOKENS),
    "numpy": TOKENS.numpy(),
    "small numbers": TOKENS.numpy().astype("uint16"),
    "int32": TOKENS.int(),
}


@pytest.mark.parametrize("batches", ALIKE.values(), ids=ALIKE)
def test_token_batches_in_another_form_are_the_same_batches(batches):
    found, wanted = (collect_statistics(tiny_model("llama"), one, progress=False) for one in (batches, TOKENS))
    assert all(torch.equal(found[name].second_moment, wanted[name].second_moment) for name in wanted)
    assert perplexity(tiny_model("llama"), batches) == perplexity(tiny_model("llama"), TOKENS)
    reports = [compress(tiny_model("llama"), one, **SMALL) for one in (batches, TOKENS)]
    assert [layer.error_after for layer in reports[0].layers] == [layer.error_after for layer in reports[1].layers]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"input_ids": TOKENS}, 'token ids alone: take "input_ids" out of the dict'),
        ([{"input_ids": one.tolist()} for one in TOKENS], 'token ids alone: take "input_ids" out of the dict'),
        ([[3, 4, 5], [6, 7]], "sequences of one length"),
        ([TOKENS[0], TOKENS[0, :4]], "sequences of one length"),
        (["The fox", "and"], "must be token ids"),
        (None, "must be token ids"),
        (iter(TOKENS), "must be token ids"),
        ([], "of shape (nsamples, seqlen), not (0,)"),
        (TOKENS[:0], "of shape (nsamples, seqlen), not (0, 32)"),
        (TOKENS[0], "of shape (nsamples, seqlen), not (32,)"),
        (TOKENS[None], "of shape (nsamples, seqlen), not (1, 6, 32)"),
        (TOKENS.float(), "whole numbers, not torch.float32"),
        (TOKENS.numpy() / 2, "whole numbers, not torch.float64"),
        (TOKENS > 9, "whole numbers, not torch.bool"),
        (TOKENS + 90, "has no row in the model's embedding of 97"),
        (TOKENS - 50, "has no row in the model's embedding of 97"),
    ],
)
def test_what_is_no_token_batch_is_one_line_before_anything_changes(door, batches, message):
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=re.escape(message)) as caught:
        DOORS[door](model, batches)
    assert "\n" not in str(caught.value)
    assert isinstance(model.get_submodule(K_PROJ), nn.Linear)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({K_PROJ: "4"}, f"the rank of {K_PROJ} must be a whole number, not '4'"),
        ({K_PROJ: 4.5}, f"the rank of {K_PROJ} must be a whole number, not 4.5"),
        ({K_PROJ: float("nan")}, f"the rank of {K_PROJ} must be a whole number, not nan"),
        ({K_PROJ: True}, f"the rank of {K_PROJ} must be a whole number, not True"),
        ({K_PROJ: -1}, f"the rank of {K_PROJ} must be 0 or more, not -1"),
        ({K_PROJ + "s": 4}, f"(did you mean {K_PROJ}?)"),
    ],
)
def test_ranks_of_layers_are_checked_before_anything_changes(ranks, message):
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=re.escape(message)):
        compress(model, tiny_tokens(), **SMALL, ranks=ranks)
    assert isinstance(model.get_submodule(K_PROJ), nn.Linear)
    report = compress(model, tiny_tokens(), **SMALL, ranks={K_PROJ: TOKENS.numpy().max() // 16})  # a numpy integer
    assert {layer.name: layer.rank for layer in report.layers if layer.rank} == {K_PROJ: 6}


@pytest.mark.parametrize("kind", [Recipe, Budget, Training, Calibration, Evaluation])
def test_every_setting_names_itself_when_it_is_of_another_type(kind):
    for field in fields(kind):
        for value in (object(), {}, ["a", 1], float("nan"), b"4"):
            with pytest.raises(EoraLabError, match=rf"\b{field.name}\b|held-out share|learning rate|share must lie"):
                kind(**{field.name: value})


@pytest.mark.parametrize("bits", [4.0, True, "4"])
def test_bits_are_a_whole_number_and_nothing_else(bits):
    with pytest.raises(EoraLabError, match="bits must be a whole number"):
        Recipe(bits=bits)
