"""GPT-2's Conv1D: linears when it is loaded, and its own layout in every file."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from eora_lab import load_model, load_run
from eora_lab.cli import main
from eora_lab.errors import EoraLabError
from eora_lab.layer.linear import compensated
from eora_lab.model.conv1d import unfold_conv1d
from eora_lab.model.load import load_skeleton
from eora_lab.model.structure import block_linears, decoder_blocks
from tests.tiny import SMALL, compress, logits, tiny_tokenizer, tiny_tokens

KINDS = {"gpt2": transformers.GPT2Config, "openai-gpt": transformers.OpenAIGPTConfig}
SIZES = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def plain_model(kind: str = "gpt2") -> nn.Module:
    """As transformers makes it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](**SIZES)).eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        if name.endswith(("weight", "bias")) and ".ln_" not in name:
            parameter.normal_(0, 0.1)
    return model


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    plain_model(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_transformers(folder) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_loaded_model_is_the_original_with_linears(folder, tmp_path):
    model, original, tokens = load_model(folder)[0], in_transformers(folder), tiny_tokens()
    assert len(block_linears(model)) == 8
    assert all(type(linear).forward is nn.Linear.forward for linear in block_linears(model).values())
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    assert block_linears(load_skeleton(folder)).keys() == block_linears(model).keys()
    before = model.state_dict()
    unfold_conv1d(model)  # nothing is left to do
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    written, files = (load_file(place / "model.safetensors") for place in (tmp_path / "again", folder))
    assert written.keys() == files.keys() and all(torch.equal(written[key], files[key]) for key in files)


def test_a_state_dict_of_the_original_is_loaded(folder):
    original, tokens = in_transformers(folder), tiny_tokens()
    model = type(original)(original.config).eval()
    unfold_conv1d(model)
    model.load_state_dict(original.state_dict())
    assert torch.equal(logits(model, tokens), logits(original, tokens))


def test_a_model_that_is_handed_over_in_memory_is_compressed_alike(folder):
    model, plain, tokens = load_model(folder)[0], in_transformers(folder), tiny_tokens()
    with pytest.raises(EoraLabError, match=r"no list of decoder blocks .*unfold\(model\)"):
        decoder_blocks(plain)
    for one in (model, plain):
        compress(one, tokens, **SMALL)
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


def test_run_folder_export_and_adapter(folder, tmp_path):
    model, tokens = load_model(folder)[0], tiny_tokens()
    original = logits(model, tokens)
    report = compress(model, tokens, **SMALL, folder=tmp_path / "run")
    wanted = logits(model, tokens)
    assert report.coverage == 1 and (wanted - original).norm() > 0.01 * original.norm()
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tokens), wanted)
    for form in ("dense", "merged"):
        assert (
            main(["export", str(tmp_path / "run"), str(tmp_path / form), "--format", form, "--dtype", "float32"]) == 0
        )
    torch.testing.assert_close(logits(in_transformers(tmp_path / "merged"), tokens), wanted, rtol=0, atol=1e-4)
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "universal"), "--universal"]) == 0
    assert main(["adapter", "check", str(tmp_path / "universal")]) == 0
    for adapter in (tmp_path / "universal", tmp_path / "run/adapter"):
        assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        for base in (in_transformers(tmp_path / "dense"), load_model(tmp_path / "dense")[0]):
            adapted = logits(peft.PeftModel.from_pretrained(base, adapter).eval(), tokens)
            torch.testing.assert_close(adapted, wanted, rtol=0, atol=1e-3)
    assert (logits(in_transformers(tmp_path / "dense"), tokens) - wanted).norm() > 0.01 * wanted.norm()
    assert len(compensated(model)) == 8
