"""GGUF adapters: their tensors, and what the real llama.cpp makes of them."""

import gguf
import pytest
import torch

from eora_lab import EoraLabError, load_model
from eora_lab.cli import main
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.formats.gguf_adapter_check import check_gguf_adapter
from eora_lab.run.stored import run_factors, run_made_for
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
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, unfolded, "F32")
    assert check_gguf_adapter(tmp_path / "adapter.gguf", tmp_path / "base.gguf") == []
    before, after = in_transformers(plain), in_transformers(merged(unfolded, factors))
    base = (in_llamacpp(tmp_path / "base.gguf", None) - before).abs().max()
    found = (in_llamacpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") - after).abs().max()
    assert base < 1e-4 and found < 1e-4
    assert (after - before).abs().max() > 0.1


@needs_llamacpp
@pytest.mark.parametrize(("held", "bound"), [("F16", 1e-2), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_llamacpp_takes_factors_of_every_type(held, bound, tmp_path):
    plain = model_of("llama")
    factors = {
        name: (A[:1].repeat(32, 1) / 32, B[:, :1].repeat(1, 32)) if len(A) else (A, B)
        for name, (A, B) in ragged(plain).items()
    }
    write_gguf(tmp_path / "base.gguf", plain)
    assert write_gguf_adapter(tmp_path / "adapter.gguf", factors, plain, held) == 0
    before, after = in_transformers(plain), in_transformers(merged(plain, factors))
    found = (in_llamacpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") - after).abs().max()
    assert found < bound < 0.2 * (after - before).abs().max()


@pytest.mark.parametrize("held", ["F16", "F32", "BF16", "Q8_0"])
def test_factors_are_held_as_asked(held, tmp_path):
    torch.manual_seed(0)
    model = tiny_model("llama")
    pairs = {rank: (torch.randn(rank, 64), torch.randn(64, rank)) for rank in (8, 32)}
    factors = {f"model.layers.{i}.self_attn.o_proj": pair for i, pair in enumerate(pairs.values())}
    short = write_gguf_adapter(tmp_path / "a.gguf", factors, model, held)
    assert short == (held == "Q8_0")  # lora_b of rank 8
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        rank, half = (8 if "blk.0" in tensor.name else 32), tensor.name[-1]
        is_short = held == "Q8_0" and (rank, half) == (8, "b")
        assert tensor.tensor_type.name == ("F16" if is_short else held)
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(values, pairs[rank][half == "b"], rtol=0, atol=0 if held == "F32" else 0.02)


def test_factors_that_do_not_fit_their_type(tmp_path):
    model, name = tiny_model("llama"), "model.layers.0.self_attn.o_proj"
    with pytest.raises(EoraLabError, match="unknown type of factors 'Q4_0'"):
        write_gguf_adapter(tmp_path / "a.gguf", {name: (torch.ones(1, 64), torch.ones(64, 1))}, model, "Q4_0")
    with pytest.raises(EoraLabError, match="do not fit float16"):
        write_gguf_adapter(tmp_path / "a.gguf", {name: (torch.ones(1, 64) * 1e6, torch.ones(64, 1) * 1e6)}, model)
    large = torch.ones(1, 64) * 1e6, torch.ones(64, 1) / 1e3  # which balanced factors are not
    write_gguf_adapter(tmp_path / "a.gguf", {name: large}, model)
    tensors = {one.name[-1]: torch.tensor(one.data).float() for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    torch.testing.assert_close(tensors["b"] @ tensors["a"], torch.full((64, 64), 1e3), rtol=1e-3, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_tensors_are_those_of_the_base(tmp_path):
    unfolded = unfolded_of(mixture("gpt_oss"))
    factors = ragged(unfolded)
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, unfolded, "F32")
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
    made_for = run_made_for(tmp_path / "run", {"export": "F16"})
    write_gguf_adapter(tmp_path / "own.gguf", run_factors(tmp_path / "run"), model, made_for=made_for)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "own.gguf").read_bytes()
    capsys.readouterr()
    for wrong, words in (
        (export, "out.gguf is there already"),
        ([*export[:3], str(tmp_path / "out"), *export[4:]], "the name must end in .gguf"),
        ([*export, "--universal"], "--universal is of PEFT adapters"),
        ([*export[:-1], "peft", "--factor-type", "Q8_0"], "--factor-type is of GGUF adapters"),
    ):
        assert main(wrong) != 0
        assert words in capsys.readouterr().err
