"""Checkpoints of compressed-tensors: read back by the library and by transformers, equal bit by bit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from eora_lab import EoraLabError, load_model
from eora_lab.compress import rtn
from eora_lab.formats import write_compressed_tensors
from eora_lab.layer.linear import CompensatedLinear, compensated
from tests.tiny import compress, save_tiny, tiny_tokenizer, tiny_tokens

INTEGERS = {"zero_point": "integer", "scale_dtype": "float16"}
KINDS = {
    "pack-quantized": [
        {"bits": 4, "group_size": 32, "sym": True} | INTEGERS,
        {"bits": 4, "group_size": 32} | INTEGERS,
        {"bits": 8, "group_size": -1} | INTEGERS,
        {"bits": 2, "group_size": 64, "compressor": "wanda", "sparsity": "2:4"} | INTEGERS,
    ],
    "nvfp4-pack-quantized": [{"grid": "nvfp4"}],
    "mxfp4-pack-quantized": [{"grid": "mxfp4"}],
    "float-quantized": [{"grid": "fp8"}],
}
CASES = [(name, settings) for name, several in KINDS.items() for settings in several]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=str)


def compressed_tiny(folder, dtype=torch.float32, kind="llama", **settings):
    """(model, tokenizer), compressed."""
    model, tokenizer = load_model(save_tiny(folder, kind), dtype=dtype)
    settings = {"bits": None, "compressor": "gptq", "rank": 4} | settings
    compress(model, tiny_tokens(), progress=False, **settings)
    return model, tokenizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@every_case
def test_the_library_and_transformers_read_it_equal(name, settings, dtype, tmp_path):
    reason = "compressed-tensors is not installed"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    model, tokenizer = compressed_tiny(tmp_path / "model", **settings)
    scheme = write_compressed_tensors(tmp_path / "out", model, tokenizer, dtype)
    config = quantization.QuantizationConfig(**config_of(tmp_path / "out"))
    assert scheme.format == config.format == name and not (tmp_path / "out" / "quantize_config.json").exists()
    ((_, group),) = config.config_groups.items()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    compressor = compressors.BaseCompressor.get_value_from_registry(name)
    for layer, module in compensated(model).items():
        parts = {key.removeprefix(f"{layer}."): part for key, part in tensors.items() if key.startswith(f"{layer}.")}
        assert set(compressor.compression_param_names(group)) == parts.keys() - {"bias"}
        read = compressor.decompress(parts, group)["weight"]
        assert torch.equal(read, module.compressed.dense(read.dtype))
    how = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=how, dtype=torch.bfloat16 if "fp4" in name else dtype
    )
    for layer, module in compensated(model).items():
        weight = loaded.get_submodule(layer).weight
        assert torch.equal(weight, module.compressed.dense(weight.dtype))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_configuration_names_what_stayed_dense(tmp_path):
    model, tokenizer = compressed_tiny(tmp_path / "model", grid="nvfp4", skip="o_proj|layers[.]1[.]mlp")
    write_compressed_tensors(tmp_path / "out", model, tokenizer)
    left = config_of(tmp_path / "out")["ignore"]
    assert "lm_head" in left and "model.layers.0.self_attn.o_proj" in left and "model.layers.1.mlp.up_proj" in left
    assert len(left) == 1 + 2 + 3
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"grid": "nf4"},
            "q_proj: compressed-tensors has no such codebook with such groups and scales: use format dense",
        ),
        ({"grid": "q8_0"}, "no such codebook"),
        ({"bits": 4, "group_size": 32}, "q_proj: grids without a whole zero point: compress again with --zero-point"),
        ({"bits": 3, "group_size": 32} | INTEGERS, "3 bits are written as 2, 4 or 8 only"),
        ({"bits": 4, "group_size": 48} | INTEGERS, "its groups are no neighbours of equal number: use format dense"),
        ({"bits": 4, "group_size": 32, "zero_point": "integer"}, "scales that are no float16 numbers: compress again"),
        ({"compressor": "wanda", "sparsity": "2:4", "bits": 16}, "it is stored as sparse"),
    ],
    ids=str,
)
def test_what_the_format_cannot_say_is_refused(settings, message, tmp_path):
    model, tokenizer = compressed_tiny(tmp_path / "model", **settings)
    with pytest.raises(EoraLabError, match=message):
        write_compressed_tensors(tmp_path / "out", model, tokenizer)
    assert not (tmp_path / "out").exists()


def test_layers_that_are_no_linears_are_refused(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97, n_positions=128)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model")
    compress(model, tiny_tokens(), "rtn", bits=None, grid="fp8", rank=4, progress=False)
    with pytest.raises(EoraLabError, match="c_attn: the original is no Linear, as compressed-tensors wants it"):
        write_compressed_tensors(tmp_path / "out", model, tokenizer)


def test_linears_that_servers_fuse_share_the_scale_of_the_tensor(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path / "model"))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 40
    compress(model, tiny_tokens(), "rtn", bits=None, grid="nvfp4", rank=4, progress=False)
    write_compressed_tensors(tmp_path / "out", model, tokenizer)
    tensors, scales = load_file(tmp_path / "out" / "model.safetensors"), {}
    for name, module in compensated(model).items():
        scale = tensors[f"{name}.weight_global_scale"]
        scales.setdefault(name.rpartition(".")[0], set()).add(scale.item())
        read = tensors[f"{name}.weight_scale"].float() / scale
        assert torch.equal(read, module.compressed.scales.float() / module.compressed.tensor_scale)
    assert all(len(one) == 1 for one in scales.values()) and len(set.union(*scales.values())) > 1
    with torch.no_grad():
        module.whole["tensor_scale"] *= 1.1  # not by a power of two
    with pytest.raises(EoraLabError, match="its scales fit in no tensor scale that its neighbours have"):
        write_compressed_tensors(tmp_path / "other", model, tokenizer)


def test_several_schemes_are_refused(tmp_path):
    model, tokenizer = compressed_tiny(tmp_path / "model", grid="nvfp4")
    name, module = list(compensated(model).items())[-1]
    original = load_model(tmp_path / "model")[0].get_submodule(name)
    model.set_submodule(name, CompensatedLinear(original, rtn(original.weight, None, grid="fp8"), module.factors))
    with pytest.raises(EoraLabError, match=f"and {name} float-quantized.*, but one scheme holds for all"):
        write_compressed_tensors(tmp_path / "out", model, tokenizer)


def test_a_model_that_is_not_compressed_is_refused(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path / "model"))
    with pytest.raises(EoraLabError, match="this model is not compressed: give a run folder"):
        write_compressed_tensors(tmp_path / "out", model, tokenizer)
