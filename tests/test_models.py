"""Loading: folders, GGUF files, the hub; and one clear error for every bad input."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from eora_lab.errors import EoraLabError
from eora_lab.model.load import load_model
from eora_lab.run.folder import load_model_or_run
from tests.tiny import CONFIGS, compress, logits, save_tiny, tiny_model, tiny_tokens, write_sizes

ROOT = Path(__file__).parents[1]


def save(folder: Path, kind: str = "llama", **options) -> Path:
    return Path(save_tiny(folder, kind, **options))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fails(name, match: str, **options) -> str:
    """The message of the EoraLabError that loading must raise: one line that matches."""
    with pytest.raises(EoraLabError, match=match) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def python(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------- local folders


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_gives_the_same_logits(tmp_path, kind):
    original = tiny_model(kind)
    model, tokenizer = load_model(save(tmp_path, kind))
    ids = torch.arange(20)[None]  # (1, 20)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == (kind == "gemma")
    assert len(tokenizer) > 0


def test_tokenizer_and_sharded_weights(tmp_path):
    model, tokenizer = load_model(str(save(tmp_path, max_shard_size="100KB")))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert tokenizer.decode(tokenizer("Hello, world: 42\n").input_ids) == "Hello, world: 42\n"
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_dtype(tmp_path, dtype):
    assert load_model(save(tmp_path), dtype=dtype)[0].lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float99", torch.int64])
def test_bad_dtype(tmp_path, dtype):
    fails(save(tmp_path), "is not one of float32", dtype=dtype)


@pytest.mark.parametrize("named", [0.5, 3, {"a": 1}, [1, 2], [None]])
def test_a_class_that_is_no_name(tmp_path, named):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    fails(tmp_path, "architectures in config.json must be")


def test_bad_device(tmp_path):
    fails(save(tmp_path), "cannot put the model on device 'tpu99': name cpu or cuda", device="tpu99")


def test_import_is_light():
    done = python("import sys, eora_lab.model.load; assert 'transformers' not in sys.modules")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- architectures


def test_parameters_of_three_dimensions_that_are_no_experts():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, lru_width=64,
        head_dim=16, attention_window_size=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = logits(model, tiny_tokens())
    compress(model, tiny_tokens(), bits=8, rank=4, progress=False)
    assert (logits(model, tiny_tokens()) - before).norm() < 0.02 * before.norm()


# ---------------------------------------------------------------- GGUF


def save_gguf(path: Path, tensors: dict | None = None, keys: dict | None = None) -> transformers.PreTrainedModel:
    """Write the tiny Llama as llama.cpp would, and return it. tensors, keys: more of them, by their full names."""
    model = tiny_model("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    write_sizes(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    tokens = ["<pad>", "<bos>", "<eos>", *letters, "ab"]
    writer.add_token_list(tokens + [f"<{i}>" for i in range(97 - len(tokens))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():  # llama.cpp pairs neighbours in rotary embeddings, transformers pairs halves
            if part in name:
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    for name, value in (keys or {}).items():
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_file_and_folder(tmp_path):
    original = save_gguf(tmp_path / "tiny.gguf")
    ids = torch.arange(20)[None]  # (1, 20)
    for name in (tmp_path / "tiny.gguf", tmp_path):
        model, tokenizer = load_model(name)
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-5)
        assert not hasattr(model.config, "quantization_config")
        assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"

    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    fails(tmp_path, "several GGUF files: name one of other.gguf, tiny.gguf")


def test_gguf_folder_in_upper_case(tmp_path):
    save_gguf(tmp_path / "Tiny.GGUF")
    assert load_model(tmp_path)[0].num_parameters() == tiny_model("llama").num_parameters()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", 64),
        ("blk.2.attn_norm.weight", 64),
        ("blk.0.attn_q_norm.weight", 16),
        ("rope_freqs.weight", 8),
    ],
)
def test_gguf_tensors_without_a_place(tmp_path, name, shape):
    save_gguf(tmp_path / "tiny.gguf", {name: np.full(shape, 2, np.float32)})
    fails(tmp_path, f"tiny.gguf holds {name}, for which LlamaForCausalLM has no place: .*use the model's safetensors")


REFUSED = {
    "llama.rope.scaling.factor": 8.0,
    "llama.rope.scale_linear": 4.0,
    "llama.rope.scaling.attn_factor": 1.5,
    "llama.rope.dimension_sections": 3,
    "llama.attention.key_length": 32,
    "llama.attention.scale": 0.5,
    "llama.attention.causal": False,
    "llama.attention.sliding_window": 64,
    "llama.attention.clamp_kqv": 8.0,
    "llama.logit_scale": 0.25,
    "llama.embedding_scale": 12.0,
    "llama.expert_used_count": 2,
    "llama.final_logit_softcapping": 30.0,
    "llama.some_day": "new",
}


@pytest.mark.parametrize("key", REFUSED)
def test_gguf_keys_that_would_be_passed_over(tmp_path, key):
    save_gguf(tmp_path / "tiny.gguf", keys={"llama.rope.scaling.type": "linear", key: REFUSED[key]})
    fails(tmp_path, f"tiny.gguf says {key} = .*, which transformers passes over, and .*use the model's safetensors")


def test_gguf_keys_and_tensors_that_change_nothing(tmp_path):
    plain = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 64}
    plain |= {"rope.dimension_count": 16, "attention.key_length": 16, "attention.value_length": 16, "expert_count": 0}
    plain |= {"attention.scale": 0.25, "attention.causal": True, "attention.sliding_window": 128, "logit_scale": 1.0}
    plain |= {"rope.freq_base": 10000.0, "attention.clamp_kqv": 0.0, "tensor_data_layout": "Meta AI original pth"}
    keys = {f"llama.{key}": value for key, value in plain.items()} | {"somebody.note": 3}
    original = save_gguf(tmp_path / "tiny.gguf", {"rope_freqs.weight": np.ones(8, np.float32)}, keys)
    ids = torch.arange(20)[None]  # (1, 20)
    torch.testing.assert_close(load_model(tmp_path)[0](ids).logits, original(ids).logits, rtol=0, atol=1e-5)


def test_damaged_gguf(tmp_path):
    save_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for damaged in (b"", b"GGUF" + b"x" * 1000, content[: len(content) // 2]):
        (tmp_path / "bad.gguf").write_bytes(damaged)
        fails(tmp_path / "bad.gguf", "cannot read .*bad.gguf")


# ---------------------------------------------------------------- names that lead nowhere


def test_names_that_lead_nowhere(tmp_path):
    for name in (tmp_path / "missing", "smollm3", "", "a/b/c", "../nowhere"):
        assert "smollm2-135m" in fails(name, "no model .*no folder or .gguf file here")
    fails(tmp_path, "no config.json")
    (tmp_path / "weights.bin").touch()
    fails(tmp_path / "weights.bin", "is a file: give the folder")


def test_hub_ids(tmp_path):
    """Offline: a model in the hub cache loads, another gives one line. (The hub client reads these settings once.)"""
    snapshot = tmp_path / "models--tiny--llama" / "snapshots" / ("0" * 40)
    save(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    done = python(
        """
        from eora_lab.errors import EoraLabError
        from eora_lab.model.load import load_model
        print(sum(p.numel() for p in load_model("tiny/llama")[0].parameters()))
        try:
            load_model("tiny/absent")
        except EoraLabError as error:
            print(error)
        """,
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.splitlines()
    assert int(count) == tiny_model("llama").num_parameters()
    assert re.match(
        "no model 'tiny/absent': it is no local folder, and the hub cannot be reached.*smollm2-135m", message
    )


# ---------------------------------------------------------------- folders that must be refused


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed-by-an-index"])
def test_pickle_is_refused_unopened(tmp_path, monkeypatch, listed):
    folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    if listed:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        fails(folder, "only safetensors files are read")
    else:
        message = fails(folder, "only pytorch_model.bin")
        assert "safe_serialization=True" in message
    assert not (tmp_path / "ran").exists()


def test_code_of_the_model_never_runs(tmp_path):
    folder = save(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    load_model(folder)  # transformers knows Llama itself
    edit_json(folder / "config.json", model_type="unheard_of")
    fails(folder, "needs code of its own")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "this is an encoder-decoder, or the decoder of one"),
        (transformers.BartConfig(), "this is an encoder-decoder, or the decoder of one"),
        (transformers.BertConfig(), "this is a masked one, which reads both ways"),
        (transformers.XLNetConfig(), "this is a masked one, which reads both ways"),
        (transformers.ViTConfig(), "transformers has no class of it that continues text"),
        (transformers.Blip2Config(), "this one does not run without pixel_values"),
        (transformers.Pix2StructConfig(), "this is an encoder-decoder, or the decoder of one"),
        (transformers.Qwen2_5OmniConfig(), "this one does not run on text alone"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_only_decoders(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    fails(tmp_path, f"is a {config.model_type} model: EoRA Lab needs a decoder-only .*, and {reason}$")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": "unheard_of"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_bad_config(tmp_path, content):
    (save(tmp_path) / "config.json").write_text(content)
    fails(tmp_path, "no usable config.json")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_config_that_is_not_utf8(tmp_path, encoding):
    config = save(tmp_path) / "config.json"
    config.write_text(config.read_text()[:-2] + ', "note": "caf\u00e9"}', encoding=encoding)
    fails(tmp_path, r"config\.json is damaged \(it is not UTF-8 text; save it again")
    with pytest.raises(EoraLabError, match="it is not UTF-8 text"):
        load_model_or_run(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "null", "3", '"llama"'])
def test_config_that_is_no_object(tmp_path, content):
    (save(tmp_path) / "config.json").write_text(content)
    with pytest.raises(EoraLabError, match=r"no usable config\.json: .*its content must be names with values"):
        load_model_or_run(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "todo"),
    [
        ("torch_dtype", "torch.float16", "write a name such as float16"),
        ("dtype", "auto", "write a name"),
        ("attn_implementation", "flash_attention_2", "delete the key"),
    ],
)
def test_config_with_a_key_to_change(tmp_path, key, value, todo):
    edit_json(save(tmp_path) / "config.json", **{"dtype": None, key: value})
    fails(tmp_path, f"{key} is '{value}'.*: {todo}")


def test_quantization_config_of_dense_weights(tmp_path):
    config = save(tmp_path) / "config.json"
    edit_json(config, quantization_config={})
    assert not hasattr(load_model(tmp_path)[0].config, "quantization_config")
    left_over = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(config, quantization_config=left_over)
    fails(tmp_path, "its weights are dense: delete the key quantization_config in its config.json")
    edit_weights(tmp_path, lambda found: found.update({f"{Q_PROJ}.weight.absmax": torch.ones(64)}))
    fails(tmp_path, "already quantised: give the full-precision model")


def test_quantised_and_adapter_folders(tmp_path):
    edit_json(save(tmp_path) / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    codes = {f"{Q_PROJ}.qweight": torch.zeros(8, 64, dtype=torch.int32)}
    edit_weights(tmp_path, lambda found: found.update(codes))
    fails(tmp_path, "already quantised: give the full-precision model")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "holds an adapter")


@pytest.mark.parametrize("content", [b"", b"\0garbage" * 99, "half"])
def test_damaged_safetensors(tmp_path, content):
    file = save(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    fails(tmp_path, "damaged weight file model.safetensors")


def test_missing_weights(tmp_path):
    file = save(tmp_path) / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    lost = "model.layers.1.self_attn.q_proj.weight"
    part = {name: weight for name, weight in whole.items() if name != lost}
    safetensors.torch.save_file(part, file, {"format": "pt"})
    fails(tmp_path, f"files lack {re.escape(lost)}")
    safetensors.torch.save_file({**part, lost: torch.zeros(3, 3)}, file, {"format": "pt"})
    fails(tmp_path, f"have another shape for {re.escape(lost)}")
    file.unlink()
    fails(tmp_path, r"no safetensors weights \(found none\)")


def test_missing_shard_and_bad_index(tmp_path):
    lost = sorted(save(tmp_path, max_shard_size="100KB").glob("*.safetensors"))[1]
    lost.unlink()
    fails(tmp_path, f"lacks the weight file {lost.name}")
    (tmp_path / "model.safetensors.index.json").write_text("[1, 2")
    fails(tmp_path, "damaged model.safetensors.index.json")


def edit_weights(folder: Path, change) -> None:
    """Let `change` alter the tensors of a saved model, a dict."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


