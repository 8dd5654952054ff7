"""GGUF files as compressed models: W^ by the model's names, bit by bit what the package gguf reads, and mended."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eora_lab import EoraLabError, load_model, load_run, plan_ranks
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.cli import main
from eora_lab.compress import CodebookWeight, DenseWeight, GgufWeight, weight_from_state_dict
from eora_lab.compress.storage import tagged_state_dict
from eora_lab.formats import GgufCheckpoint, read_checkpoint
from eora_lab.formats.gguf_adapter import write_gguf_adapter
from eora_lab.formats.gguf_names import GgufNames
from eora_lab.model.structure import block_linears, linear_at
from eora_lab.run.budget import Budget
from eora_lab.run.given import farthest
from eora_lab.run.recipe import Recipe
from eora_lab.run.stored import run_factors
from tests.gguf_files import (
    DENSE,
    PROMPTS,
    encoded,
    in_llamacpp,
    model_of,
    needs_llamacpp,
    unfolded_of,
    write_gguf,
    write_metadata,
)
from tests.test_expert_adapters import merged, mixture, ragged
from tests.tiny import compress, logits, save_tiny, tiny_model, tiny_tokens

READ = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
]
READ += ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
TYPES = gguf.GGMLQuantizationType
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")  # by it, in blocks of 32
KINDS = [*DENSE, "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss"]
PASS = {"rank": 8, "inputs": "original", "progress": False}
TEXTS = (
    "--calibration.source text.txt --calibration.nsamples 4 --calibration.seqlen 32 --evaluation.perplexity text.txt"
)
TEXTS = f"{TEXTS} --evaluation.windows 2 --evaluation.window-length 32".split()


def dequantised(data: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def in_blocks(kind: str):
    """For `write_gguf`: this type for all linears in the blocks."""
    return lambda key: kind if key.startswith("blk.") and key.endswith("weight") else "F32"


def wide_model(hidden: int = 256) -> transformers.PreTrainedModel:
    """A Llama of one block whose rows the blocks of all types divide, with as many heads for k as for q, or half."""
    sizes = {"hidden_size": hidden, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, num_hidden_layers=1, max_position_embeddings=128, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [*READ, "F32", "F16", "BF16"])
def test_every_type_is_kept_and_read_as_gguf_reads_it(kind):
    data = np.random.default_rng(0).integers(0, 256, (6, 512), dtype=np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.ascontiguousarray(data[:, : 512 // size * size])
    weight = GgufWeight(torch.from_numpy(data), kind)
    with np.errstate(all="ignore"):
        wanted = dequantised(data, kind)
    assert weight.shape == wanted.shape == (6, 512 // size * block)
    assert torch.equal(weight.dense().view(torch.int32), wanted.view(torch.int32))  # NaN too
    assert weight.nbytes == data.nbytes and weight.bits == int(8 * size / block)
    again = weight_from_state_dict(tagged_state_dict(weight))
    assert again.type == kind and torch.equal(again.blocks, weight.blocks)
    state = tagged_state_dict(weight)
    some = weight_from_state_dict(state | {"blocks": state["blocks"][2:4]})
    assert torch.equal(some.dense().view(torch.int32), wanted[2:4].view(torch.int32))


def test_scales_beside_the_blocks_multiply_and_are_kept():
    blocks = torch.from_numpy(encoded(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32), "Q8_0"))
    plain, scaled = GgufWeight(blocks, "Q8_0"), GgufWeight(blocks, "Q8_0", torch.tensor([[2.0], [2], [0.5], [0.5]]))
    assert torch.equal(scaled.dense(), plain.dense() * torch.tensor([[2.0], [2], [0.5], [0.5]]))
    assert torch.equal(weight_from_state_dict(tagged_state_dict(scaled)).dense(), scaled.dense())
    assert scaled.nbytes == plain.nbytes + 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_linears_of_the_model(kind, tmp_path):
    """Blocks lie within rows: quantising a linear of the model in its own order gives the same values."""
    plain = model_of(kind)
    own = "MXFP4" if kind == "gpt_oss" else "Q4_0"
    write_gguf(tmp_path / "base.gguf", plain, in_blocks(own))
    model = unfolded_of(plain)
    checkpoint = read_checkpoint(tmp_path / "base.gguf")
    weights = checkpoint.of(model)
    assert isinstance(checkpoint, GgufCheckpoint) and checkpoint.base == f"GGUF {own}"
    gates = {name for name in block_linears(model) if name.endswith(("shared_expert_gate", "router"))}
    assert set(weights) == set(block_linears(model)) - gates
    for name, weight in weights.items():
        wanted = dequantised(encoded(linear_at(model, name).weight.detach().numpy(), own), own)
        assert isinstance(weight, GgufWeight) and torch.equal(weight.dense(), wanted)


@pytest.mark.parametrize("kind", READ)
def test_every_type_in_a_file_with_rows_moved_back(kind, tmp_path):
    model = wide_model()
    write_gguf(tmp_path / "base.gguf", model, in_blocks(kind))
    weights = read_checkpoint(tmp_path / "base.gguf").of(model)
    raw = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    q = dequantised(np.array(raw["blk.0.attn_k.weight"]), kind)  # 2 heads of 64 rows, halves side by side in pairs
    rows = [head * 64 + 2 * (row % 32) + row // 32 for head in range(2) for row in range(64)]
    found = weights["model.layers.0.self_attn.k_proj"]
    assert found.type == kind and torch.equal(found.dense().view(torch.int32), q[rows].view(torch.int32))
    down = dequantised(np.array(raw["blk.0.ffn_down.weight"]), kind)
    assert torch.equal(weights["model.layers.0.mlp.down_proj"].dense().view(torch.int32), down.view(torch.int32))


@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(1, 7))
def test_rows_moved_and_moved_back_are_as_they_were(heads, half, columns):
    model = tiny_model("llama")
    model.config.num_attention_heads = heads
    names, rows = GgufNames(model), torch.randint(0, 256, (heads * 2 * half, columns), dtype=torch.uint8)
    moved = names.permuted("blk.0.attn_q", rows)
    assert torch.equal(names.restored("blk.0.attn_q", moved), rows)
    assert torch.equal(names.restored("blk.0.attn_v", rows), rows)
    assert half == 1 or not torch.equal(moved, rows) or len(rows.unique(dim=0)) < len(rows)


def test_gate_and_up_of_two_types_come_in_full(tmp_path):
    plain = mixture()
    write_gguf(tmp_path / "base.gguf", plain, lambda key: "Q8_0" if "up_exps" in key else in_blocks("Q4_0")(key))
    model = unfolded_of(plain)
    weights = read_checkpoint(tmp_path / "base.gguf").of(model)
    name = "model.layers.0.mlp.experts.1.gate_up_proj"
    W, found = linear_at(model, name).weight.detach().numpy(), weights[name]
    wanted = [
        dequantised(encoded(rows, kind), kind) for rows, kind in zip(np.split(W, 2), ("Q4_0", "Q8_0"), strict=True)
    ]
    assert isinstance(found, DenseWeight) and torch.equal(found.dense(), torch.cat(wanted))


def test_a_file_with_fewer_experts_is_told(tmp_path):
    write_gguf(tmp_path / "base.gguf", mixture(), in_blocks("Q4_0"))
    with pytest.raises(EoraLabError, match=r"was not made from the given model: blk.0.ffn_gate_exps.weight has no exp"):
        read_checkpoint(tmp_path / "base.gguf").of(unfolded_of(mixture("mixtral", num_local_experts=6)))


def test_unquantised_linears_stay_as_they_are(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "base.gguf", model, lambda key: "F16" if "attn_v" in key else in_blocks("Q4_0")(key))
    report = compress(model, tiny_tokens(), weights=read_checkpoint(tmp_path / "base.gguf"), **PASS)
    assert len(report.layers) == 12 and isinstance(linear_at(tiny_model("llama"), layer_v), torch.nn.Linear)
    assert sum("v_proj" in name for name in report.overlooked) == 1
    assert type(model.get_submodule(layer_v)) is torch.nn.Linear


layer_v = "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_mended_run_is_closer_resumes_and_loads(kind, tmp_path):
    original = save_tiny(tmp_path / "model")
    write_gguf(tmp_path / "base.gguf", tiny_model("llama"), in_blocks(kind))
    model, _ = load_model(original)
    checkpoint = read_checkpoint(tmp_path / "base.gguf")
    report = compress(model, tiny_tokens(), weights=checkpoint, folder=tmp_path / "run", **PASS)
    assert report.base == f"GGUF {kind}" and report.summary().startswith(f"GGUF {kind}: ")
    assert all(layer.error_after < layer.error_before for layer in report.layers)
    loaded, _, again = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tiny_tokens()), logits(model, tiny_tokens())) and again.base == report.base
    (tmp_path / "run/report.json").unlink()
    (tmp_path / "run/blocks/001.safetensors").unlink()
    resumed, _ = load_model(original)
    compress(resumed, tiny_tokens(), weights=checkpoint, folder=tmp_path / "run", **PASS)
    assert torch.equal(logits(resumed, tiny_tokens()), logits(model, tiny_tokens()))


def test_experts_are_mended(tmp_path):
    plain = mixture()
    write_gguf(tmp_path / "base.gguf", plain, in_blocks("Q4_0"))
    model = unfolded_of(plain)
    report = compress(model, tiny_tokens(), weights=read_checkpoint(tmp_path / "base.gguf"), **PASS)
    assert len(report.layers) == 24 and sum(layer.error_after < layer.error_before for layer in report.layers) > 20


def test_ranks_are_planned_from_a_file(tmp_path):
    model = tiny_model("llama")
    write_gguf(tmp_path / "base.gguf", model, in_blocks("Q4_0"))
    statistics = collect_statistics(model, tiny_tokens(), progress=False)
    budget = Budget(objective="relative")
    ranks = plan_ranks(model, statistics, Recipe(rank=16), budget, False, read_checkpoint(tmp_path / "base.gguf"))
    assert len(ranks) == 14 and len(set(ranks.values())) > 1


def workplace(tmp_path, monkeypatch) -> None:
    """A folder with a model, a GGUF file of it, and a text; it becomes the working folder."""
    monkeypatch.chdir(tmp_path)
    save_tiny("model")
    write_gguf(tmp_path / "base.gguf", tiny_model("llama"), in_blocks("Q4_0"))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)


def test_mend_evaluate_and_export_on_the_command_line(tmp_path, capsys, monkeypatch):
    workplace(tmp_path, monkeypatch)
    mend = ["mend", "base.gguf", "run", "--model", "model", "--rank", "8", *TEXTS]
    assert main(mend) == 0 and main(mend) == 0  # the second one finds it done
    assert "GGUF Q4_0: 0.1 M weights" in capsys.readouterr().out
    said = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    checkpoint = GgufCheckpoint(tmp_path / "base.gguf")
    assert said["checkpoint"] == str(tmp_path / "base.gguf") and said["base"] == "GGUF Q4_0"
    assert said["checkpoint_sha256"] == checkpoint.sha256() and "bits" not in said
    assert main(["evaluate", "run", "--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]) == 0
    assert main(["adapter", "export", "run", "out.gguf", "--format", "gguf"]) == 0
    assert f"llama-server -m {tmp_path}/base.gguf --lora out.gguf" in capsys.readouterr().out
    write_gguf_adapter("own.gguf", run_factors("run"), tiny_model("llama"))
    exported, own = (gguf.GGUFReader(tmp_path / name).tensors for name in ("out.gguf", "own.gguf"))
    assert [one.name for one in exported] == [one.name for one in own] and len(own) > 0
    assert all(np.array_equal(one.data, other.data) for one, other in zip(exported, own, strict=True))
    write_gguf(tmp_path / "base.gguf", tiny_model("llama"), in_blocks("Q8_0"))
    assert main(mend) == 1
    assert "holds another run (base was 'GGUF Q4_0', now 'GGUF Q8_0'" in capsys.readouterr().err
    assert main(["mend", "base.gguf", "other", "--model", "model", "--format", "gptq", *TEXTS]) == 1
    assert "base.gguf: this is no GPTQ checkpoint" in capsys.readouterr().err


@needs_llamacpp
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "MXFP4"])
def test_llamacpp_computes_the_mended_model(kind, tmp_path):
    """llama.cpp rounds activations to 8 bits, with an adapter as without."""
    model = tiny_model("llama")
    write_gguf(tmp_path / "base.gguf", model, in_blocks(kind))
    bare = tiny_model("llama")
    weights = read_checkpoint(tmp_path / "base.gguf")
    compress(bare, tiny_tokens(), weights=weights, **PASS | {"method": "none", "rank": 0})
    compress(model, tiny_tokens(), weights=weights, **PASS | {"rank": 32})
    factors = {name: layer.factors.dense() for name, layer in model.named_modules() if hasattr(layer, "factors")}
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, tiny_model("llama"))
    here = [
        torch.stack([one(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in PROMPTS]) for one in (bare, model)
    ]
    there = [in_llamacpp(tmp_path / "base.gguf", adapter) for adapter in (None, tmp_path / "adapter.gguf")]
    noise = (there[0] - here[0]).abs().mean()
    assert noise < 0.01 and (there[1] - here[1]).abs().mean() < 2 * noise
    assert (here[1] - here[0]).abs().mean() > (0.5 if kind == "Q8_0" else 2) * noise


@needs_llamacpp
@torch.no_grad()
def test_llamacpp_computes_with_scales_beside_blocks(tmp_path):
    """NVFP4 as converters write it: the scale of the whole tensor stands beside it."""
    own = {"blk.0.attn_v": 0.25, "blk.1.attn_q": 0.5}
    more = {f"{name}.scale": [scale] for name, scale in own.items()}
    write_gguf(tmp_path / "base.gguf", tiny_model("llama"), lambda key: "NVFP4" if key[:-7] in own else "F32", more)
    model = tiny_model("llama")
    weights = read_checkpoint(tmp_path / "base.gguf").of(model)
    assert {type(weight.scales) for weight in weights.values()} == {torch.Tensor} and len(weights) == 2
    for name, weight in weights.items():
        linear_at(model, name).weight.copy_(weight.dense())
        assert weight.dense().norm() > 1
    factors = ragged(model)
    write_gguf_adapter(tmp_path / "adapter.gguf", factors, model)
    for adapter, one in ((None, model), (tmp_path / "adapter.gguf", merged(model, factors))):
        here = torch.stack([one(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in PROMPTS])
        assert (in_llamacpp(tmp_path / "base.gguf", adapter) - here).abs().max() < 0.02, adapter


def read_for(path, model) -> None:
    """All that a mended run asks of a file."""
    compress(model, tiny_tokens(), weights=read_checkpoint(path), **PASS | {"method": "none", "rank": 0})


def edit(path, change) -> None:
    """Write the file of a tiny Llama again without some tensors, or with others: change(name -> (data, type))."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    change(tensors)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    write_metadata(writer, tiny_model("llama").config)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The file of a tiny Llama."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(path, tiny_model("llama"), in_blocks("Q4_0"))
    return path


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 0.9, 0.99])
def test_a_file_that_ends_early_is_told(share, sound, tmp_path):
    content = sound.read_bytes()
    (tmp_path / "base.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(EoraLabError, match=r"cannot read .*base.gguf: .*damaged: get it again"):
        read_checkpoint(tmp_path / "base.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line_or_does_not_matter(data, sound, tmp_path):
    """Some bytes of the head or of the rest are others."""
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.sampled_from([4000, len(content)]))
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "base.gguf"
    path.write_bytes(content)
    try:
        weights = read_checkpoint(path).of(tiny_model("llama"))
    except EoraLabError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(weights) == 14 and all(weight.dense().shape == weight.shape for weight in weights.values())


def rename_type(number: int):
    """Give the first quantised tensor another type, by its number in the file."""

    def change(path) -> None:
        content = path.read_bytes()
        name = b"blk.0.ffn_down.weight"
        place = content.index(name) + len(name) + 4 + 16  # after the number of dimensions, and two of them
        assert int.from_bytes(content[place : place + 4], "little") == 2  # Q4_0
        path.write_bytes(content[:place] + number.to_bytes(4, "little") + content[place + 4 :])

    return change


def drop(name: str):
    return lambda path: edit(path, lambda tensors: tensors.pop(name))


def put(name: str, values: np.ndarray, kind: str = "Q4_0"):
    return lambda path: edit(path, lambda tensors: tensors.update({name: (encoded(values, kind), TYPES[kind])}))


OTHER = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32) / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("no such thing"), "GGUF magic invalid; it is no GGUF file, or damaged"),
        (rename_type(1000), "gguf .* does not know a type in it: install a newer one"),
        (rename_type(TYPES["Q1_0"]), "blk.0.ffn_down.weight is of type Q1_0, which gguf .* cannot dequantise"),
        (drop("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight, model.layers.1.mlp.up_proj of"),
        (drop("blk.1.attn_norm.weight"), "lacks the tensor blk.1.attn_norm.weight, model.layers.1.input_layernorm.w"),
        (drop("token_embd.weight"), "lacks the tensor token_embd.weight"),
        (drop("output.weight"), "lacks the tensor output.weight, lm_head.weight of"),
        (put("blk.2.attn_q.weight", OTHER), "holds blk.2.attn_q, for which the given model has no linear"),
        (
            put("blk.1.attn_q.weight", OTHER),
            r"q_proj .*, but \d\.\d+ times .* where 0.50 times is the most",
        ),
        (put("blk.1.attn_q.weight", OTHER[:, :32]), r"q_proj is \(64, 32\), not \(64, 64\)"),
        (put("output_norm.weight", np.full(64, 1.2, np.float32), "F32"), "output_norm.weight is not its model.norm.we"),
        (put("output_norm.weight", np.ones(32, np.float32), "F32"), "output_norm.weight is not its model.norm.weight"),
        (put("output.weight", np.tile(OTHER[:1], (97, 1)), "Q8_0"), "output.weight is not its lm_head.weight"),
        (
            put("blk.0.ffn_up.weight", np.full((128, 64), np.nan, np.float32)),
            "up_proj comes compressed with NaN or Inf",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(change, message, sound, tmp_path):
    path = tmp_path / "base.gguf"
    shutil.copy(sound, path)
    change(path)
    with pytest.raises(EoraLabError) as raised:
        read_for(path, tiny_model("llama"))
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value), raised.value
    assert str(path) in str(raised.value)


def resized(**changes):
    """A tiny Llama of other sizes."""
    config = tiny_model("llama").config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("qwen2"), "is of a llama model, and the given model would be a qwen2"),
        (lambda: resized(num_hidden_layers=3), "its block_count is 2, that of the model 3"),
        (lambda: resized(num_attention_heads=8, head_dim=8), "its attention.head_count is 4, that of the model 8"),
        (lambda: resized(vocab_size=90), "token_embd.weight is not its model.embed_tokens.weight"),
        (lambda: tiny_model("llama", seed=1), "token_embd.weight is not its model.embed_tokens.weight"),
        (lambda: unfolded_of(mixture("dbrx")), "GGUF file of a dbrx model holds is not known here: known are llama"),
    ],
)
def test_another_original_is_told(model, message, sound):
    with pytest.raises(EoraLabError, match=message):
        read_for(sound, model())


