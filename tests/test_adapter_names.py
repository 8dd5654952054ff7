"""target_modules: short where that names what has factors and nothing else, for peft takes all that it names."""

import json
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from eora_lab import load_model
from eora_lab.cli import main
from eora_lab.formats.adapter_check import check_adapter
from eora_lab.formats.peft import read_files, write_adapter
from eora_lab.layer.linear import compensated
from eora_lab.model.structure import block_linears
from tests.tiny import SMALL, compress, logits, tiny_model, tiny_tokenizer, tiny_tokens

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA2 = transformers.Mamba2Config(
    vocab_size=97, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8, n_groups=1,
    chunk_size=8, **SPECIAL,
)  # fmt: skip


def save(folder: Path, config) -> str:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def targets(folder: Path) -> list[str]:
    return json.loads((folder / "adapter_config.json").read_text())["target_modules"]


def factors_of(model: nn.Module, names=None) -> dict:
    return {
        name: (torch.ones(8, linear.in_features), torch.ones(linear.out_features, 8))
        for name, linear in block_linears(model).items()
        if names is None or name in names
    }


def test_a_last_part_that_is_a_number(tmp_path, capsys):
    """CTRL calls its linears ffn.0 and ffn.2, and its blocks h.0, h.1, h.2."""
    config = transformers.CTRLConfig(vocab_size=97, n_embd=64, dff=128, n_layer=3, n_head=4, n_positions=64)
    source, tokens = save(tmp_path / "model", config), tiny_tokens()
    model = load_model(source)[0]
    compress(model, tokens, **SMALL, folder=tmp_path / "run")
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--universal"]) == 0
    assert {name for name in targets(tmp_path / "out") if name[-1].isdigit()} == {
        f"transformer.h.{block}.ffn.{i}" for block in range(3) for i in (0, 2)
    }
    assert {"Wq", "Wk", "Wv", "dense"} < set(targets(tmp_path / "out"))
    assert main(["adapter", "check", str(tmp_path / "out")]) == 1
    loaders = {line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "wrote" not in line}
    assert loaders == {"gptqmodel"}  # of names in upper case
    plain = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    for name, layer in compensated(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.compressed.dense())
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-4, atol=1e-3)


def test_a_last_part_that_another_module_has(tmp_path):
    model = tiny_model("llama")
    model.tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    write_adapter(tmp_path / "all", factors_of(model), "base", universal=True, model=model)
    assert {"k_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"} < set(
        targets(tmp_path / "all")
    )
    few = [name for name in block_linears(model) if name.startswith("model.layers.1.")]
    write_adapter(tmp_path / "few", factors_of(model, few), "base", model=model)
    assert targets(tmp_path / "few") == sorted(few)
    write_adapter(tmp_path / "unknown", factors_of(model), "base", universal=True)  # of a model that is not at hand
    assert targets(tmp_path / "unknown") == sorted(block_linears(model))


def test_a_name_that_peft_takes_for_more_is_named(tmp_path):
    model = tiny_model("llama")
    write_adapter(tmp_path / "a", factors_of(model), "base", universal=True, model=model)
    shapes = {name: tuple(linear.weight.shape) for name, linear in block_linears(model).items()}
    tensors, config = read_files(tmp_path / "a")
    assert check_adapter(tensors, config, shapes, model) == []
    model.tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    found = [str(finding) for finding in check_adapter(tensors, config, shapes, model)]
    assert found == [
        "peft: takes tower.q_proj for a target as well, of which the adapter holds nothing: write full names"
    ]


def test_out_proj_of_a_mamba_is_said_to_be_refused_by_peft(tmp_path, capsys):
    model = load_model(save(tmp_path / "model", MAMBA2))[0]
    compress(model, tiny_tokens(), **SMALL, folder=tmp_path / "run")
    assert main(["adapter", "check", str(tmp_path / "run/adapter")]) == 1
    refused = "peft: refuses backbone.layers.0.mixer.out_proj (and 1 more): no out_proj in models of type mamba2"
    assert refused in capsys.readouterr().out
