"""What llama.cpp makes of an adapter in a GGUF file, by the rules that were read in its sources."""

import gguf
import numpy as np
import pytest

from eora_lab import EoraLabError
from eora_lab.cli import main
from eora_lab.formats.gguf_adapter_check import check_gguf_adapter

NAMES = ("attn_q", "attn_output", "ffn_up")
Q = "blk.0.attn_q.weight"


def write(path, arch, tensors, kind="adapter", said=()):
    """A GGUF file. tensors: name -> (array, type)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    for key, value in said:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, (array, held) in tensors.items():
        held = gguf.GGMLQuantizationType[held]
        writer.add_tensor(name, gguf.quants.quantize(array, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_base(path, arch="llama", names=NAMES):
    weights = {f"blk.0.{name}.weight": (np.ones((64, 64), np.float32), "F32") for name in names}
    return write(path, arch, weights, "model")


def pairs(names=NAMES, rank=4):
    """lora_a and lora_b of each tensor."""
    found = {}
    for name in names:
        found[f"blk.0.{name}.weight.lora_a"] = np.ones((rank, 64), np.float32), "F32"
        found[f"blk.0.{name}.weight.lora_b"] = np.ones((64, rank), np.float32), "F32"
    return found


LORA = [("adapter.type", "lora")]


def check(folder, tensors, arch="llama", kind="adapter", said=LORA, base=None):
    base = base or write_base(folder / "base.gguf")
    return check_gguf_adapter(write(folder / "a.gguf", arch, tensors, kind, said), base)


def test_a_sound_adapter_has_no_findings(tmp_path):
    assert check(tmp_path, pairs()) == []
    assert check(tmp_path, pairs(), said=[*LORA, ("adapter.lora.alpha", 4.0)]) == []  # of one rank: a scaling as any
    norm = {"blk.0.attn_norm.weight": (np.ones(64, np.float32), "F32")}
    assert check(tmp_path, pairs() | norm) == []


WRONG = {
    "no adapter": ({"kind": "model"}, "general.type is 'model', not 'adapter'"),
    "no LoRA": ({"said": [("adapter.type", "other")]}, "adapter.type is 'other', not 'lora'"),
    "another architecture": ({"arch": "qwen2"}, "general.architecture is qwen2, that of the base llama"),
    "alpha and several ranks": (
        {"tensors": pairs(("attn_q",), 4) | pairs(("ffn_up",), 8), "said": [*LORA, ("adapter.lora.alpha", 8.0)]},
        "it scales by 1 to 2; leave adapter.lora.alpha out",
    ),
    "a stranger": ({"tensors": pairs(("attn_q", "attn_v"))}, "the base has no tensor blk.0.attn_v.weight"),
    "a suffix": ({"tensors": pairs() | {"blk.0.x.lora_c": (np.ones(4, np.float32), "F32")}}, "blk.0.x.lora_c, which"),
    "no pairs": (
        {"tensors": {"blk.0.a_norm.weight": (np.ones(4, np.float32), "F32")}},
        "there is no lora_a and lora_b",
    ),
    "a half": (
        {"tensors": {name: one for name, one in pairs().items() if name != f"{Q}.lora_a"}},
        f"one of lora_a and lora_b is missing of {Q}",
    ),
    "halves of two ranks": (
        {"tensors": pairs() | {f"{Q}.lora_a": (np.ones((3, 64), np.float32), "F32")}},
        f"{Q}: lora_a is 3x64, lora_b 64x4",
    ),
    "another width": (
        {"tensors": pairs() | {f"{Q}.lora_a": (np.ones((4, 32), np.float32), "F32")}},
        "lora_a is 4x32 and lora_b 64x4, the tensor 64x64",
    ),
    "NaN": (
        {"tensors": pairs() | {f"{Q}.lora_a": (np.full((4, 64), np.nan, np.float32), "F16")}},
        f"{Q}.lora_a has NaN or Inf",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_llamacpp_gets_wrong_is_named(name, tmp_path):
    changes, words = WRONG[name]
    found = check(tmp_path, **{"tensors": pairs()} | changes)
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("arch", "name", "idle"),
    [
        ("deepseek2", "attn_q_a", True),
        ("deepseek2", "attn_kv_a_mqa", True),
        ("deepseek2", "attn_output", False),
        ("minicpm3", "attn_q_b", True),
        ("plm", "attn_kv_a_mqa", True),
        ("kimi-linear", "attn_output", True),
        ("kimi-linear", "ffn_up", False),
        ("kimi-k3", "ffn_up_shexp", True),
        ("hy_v4", "attn_gate", True),
        ("nemotron_h", "ffn_latent_up", True),
        ("rwkv7", "time_mix_w1", True),
        ("rwkv6", "time_mix_decay_w2", True),
        ("rwkv6", "channel_mix_key", False),
        ("glm-dsa", "indexer.attn_q_b", True),
        ("qwen3", "attn_q", False),
    ],
)
def test_what_is_loaded_and_not_applied_is_named(arch, name, idle, tmp_path):
    base = write_base(tmp_path / "base.gguf", arch, (name,))
    found = check(tmp_path, pairs((name,)), arch, base=base)
    assert len(found) == idle
    assert not idle or "does not apply it" in found[0]


def test_an_nvfp4_base_aborts_on_dense_feed_forward_layers(tmp_path):
    base = tmp_path / "base.gguf"
    nvfp4 = gguf.GGMLQuantizationType.NVFP4
    size, block = gguf.GGML_QUANT_SIZES[nvfp4]
    writer = gguf.GGUFWriter(base, "llama")
    for name in NAMES:
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((64, 64 // size * block), np.uint8), raw_dtype=nvfp4)
    writer.add_tensor("blk.0.ffn_up.scale", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (found,) = check(tmp_path, pairs(), base=base)
    assert found.startswith("aborts at blk.0.ffn_up.weight")
    assert check(tmp_path, pairs(("attn_q", "attn_output")), base=base) == []


def test_without_its_base_and_on_the_command_line(tmp_path, capsys):
    adapter = write(tmp_path / "a.gguf", "llama", pairs(("attn_q", "attn_v")), said=LORA)
    base = write_base(tmp_path / "base.gguf")
    assert main(["adapter", "check", str(adapter)]) == 0
    assert "without its base (--model BASE.gguf)" in capsys.readouterr().out
    assert main(["adapter", "check", str(adapter), "--model", str(base)]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("llama.cpp: refuses it: the base has no tensor")
    assert len(printed.err.strip().splitlines()) == 1
    assert main(["adapter", "check", str(adapter), "--fix", str(tmp_path / "fixed")]) == 1
    assert "is no PEFT adapter" in capsys.readouterr().err
    (tmp_path / "b.gguf").write_bytes(adapter.read_bytes()[:100])
    assert main(["adapter", "check", str(tmp_path / "b.gguf")]) == 1
    assert "as a GGUF file" in capsys.readouterr().err
    with pytest.raises(EoraLabError, match="cannot read"):
        check_gguf_adapter(tmp_path / "gone.gguf")