def test_rows_that_are_not_moved_back_are_told(sound, tmp_path):
    """q and k in the order of transformers, as no converter of a Llama writes them."""

    def change(tensors):
        for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
            data, kind = tensors[name]
            tensors[name] = GgufNames(tiny_model("llama")).restored(name[:-7], torch.from_numpy(data)).numpy(), kind

    shutil.copy(sound, tmp_path / "base.gguf")
    edit(tmp_path / "base.gguf", change)
    with pytest.raises(EoraLabError, match=r"q_proj comes compressed, but 1\.\d+ times the weight's norm away from it"):
        read_for(tmp_path / "base.gguf", tiny_model("llama"))


def test_quantised_embeddings_and_rows_left_out_are_no_other_model(tmp_path):
    model = wide_model()
    write_gguf(tmp_path / "base.gguf", model, lambda key: "Q4_0" if key != "token_embd.weight" else "TQ1_0")
    read_checkpoint(tmp_path / "base.gguf").check_model(model)
    larger = tiny_model("llama")
    larger.resize_token_embeddings(120)
    write_gguf(tmp_path / "less.gguf", tiny_model("llama"), in_blocks("Q4_0"))
    read_checkpoint(tmp_path / "less.gguf").check_model(larger)


def test_files_that_hold_no_compressed_model(sound, tmp_path):
    write_gguf(tmp_path / "plain.gguf", tiny_model("llama"), in_blocks("F16"))
    with pytest.raises(EoraLabError, match=r"plain.gguf holds no quantised weights in blocks"):
        read_checkpoint(tmp_path / "plain.gguf")
    pair = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 64), torch.ones(64, 1))}
    write_gguf_adapter(tmp_path / "adapter.gguf", pair, tiny_model("llama"))
    with pytest.raises(EoraLabError, match=r"adapter.gguf is the GGUF file of a adapter, not of a model"):
        read_checkpoint(tmp_path / "adapter.gguf")
    with pytest.raises(EoraLabError, match=r"no checkpoint .*absent.gguf"):
        read_checkpoint(tmp_path / "absent.gguf")
    with pytest.raises(
        EoraLabError, match=r"is no compressed checkpoint that is read here \(gptq, .*gguf.*\): no quantiz"
    ):
        read_checkpoint(tmp_path)
    shutil.copy(sound, tmp_path / "model")  # known by what is in it
    assert read_checkpoint(tmp_path / "model").base == "GGUF Q4_0"


