"""Models that also see: loaded as the class that config.json names, compressed in their text decoder alone."""

import json
import re

import peft
import pytest
import torch
import transformers
from torch import nn

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.formats.peft import write_adapter
from eora_lab.layer.linear import compensated
from eora_lab.model.load import load_skeleton
from eora_lab.model.structure import block_linears
from tests.tiny import SMALL, compress, logits, tiny_tokenizer, tiny_tokens

TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOKENS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
KINDS = {
    "qwen3_5": (transformers.Qwen3_5Config, {
        "text_config": TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
        },
    } | TOKENS),
    # its tower has projections of the same names as its decoder
    "gemma3": (transformers.Gemma3Config, {
        "text_config": TEXT, "vision_config": VISION | {"num_hidden_layers": 1}, "mm_tokens_per_image": 4,
        "image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94,
    }),
    "mistral3": (transformers.Mistral3Config, {
        "text_config": TEXT | {"model_type": "mistral"}, "image_token_index": 96,
        "vision_config": VISION | {"num_hidden_layers": 1, "model_type": "pixtral", "head_dim": 16},
    }),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    kind, settings = KINDS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(kind(**settings)).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    return tmp_path / "model"


def served(folder) -> nn.Module:
    """What other tools make of a folder."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def edit(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_decoder_is_compressed_and_its_adapter_fits_the_served_class(folder, tmp_path, capsys):
    model = load_model(folder)[0]
    original, tokens = served(folder), tiny_tokens(6, 24)
    assert type(model) is type(original)
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    assert block_linears(load_skeleton(folder)).keys() == block_linears(original).keys()
    report = compress(model, tokens, **SMALL, folder=tmp_path / "run")
    assert report.coverage > 0.98 and all("language_model." in layer.name for layer in report.layers)
    changed = {
        name.rpartition(".")[0] for name, p in original.named_parameters() if name not in dict(model.named_parameters())
    }
    assert changed == compensated(model).keys()
    wanted = logits(model, tokens)
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tokens), wanted)
    ids = model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(ids, model.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False, use_cache=False))
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "dense"), "--format", "dense", "--dtype", "float32"]) == 0
    )
    assert (tmp_path / "dense/preprocessor_config.json").read_text() == "{}"
    assert main(["adapter", "export", str(tmp_path / "run"), str(tmp_path / "universal"), "--universal"]) == 0
    assert main(["adapter", "check", str(tmp_path / "universal")]) == 0
    for adapter in (tmp_path / "universal", tmp_path / "run/adapter"):
        base = served(tmp_path / "dense")
        assert (logits(base, tokens) - wanted).norm() > 1e-3 * wanted.norm()
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
        torch.testing.assert_close(logits(adapted, tokens), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
        assert all("language_model" in name for name, _ in adapted.named_parameters() if "lora_" in name)


def test_the_class_that_config_json_names(tmp_path):
    kind, settings = KINDS["qwen3_5"]
    config = kind(**settings)
    for architectures, name in (
        (["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        (["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        (["Unheard"], "Qwen3_5ForConditionalGeneration"),
        (None, "Qwen3_5ForConditionalGeneration"),
    ):
        config.save_pretrained(tmp_path)
        edit(tmp_path, architectures=architectures)
        assert type(load_skeleton(tmp_path)).__name__ == name
    text = transformers.Emu3Config().get_text_config()  # in no mapping of transformers
    text.save_pretrained(tmp_path)
    with pytest.raises(EoraLabError, match=r"a emu3_text_model model: .* no class of it that continues text"):
        load_skeleton(tmp_path)
    edit(tmp_path, architectures=["Emu3ForCausalLM"])
    assert type(load_skeleton(tmp_path)).__name__ == "Emu3ForCausalLM"


def test_a_text_class_reads_past_towers(tmp_path):
    """As before: weights of the whole model, under the config.json of its text part."""
    kind, settings = KINDS["qwen3_5"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**settings)).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)[0], tiny_tokens()), logits(model, tiny_tokens()))


@pytest.mark.parametrize("folder", ["qwen3_5"], indirect=True)
def test_an_adapter_of_the_text_class_is_named(folder, tmp_path, capsys):
    linears = {
        re.sub("language_model.", "", name): linear for name, linear in block_linears(load_skeleton(folder)).items()
    }
    factors = {name: (torch.ones(8, one.in_features), torch.ones(one.out_features, 8)) for name, one in linears.items()}
    write_adapter(tmp_path / "adapter", factors, str(folder), universal=True)
    assert main(["adapter", "check", str(tmp_path / "adapter")]) == 1
    assert re.search(
        r"any: model\.layers\.0\.\S+ \(and \d+ more\) is spelt otherwise in the model", capsys.readouterr().out
    )
    assert main(["adapter", "check", str(tmp_path / "adapter"), "--fix", str(tmp_path / "fixed")]) == 0
    assert main(["adapter", "check", str(tmp_path / "fixed")]) == 0
