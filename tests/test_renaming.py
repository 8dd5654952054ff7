"""Adapters of models whose published checkpoints have other names: the real peft finds every linear, and so do we."""

import copy
import shutil

import peft
import pytest
import torch
import transformers
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from docs.shrink import default_config, small_model
from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.formats.adapter_check import fix_adapter
from eora_lab.formats.fused import fused_linears, whole
from eora_lab.formats.names import Factors
from eora_lab.formats.peft import read_adapter, read_files, write_adapter
from eora_lab.formats.renaming import as_loaded, as_written
from eora_lab.layer.linear import compensated
from eora_lab.model.structure import block_linears, linear_at
from eora_lab.model.unfold import unfold
from eora_lab.run.adapters import Adapters, use_only
from tests.test_expert_adapters import assert_same, findings, merged, ragged
from tests.tiny import SMALL, compress, logits, tiny_model, tiny_tokenizer, tiny_tokens

CAUSAL, IMAGE = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
TEXT = "model.language_model.layers"
RENAMED = {  # family -> what loads it, a linear that has another name in adapters, and that name
    "laguna": (CAUSAL, "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.shared_expert.down_proj"),
    "mistral_large4": (IMAGE, f"{TEXT}.1.mlp.shared_experts.gate_proj", "layers.1.shared_experts.w1"),
    "deepseek_ocr2": (IMAGE, f"{TEXT}.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj"),
    "unlimited_ocr": (IMAGE, f"{TEXT}.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj"),
}
TOKENS = tiny_tokens(3)


def small(name: str):
    """A small model of a family."""
    return small_model(default_config(name), RENAMED[name][0] if name in RENAMED else CAUSAL)


def pair_of(model, name: str) -> Factors:
    """A pair of rank 8 for one linear."""
    linear = linear_at(model, name)
    return {name: (torch.ones(8, linear.in_features), torch.ones(linear.out_features, 8))}


@pytest.fixture(scope="module", params=RENAMED)
def case(request):
    """(family, plain model, unfolded model, factors)"""
    plain = small(request.param)
    unfolded = copy.deepcopy(plain)
    unfold(unfolded)
    return request.param, plain, unfolded, ragged(unfolded)


def test_peft_gives_every_linear_its_factors(case, tmp_path):
    name, plain, unfolded, factors = case
    write_adapter(tmp_path, factors, "model", model=unfolded)
    tensors, config = read_files(tmp_path)
    _, own, published = RENAMED[name]
    assert f"base_model.model.{published}.lora_A.weight" in tensors
    assert f"base_model.model.{own}.lora_A.weight" not in tensors
    targets = config["target_modules"] + config.get("target_parameters", [])
    assert targets and not any(target.removesuffix(".weight") == published for target in targets)
    wanted, before = logits(merged(unfolded, factors), TOKENS), logits(plain, TOKENS)
    found = logits(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval(), TOKENS)
    assert (wanted - before).norm() > 0.1 * before.norm()
    assert (found - wanted).norm() <= 1e-5 * (wanted - before).norm()
    assert_same(read_adapter(tmp_path, unfolded)[0], factors)


def test_published_names_are_read_back_where_experts_are_one_by_one(case, tmp_path):
    name, _, unfolded, factors = case
    write_adapter(tmp_path, factors, "model", universal=True, model=unfolded)
    tensors, config = read_files(tmp_path)
    assert f"base_model.model.{RENAMED[name][2]}.lora_B.weight" in tensors
    assert_same(whole(read_adapter(tmp_path, unfolded)[0], fused_linears(unfolded)), factors)
    shapes = {name: (m.out_features, m.in_features) for name, m in block_linears(unfolded).items()}
    mended = fix_adapter(tensors, config | {"lora_alpha": 2 * config["lora_alpha"]}, shapes, unfolded)
    assert_same(mended, {name: (A, 2 * B) for name, (A, B) in factors.items()})


