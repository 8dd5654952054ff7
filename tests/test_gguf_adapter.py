"""GGUF adapters: their tensors, and the real llama.cpp, which is optional: it needs a Python of its own.

python -m venv llamacpp && llamacpp/bin/pip install xllamacpp
EORA_LAB_LLAMACPP=llamacpp/bin/python pytest tests/test_gguf_adapter.py
"""

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import gguf
import pytest
import torch

from eora_lab import EoraLabError, load_model
from eora_lab.cli import main
from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.formats.gguf_adapter_check import check_gguf_adapter
from eora_lab.formats.gguf_names import GgufNames
from eora_lab.model.expert_kinds import unfold_experts
from eora_lab.model.structure import linear_at
from eora_lab.run.stored import run_factors, run_made_for
from tests.test_expert_adapters import merged, mixture, ragged
from tests.tiny import SMALL, compress, tiny_model, tiny_tokenizer, tiny_tokens, write_sizes

PYTHON = os.environ.get("EORA_LAB_LLAMACPP")
PEER = Path(__file__).with_name("llamacpp_peer.py")
PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 17, 30)]
DENSE = ["llama", "qwen2", "gemma"]
KINDS = [*DENSE, "mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]
GRANTED = {"qwen3_moe": {"norm_topk_prob": True}, "olmoe": {"num_key_value_heads": 4}}  # by llama.cpp
ROUTERS = {"mixtral": "block_sparse_moe.gate."}


def model_of(kind: str):
    return tiny_model(kind) if kind in DENSE else mixture(kind, **GRANTED.get(kind, {}))


def unfolded_of(plain):
    model = copy.deepcopy(plain)
    unfold_experts(model)
    return model


@torch.no_grad()
def write_base(path: Path, model) -> None:
    """A plain model as llama.cpp's converter would write it, in float32, with a vocabulary of letters."""
    config, name = model.config, GgufNames(model).architecture
    writer = gguf.GGUFWriter(path, name)
    write_sizes(writer, config)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), config.num_hidden_layers
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    unfolded = unfolded_of(model)
    for each in fused_linears(unfolded):
        for place, (part, _) in enumerate(each.parts[0]):
            weights = [linear_at(unfolded, name).weight for name in each.names()]
            stacked = torch.stack([w[parts[place][1]] for w, parts in zip(weights, each.parts, strict=True)])
            writer.add_tensor(f"{names.get_name(re.sub(r'experts.0', 'experts', part))}.weight", stacked.numpy())
    for key, tensor in model.state_dict().items():
        module, _, kind = key.replace("mlp.gate.", ROUTERS.get(config.model_type, "mlp.gate.")).rpartition(".")
        if tensor.ndim == 3 or (key.startswith("lm_head") and config.tie_word_embeddings):
            continue
        place = names.get_name(module)
        if name == "llama" and (count := heads.get(place.rpartition(".")[2])):
            tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name == "gemma" and "norm" in module:
            tensor = tensor + 1
        writer.add_tensor(f"{place}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llamacpp(base: Path, adapter: Path | None) -> torch.Tensor:
    """(prompts, 97) log-probabilities of the next token."""
    asked = {"model": str(base), "adapter": adapter and str(adapter), "prompts": PROMPTS}
    done = subprocess.run([PYTHON, PEER], input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return torch.tensor([[row[str(token)] for token in range(97)] for row in json.loads(line.removeprefix("RESULT"))])


@torch.no_grad()
def in_transformers(model) -> torch.Tensor:
    return torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in PROMPTS])


@pytest.mark.skipif(not PYTHON, reason="EORA_LAB_LLAMACPP names no Python that has xllamacpp")
@pytest.mark.parametrize("kind", KINDS)
def test_llamacpp_computes_as_meant(kind, tmp_path):
    plain = model_of(kind)
    unfolded = unfolded_of(plain)
    factors = ragged(unfolded)
    write_base(tmp_path / "base.gguf", plain)
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, unfolded, "F32")
    assert check_gguf_adapter(tmp_path / "adapter.gguf", tmp_path / "base.gguf") == []
    before, after = in_transformers(plain), in_transformers(merged(unfolded, factors))
    base = (in_llamacpp(tmp_path / "base.gguf", None) - before).abs().max()
    found = (in_llamacpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") - after).abs().max()
    assert base < 1e-4 and found < 1e-4
    assert (after - before).abs().max() > 0.1


@pytest.mark.skipif(not PYTHON, reason="EORA_LAB_LLAMACPP names no Python that has xllamacpp")
@pytest.mark.parametrize(("held", "bound"), [("F16", 1e-2), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_llamacpp_takes_factors_of_every_type(held, bound, tmp_path):
    plain = model_of("llama")
    factors = {
        name: (A[:1].repeat(32, 1) / 32, B[:, :1].repeat(1, 32)) if len(A) else (A, B)
        for name, (A, B) in ragged(plain).items()
    }
    write_base(tmp_path / "base.gguf", plain)
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
