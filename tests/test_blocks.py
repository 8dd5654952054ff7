"""What a pass does within a block: measuring step by step, experts that few tokens reach."""

import pytest
import torch

from eora_lab import InputStatistics, Report, collect_statistics
from eora_lab.calibrate.stream import BlockStream
from tests.tiny import SMALL, compress, moe_model, tiny_model, tiny_tokens


def test_linears_run_in_steps_of_equal_input():
    steps = BlockStream(tiny_model("llama"), tiny_tokens(2)).groups(0)
    assert [[name.split(".")[1] for name in step] for step in steps] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_true_sequential_calibrates_every_layer_on_what_the_finished_model_feeds_it():
    model, tokens = tiny_model("llama"), tiny_tokens()
    report = compress(model, tokens, **SMALL, true_sequential=True)
    other = compress(tiny_model("llama"), tokens, **SMALL)
    seen = {layer.name: InputStatistics(layer.in_features) for layer in report.layers}
    for name, statistics in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, s=statistics: s.update(args[0]))
    with torch.no_grad():
        model(tokens)
    for layer, without in zip(report.layers, other.layers, strict=True):
        module = model.get_submodule(layer.name)
        W, S = tiny_model("llama").get_submodule(layer.name).weight, seen[layer.name].second_moment
        left = W - module.dense() - module.lora_B @ module.lora_A
        error = ((left @ S * left).sum() / (W @ S * W).sum()).item()
        assert layer.error_after == pytest.approx(error, rel=1e-4)
        if layer.name.split(".")[-1] in ("o_proj", "down_proj"):
            assert without.error_after != pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("settings", [
    {"compressor": "gptq"},
    {"compressor": "sparsegpt", "sparsity": "2:4", "true_sequential": True},
    {"compressor": "gptq", "inputs": "original", "held_out": 0.4, "shrink": True},
])  # fmt: skip
def test_experts_that_saw_few_tokens_are_compressed_without_data(settings):
    model, original, tokens = moe_model(), moe_model(), tiny_tokens(4)
    report = compress(model, tokens, **SMALL, **settings)
    layers = {layer.name: layer for layer in report.layers}
    assert len(layers) == 2 * (4 + 3 * 3)
    for name, layer in layers.items():
        expert = name.split("experts.")[1][0] if "experts" in name else "0"
        assert layer.data_free == (expert != "0")
        if expert == "2":
            assert layer.tokens == 0
        elif expert == "1":
            assert layer.tokens == 1
        assert torch.isfinite(model.get_submodule(name).dense()).all()
        assert layer.error_after < layer.error_before
    free = {"compressor": "magnitude", "sparsity": "2:4"} if "sparsity" in settings else {"compressor": "rtn"}
    compress(original, tokens, **SMALL | {"method": "svd"}, **free)
    name = "model.layers.1.mlp.experts.2.up_proj"
    assert torch.equal(model.get_submodule(name).dense(), original.get_submodule(name).dense())
    for name in ("lora_A", "lora_B"):
        ours, svd = (getattr(m.model.layers[1].mlp.experts[1].down_proj, name) for m in (model, original))
        torch.testing.assert_close(ours.abs(), svd.abs(), rtol=1e-2, atol=1e-3)
    assert "12 layers saw too few tokens and were compressed without data" in report.summary()
    assert Report.from_json(report.to_json()) == report


def test_layers_without_tokens_have_statistics_of_none():
    found = collect_statistics(moe_model(), tiny_tokens(), progress=False)
    assert found["model.layers.0.mlp.experts.2.up_proj"].tokens == 0
    assert found["model.layers.0.mlp.experts.0.up_proj"].tokens > 64