def test_a_model_in_several_files(sound, tmp_path):
    reader = gguf.GGUFReader(sound)
    for part, tensors in enumerate((reader.tensors[:7], reader.tensors[7:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{part}-of-00002.gguf", "llama")
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            own = tensor.tensor_type if tensor.data.dtype == np.uint8 else None
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    model, path = tiny_model("llama"), tmp_path / "m-00001-of-00002.gguf"
    whole, parts = read_checkpoint(sound).of(model), read_checkpoint(path).of(model)
    assert all(torch.equal(parts[name].blocks, whole[name].blocks) for name in whole) and len(parts) == len(whole)
    assert read_checkpoint(path).sha256() == read_checkpoint(tmp_path / "m-00002-of-00002.gguf").sha256()
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(EoraLabError, match=r"m-00002-of-00002.gguf is missing: all parts of a model must lie beside"):
        read_checkpoint(path)


def test_what_is_allowed_follows_the_bits():
    codes, levels = torch.zeros(2, 32, dtype=torch.uint8), torch.linspace(-1, 1, 16)
    four = CodebookWeight(codes, levels, torch.ones(2, 1), 4, 32)
    assert farthest(four) == 0.5 and farthest(DenseWeight(torch.ones(2, 2))) == 1
    assert farthest(GgufWeight(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0")) == 0.125
    assert farthest(GgufWeight(torch.zeros(2, 54, dtype=torch.uint8), "TQ1_0")) == 1