def test_check_tells_which_loader_knows_which_name(case, tmp_path):
    name, _, unfolded, _ = case
    _, own, published = RENAMED[name]
    factors = pair_of(unfolded, own)
    write_adapter(tmp_path / "published", factors, "model", model=unfolded)
    found = findings(tmp_path / "published", unfolded)
    assert "any" not in found and "peft" not in found
    assert any(published in problem and own in problem for problem in found["gptqmodel"])
    shutil.copytree(tmp_path / "published", tmp_path / "own")
    keys = {half: f"base_model.model.{{}}.lora_{half}.weight" for half in "AB"}
    tensors = {keys[half].format(own): tensor for half, tensor in zip("AB", factors[own], strict=True)}
    save_file(tensors, tmp_path / "own" / "adapter_model.safetensors")
    problem = f"looks for {own} by another name, which is none of the model, and drops it"
    assert findings(tmp_path / "own", unfolded)["peft"] == [problem]
    assert_same(read_adapter(tmp_path / "own", unfolded)[0], factors)  # adapters of before are used as they were meant


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved Laguna, `model`, and a run of it, `run`."""
    folder = tmp_path_factory.mktemp("laguna")
    small("laguna").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    compress(load_model(folder / "model")[0], tiny_tokens(8), **SMALL, folder=folder / "run")
    return folder


@pytest.mark.parametrize("form", ["run", "universal", "fixed"])
def test_a_run_s_adapter_is_used_in_every_form(form, place, tmp_path, capsys):
    folder, base = place / "run" / "adapter", str(place / "model")
    if form == "universal":
        folder = tmp_path / "out"
        assert main(["adapter", "export", str(place / "run"), str(folder), "--universal"]) == 0
    elif form == "fixed":
        folder = tmp_path / "out"
        given = str(place / "run" / "adapter")
        assert main(["adapter", "check", given, "--model", str(place / "run"), "--fix", str(folder)]) == 0
    capsys.readouterr()
    assert main(["adapter", "check", str(folder), "--model", base]) == 1  # of experts there is none without findings
    said = capsys.readouterr().out
    assert "any:" not in said and "drops it" not in said and "by its published name" in said
    model, _, _ = load_run(place / "run")
    wanted, own = logits(model, TOKENS), Adapters(model).factors()
    use_only(model, folder)
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert Adapters(model).factors().keys() == own.keys()
    if form == "run":  # in peft, on W^ in the plain model
        plain, unfolded = small("laguna"), small("laguna")
        unfold(unfolded)
        for name, layer in compensated(model).items():
            linear_at(unfolded, name).weight.data = layer.compressed.dense()
        plain.load_state_dict(unfolded.state_dict())
        found = logits(peft.PeftModel.from_pretrained(plain, folder).eval(), TOKENS)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_factors_by_two_names_are_refused(tmp_path):
    model = small("laguna")
    unfold(model)
    _, own, published = RENAMED["laguna"]
    write_adapter(tmp_path, pair_of(model, own), "model", model=model)
    path = tmp_path / "adapter_model.safetensors"
    lower = {f"base_model.model.{published}.lora_{half}.default.weight": torch.ones(8, 8) for half in "AB"}
    save_file(load_file(path) | lower, path)
    with pytest.raises(EoraLabError, match=f"lora_A of {own} twice"):
        read_adapter(tmp_path, model)


@pytest.mark.parametrize("name", [*RENAMED, "inkling2_text", "mixtral", "qwen3_moe", "dbrx"])
def test_names_lead_where_peft_takes_them(name):
    """Against the function that peft itself loads adapters with."""
    model = small(name)
    modules = [module for module, _ in model.named_modules() if module]
    written = as_written(modules, model)
    names = sorted(set(modules) | set(written.values()))
    loaded, taken = as_loaded(names, model), {}
    for one in names:
        key = {f"base_model.model.{one}.lora_A.weight": torch.zeros(1)}
        (found,) = convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), key)
        taken[one] = found.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert loaded == {one: module for one, module in taken.items() if module in modules}
    assert all(taken[written[module]] == module for module in modules if written[module] != module)


def test_a_linear_that_no_name_leads_to_is_told(tmp_path):
    """Inkling 2 published the weight of a linear as a parameter of its parent: peft looks for `weight_proj.weight`."""
    model = small("inkling2_text")
    unfold(model)
    name = "model.layers.1.self_attn.k_sconv.weight_proj"
    factors = pair_of(model, name)
    write_adapter(tmp_path, factors, "model", model=model)
    assert any(f"looks for {name} by another name" in problem for problem in findings(tmp_path, model)["peft"])
    assert_same(read_adapter(tmp_path, model)[0], factors)


def test_factors_that_peft_would_give_to_another_linear_are_not_written(tmp_path, monkeypatch):
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, "llama", [WeightRenaming(r"\.q_proj\.", ".o_proj.")])
    model = tiny_model("llama")
    pair = torch.ones(4, 64), torch.ones(64, 4)
    write_adapter(tmp_path / "o", {"model.layers.0.self_attn.o_proj": pair}, "model", model=model)
    with pytest.raises(EoraLabError, match=r"no adapter can hold model.layers.0.self_attn.q_proj: peft gives its fact"):
        write_adapter(tmp_path / "q", {"model.layers.0.self_attn.q_proj": pair}, "model", model=model)