Q_PROJ = "model.layers.0.self_attn.q_proj"
SURPLUS = {
    "biases": ({f"{Q_PROJ}.bias": torch.ones(64)}, "q_proj.bias, for which LlamaForCausalLM .*attention_bias"),
    "blocks": (
        {f"model.layers.{i}.self_attn.q_proj.weight": torch.ones(64, 64) for i in (2, 3)},
        "num_hidden_layers is 2, and the files hold 4 blocks: correct it",
    ),
    "norms": ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "q_norm.weight, .*config.json that belongs"),
    "scales": ({f"{Q_PROJ}.weight_scale": torch.ones(1)}, "quantised weights: give the full-precision model"),
    "head": ({"score.weight": torch.ones(1, 64)}, "score.weight, for which .*take these tensors out of the files"),
}


@pytest.mark.parametrize("kind", SURPLUS)
def test_tensors_without_a_place(tmp_path, kind):
    tensors, message = SURPLUS[kind]
    edit_weights(save(tmp_path), lambda found: found.update(tensors))
    fails(tmp_path, f"do not fit its config.json: the files hold .*{message}")


def test_tensors_that_may_be_left(tmp_path):
    left = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.position_ids": torch.arange(9)[None],
        "mtp.fc.weight": torch.ones(2, 2),
        "model.vision_tower.conv.weight": torch.ones(2, 2),
    }
    edit_weights(save(tmp_path), lambda found: found.update(left))
    assert torch.equal(load_model(tmp_path)[0].lm_head.weight, tiny_model("llama").lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_weights_that_need_scales(tmp_path, dtype):
    weight = {f"{Q_PROJ}.weight": torch.ones(64, 64).to(dtype)}
    edit_weights(save(tmp_path), lambda found: found.update(weight))
    fails(tmp_path, f"holds {Q_PROJ}.weight as .*: weights of that type are quantised")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    edit_weights(save(tmp_path), lambda found: found[f"{Q_PROJ}.weight"][3].fill_(value))
    fails(tmp_path, f"{Q_PROJ}.weight holds NaN or Inf in float32")


def test_a_copy_of_the_embedding(tmp_path):
    copy = tiny_model("gemma").lm_head.weight.clone()
    edit_weights(save(tmp_path, "gemma"), lambda found: found.update({"lm_head.weight": copy}))
    model = load_model(tmp_path)[0]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    edit_weights(tmp_path, lambda found: found["lm_head.weight"].mul_(2))
    fails(tmp_path, "lm_head.weight that differs from model.embed_tokens.weight, though tie_word_embeddings")


def test_a_tensor_in_two_files(tmp_path):
    one, two = sorted(save(tmp_path, max_shard_size="100KB").glob("*.safetensors"))[:2]
    tensors = safetensors.torch.load_file(one)
    tensors |= dict(list(safetensors.torch.load_file(two).items())[:1])
    safetensors.torch.save_file(tensors, one, {"format": "pt"})
    fails(tmp_path, "in two of its weight files")


def test_weights_that_overflow(tmp_path):
    edit_weights(save(tmp_path), lambda found: found[f"{Q_PROJ}.weight"].mul_(1e8))
    load_model(tmp_path)
    fails(tmp_path, f"{Q_PROJ}.weight holds NaN or Inf in float16: load it in float32, or copy", dtype="float16")


@pytest.mark.parametrize("kind", CONFIGS)
def test_missing_tokenizer(tmp_path, kind):
    tiny_model(kind).save_pretrained(tmp_path)
    fails(tmp_path, "no usable tokenizer")
    (tmp_path / "tokenizer.json").write_text("{")
    fails(tmp_path, "no usable tokenizer")
