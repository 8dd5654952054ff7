"""GGUF adapters: their tensors, and the real llama.cpp, which is optional: it needs a Python of its own.

python -m venv llamacpp && llamacpp/bin/pip install xllamacpp
EORA_LAB_LLAMACPP=llamacpp/bin/python pytest tests/test_gguf_adapter.py
"""

import gguf
import pytest
import torch

from eora_lab import EoraLabError, load_model
from eora_lab.cli import main
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.run.stored import run_factors
from tests.gguf_files import DENSE, PROMPTS, in_llamacpp, model_of, needs_llamacpp, unfolded_of, write_gguf
from tests.test_expert_adapters import merged, mixture, ragged
from tests.tiny import SMALL, compress, tiny_model, tiny_tokenizer, tiny_tokens

KINDS = [*DENSE, "mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]


@torch.no_grad()
def in_transformers(model) -> torch.Tensor:
    return torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in PROMPTS])


@needs_llamacpp
@pytest.mark.parametrize("kind", KINDS)
def test_llamacpp_computes_as_meant(kind, tmp_path):
    plain = model_of(kind)
    unfolded = unfolded_of(plain)
    factors = ragged(unfolded)
    write_gguf(tmp_path / "base.gguf", plain)
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, unfolded)
    before, after = in_transformers(plain), in_transformers(merged(unfolded, factors))
    base = (in_llamacpp(tmp_path / "base.gguf", None) - before).abs().max()
    found = (in_llamacpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") - after).abs().max()
    assert base < 1e-4 and found < 1e-4
    assert (after - before).abs().max() > 0.1


def test_tensors_are_those_of_the_base(tmp_path):
    unfolded = unfolded_of(mixture("gpt_oss"))
    factors = ragged(unfolded)
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, unfolded)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {"general.architecture": "gpt-oss", "general.type": "adapter", "adapter.type": "lora"}
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for index in range(4):  # gate and up have every other row
        A, B = factors[f"model.layers.1.mlp.experts.{index}.gate_up_proj"]
        for rows, name in ((slice(0, None, 2), "gate"), (slice(1, None, 2), "up")):
            a, b = (tensors[f"blk.1.ffn_{name}_exps.weight.lora_{half}"][index] for half in "ab")
            torch.testing.assert_close(b @ a, (B @ A)[rows])
    for name, (_, B) in factors.items():
        if name.endswith("self_attn.q_proj") and B.shape[1]:
            assert torch.equal(tensors[f"blk.{name.split('.')[2]}.attn_q.weight.lora_b"], B)


def test_what_has_no_gguf_form_is_refused_by_name(tmp_path):
    unfolded = unfolded_of(mixture("dbrx"))
    with pytest.raises(EoraLabError, match="a GGUF file of a dbrx model holds is not known here: known are llama, "):
        write_gguf_adapter(tmp_path / "a.gguf", ragged(unfolded), unfolded)
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=r"model.layers.0.mlp.new_proj has no place in a GGUF file of llama"):
        pair = torch.ones(1, 64), torch.ones(64, 1)
        write_gguf_adapter(tmp_path / "a.gguf", {"model.layers.0.mlp.new_proj": pair}, model)
    with pytest.raises(EoraLabError, match="every rank is 0"):
        pair = torch.ones(0, 64), torch.ones(64, 0)
        write_gguf_adapter(tmp_path / "a.gguf", {"model.layers.0.self_attn.q_proj": pair}, model)
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_as_gguf(tmp_path, capsys):
    mixture().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    compress(model, tiny_tokens(), **SMALL, inputs="original", folder=tmp_path / "run")
    export = ["adapter", "export", str(tmp_path / "run"), str(tmp_path / "out.gguf"), "--format", "gguf"]
    assert main(export) == 0
    write_gguf_adapter(tmp_path / "own.gguf", run_factors(tmp_path / "run"), model)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "own.gguf").read_bytes()
    capsys.readouterr()
    for wrong, words in (
        (export, "out.gguf is there already"),
        ([*export[:3], str(tmp_path / "out"), *export[4:]], "the name must end in .gguf"),
        ([*export, "--universal"], "--universal is of PEFT adapters"),
    ):
        assert main(wrong) != 0
        assert words in capsys.readouterr().err
