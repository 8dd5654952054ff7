"""Run folders: written block by block, loaded back, resumed, refused."""

import peft
import pytest
import torch

from eora_lab import EoraLabError, collect_statistics, load_model, load_run
from eora_lab.compensate.budget import Budget
from eora_lab.compress import QUANTISERS
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.ranks import plan_ranks
from eora_lab.run.recipe import Recipe
from tests.tiny import CONFIGS, SMALL, compress, logits, save_tiny, tiny_model, tiny_tokens


def run_settings(folder) -> dict:
    return SMALL | {"compressor": "gptq", "folder": folder}


@pytest.mark.parametrize("method", ["eora", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_loads_back_with_the_same_logits(kind, method, tmp_path):
    name = save_tiny(tmp_path / "model", kind)
    model, _ = load_model(name)
    report = compress(model, tiny_tokens(), **run_settings(tmp_path / "run"), method=method)
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tiny_tokens(2, seed=1)), logits(model, tiny_tokens(2, seed=1)))
    assert loaded_report == report
    with pytest.raises(EoraLabError, match="compressed already"):
        compress(loaded, tiny_tokens(), **SMALL)


@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_a_pruned_run_loads_back_with_the_same_logits_and_bytes(sparsity, bits, tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "model"))
    settings = run_settings(tmp_path / "run") | {"compressor": "sparsegpt", "sparsity": sparsity, "bits": bits}
    report = compress(model, tiny_tokens(), **settings)
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tiny_tokens(2, seed=1)), logits(model, tiny_tokens(2, seed=1)))
    assert loaded_report == report
    on_disk = sum(file.stat().st_size for file in (tmp_path / "run" / "blocks").iterdir())
    assert report.nbytes < on_disk < report.nbytes + 25_000  # headers


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_adapter_loads_in_peft(kind, tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "model", kind))
    compress(model, tiny_tokens(), **run_settings(tmp_path / "run"))
    base = tiny_model(kind)
    for name, module in model.named_modules():
        if isinstance(module, CompensatedLinear):
            base.get_submodule(name).weight.data.copy_(module.dense())
    tokens = tiny_tokens(2, seed=1)
    without = logits(base, tokens)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert (without - logits(model, tokens)).abs().max() > 1e-3  # the adapter does something


class Stop(Exception):
    pass


@pytest.mark.parametrize("inputs", ["compensated", "original"])
def test_an_interrupted_run_resumes_to_the_same_result(inputs, tmp_path, monkeypatch):
    name = save_tiny(tmp_path / "model")
    whole, _ = load_model(name)
    compress(whole, tiny_tokens(), **run_settings(tmp_path / "whole"), inputs=inputs)

    calls = []

    def stopping(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 10:  # in the second block
            raise Stop
        return gptq(*args, **kwargs)

    gptq = QUANTISERS["gptq"]
    settings = run_settings(tmp_path / "run") | {"inputs": inputs}
    monkeypatch.setitem(QUANTISERS, "gptq", stopping)
    with pytest.raises(Stop):
        compress(load_model(name)[0], tiny_tokens(), **settings)
    with pytest.raises(EoraLabError, match="not finished; start it again"):
        load_run(tmp_path / "run")
    calls.clear()
    calls += [None] * 10  # count on, without stopping
    resumed, _ = load_model(name)
    report = compress(resumed, tiny_tokens(), **settings)
    assert len(calls) - 10 == 7  # the first block was not compressed again
    assert len(report.layers) == 14
    assert torch.equal(logits(resumed, tiny_tokens(2)), logits(whole, tiny_tokens(2)))
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(whole, tiny_tokens(2)))
    assert not list(tmp_path.glob("run/**/*.partial"))


def test_a_finished_run_is_read_and_not_computed_again(tmp_path, monkeypatch):
    name = save_tiny(tmp_path / "model")
    model, _ = load_model(name)
    compress(model, tiny_tokens(), **run_settings(tmp_path / "run"))
    monkeypatch.setitem(QUANTISERS, "gptq", None)  # calling it would fail
    again, _ = load_model(name)
    compress(again, tiny_tokens(), **run_settings(tmp_path / "run"))
    assert torch.equal(logits(again, tiny_tokens(2)), logits(model, tiny_tokens(2)))


def test_a_run_folder_refuses_other_settings_and_other_contents(tmp_path):
    settings = run_settings(tmp_path / "run")
    compress(tiny_model("llama"), tiny_tokens(), **settings)
    with pytest.raises(EoraLabError, match=r"holds another run \(bits was 3, now 4\): choose another"):
        compress(tiny_model("llama"), tiny_tokens(), **settings | {"bits": 4})
    with pytest.raises(EoraLabError, match=r"holds another run \(tokens was"):
        compress(tiny_model("llama"), tiny_tokens(seed=5), **settings)
    with pytest.raises(EoraLabError, match=r"holds another run \(weights was"):
        compress(tiny_model("llama", seed=1), tiny_tokens(), **settings)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    with pytest.raises(EoraLabError, match="not empty and holds no run"):
        compress(tiny_model("llama"), tiny_tokens(), **settings | {"folder": tmp_path / "photos"})


def test_a_damaged_run_is_one_clear_error(tmp_path):
    name = save_tiny(tmp_path / "model")
    compress(load_model(name)[0], tiny_tokens(), **run_settings(tmp_path / "run"))
    block = tmp_path / "run" / "blocks" / "001.safetensors"
    whole = block.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a tensor"):
        block.write_bytes(damage)
        with pytest.raises(EoraLabError, match=r"001\.safetensors: incomplete, corrupt, or of another model"):
            load_run(tmp_path / "run")
    block.unlink()
    with pytest.raises(EoraLabError, match=r"holds model\.layers\.1\.self_attn\.q_proj is missing"):
        load_run(tmp_path / "run")
    with pytest.raises(EoraLabError, match="not a run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_ragged_ranks_flow_through_run_folder_and_adapter(factor_bits, tmp_path):
    name = save_tiny(tmp_path / "model")
    model, _ = load_model(name)
    recipe, tokens = Recipe("rtn", bits=3, group_size=32, rank=8), tiny_tokens()
    statistics = collect_statistics(model, tokens, progress=False)
    ranks = plan_ranks(model, statistics, recipe, Budget("relative", maximum=24, only="mlp|q_proj"), progress=False)
    assert len(set(ranks.values())) > 2 and min(ranks.values()) == 0
    uniform = compress(tiny_model("llama"), tokens, **SMALL, inputs="original")
    settings = SMALL | {"ranks": ranks, "inputs": "original", "factor_bits": factor_bits, "folder": tmp_path / "run"}
    report = compress(model, tokens, **settings)
    assert {layer.name: layer.rank for layer in report.layers} == ranks
    assert report.nbytes <= uniform.nbytes
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert loaded_report == report and torch.equal(logits(loaded, tiny_tokens(2)), logits(model, tiny_tokens(2)))
    base = tiny_model("llama")
    for name, module in model.named_modules():
        if isinstance(module, CompensatedLinear):
            base.get_submodule(name).weight.data.copy_(module.dense())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tiny_tokens(2)), logits(model, tiny_tokens(2)), rtol=1e-3, atol=1e-4)
