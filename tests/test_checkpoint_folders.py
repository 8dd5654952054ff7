"""Folders of FP8 in blocks, AWQ and gpt-oss, and of mixtures with experts one by one, against others' dequantisers.

The truth is what transformers (FP8, MXFP4) and compressed-tensors (AWQ) make of the same tensors.
"""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.formats import FORMATS, AwqCheckpoint, Fp8Checkpoint, Mxfp4Checkpoint, read_checkpoint
from eora_lab.model.unfold import unfold
from tests.folders import (
    AWQ,
    FOLDERS,
    FP8,
    Q_PROJ,
    TORCHAO,
    awq,
    fp8,
    gpt_oss,
    matrices,
    mixtral,
    nvfp4,
    quantise,
    rewrite,
    save_gpt_oss,
    torchao,
)
from tests.tiny import compress, edit_json, logits, save_tiny, tiny_model, tiny_tokens

PASS = {"rank": 8, "inputs": "original", "progress": False}


def test_fp8_in_blocks_is_what_the_values_and_their_scales_say(tmp_path):
    tensors = quantise(tmp_path, fp8, FP8)
    checkpoint = read_checkpoint(tmp_path)
    assert (
        isinstance(checkpoint, Fp8Checkpoint)
        and checkpoint.base.startswith("FP8 blocks of 24x40 (")
        and len(checkpoint) == 14
    )
    for name, weight in checkpoint.of(tiny_model("llama")).items():
        values, scales = (tensors[f"{name}.{kind}"] for kind in ("weight", "weight_scale_inv"))
        whole = scales.repeat_interleave(24, 0).repeat_interleave(40, 1)[: len(values), : values.shape[1]]
        assert torch.equal(weight.dense(), values.float() * whole)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_what_transformers_makes_of_it(scales, tmp_path):
    """It takes only whole blocks."""
    about = FP8 | {"weight_block_size": [32, 16], "scale_fmt": "ue8m0" if scales == torch.float8_e8m0fnu else "float"}
    tensors = quantise(tmp_path, lambda weight: {k: t for k, t in fp8(weight, 32, 16).items()}, about)
    tensors = {key: t.to(scales) if key.endswith("scale_inv") else t for key, t in tensors.items()}
    rewrite(tmp_path, tensors, about)
    for name, weight in read_checkpoint(tmp_path).items():
        values, own = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
        truth = Fp8Dequantize(None)._dequantize_one(values, own)
        assert torch.equal(weight.dense(truth.dtype), truth)


def test_fp8_with_one_scale_a_tensor(tmp_path):
    about = FP8 | {"weight_block_size": None, "activation_scheme": "static"}

    def linear(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax() / 448
        own = {"weight_scale_inv": scale, "activation_scale": torch.tensor(0.1)}
        return own | {"weight": (weight / scale).to(torch.float8_e4m3fn)}

    tensors = quantise(tmp_path, linear, about)
    for name, weight in read_checkpoint(tmp_path).of(tiny_model("llama")).items():
        truth = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale_inv"]
        assert torch.equal(weight.dense(), truth)


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq_is_what_compressed_tensors_makes_of_it(group_size, tmp_path):
    def linear(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return awq(weight, weight.shape[1] if group_size == -1 else group_size)

    tensors = quantise(tmp_path, linear, AWQ | {"group_size": group_size})
    checkpoint = read_checkpoint(tmp_path)
    assert isinstance(checkpoint, AwqCheckpoint) and checkpoint.base == f"AWQ 4-bit g{group_size}"
    converted = AutoAWQConverter(group_size=group_size).process(dict(tensors))
    for name, weight in checkpoint.of(tiny_model("llama")).items():
        scales, shape = converted[f"{name}.weight_scale"], converted[f"{name}.weight_shape"]
        codes = unpack_from_int32(converted[f"{name}.weight_packed"], 4, shape)
        zeros = unpack_from_int32(converted[f"{name}.weight_zero_point"], 4, scales.shape, packed_dim=0)
        size = shape[1] // scales.shape[1]
        truth = (codes.half().unflatten(1, (-1, size)) - zeros.half()[..., None]) * scales[..., None]
        assert torch.equal(weight.dense(torch.float16), truth.flatten(1))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", ["NVFP4", "FP8"])
def test_modelopt_is_what_its_dequantiser_says(kind, beside, tmp_path):
    """ModelOpt's `dequantize`, not installed here: level * (weight_scale.float() * weight_scale_2)."""

    def per_tensor(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax() / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    said = {"quant_algo": kind, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    said |= {"group_size": 16} if kind == "NVFP4" else {}
    tensors = quantise(tmp_path, nvfp4 if kind == "NVFP4" else per_tensor, said | {"quant_method": "modelopt"})
    rewrite(tmp_path, tensors | {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}, said)
    if beside:
        edit_json(tmp_path / "config.json", quantization_config=None)
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said, "producer": {"name": "x"}}))
    else:
        edit_json(tmp_path / "config.json", quantization_config=said | {"quant_method": "modelopt"})
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.base == f"ModelOpt {kind} (activations not modelled)"
    signed = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for name, weight in checkpoint.of(tiny_model("llama")).items():
        values, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].float()
        if kind == "NVFP4":
            levels = signed[torch.stack([values & 15, values >> 4], -1).flatten(1).long()]
            scales = (scales * tensors[f"{name}.weight_scale_2"]).repeat_interleave(16, 1)
            assert torch.equal(weight.dense(), levels * scales)
        else:
            assert torch.equal(weight.dense(), values.float() * scales)
    edit_json(
        tmp_path / "config.json", quantization_config={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    )
    with pytest.raises(EoraLabError, match="quant_algo 'mixed_precision' is not read, only NVFP4 and FP8"):
        read_checkpoint(tmp_path)


def test_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path):
    tensors = save_gpt_oss(tmp_path)
    model = gpt_oss()
    unfold(model)
    checkpoint = read_checkpoint(tmp_path)
    assert isinstance(checkpoint, Mxfp4Checkpoint)
    found = checkpoint.of(model)
    assert len(found) == 2 * 3 * 2
    for name, weight in found.items():
        module, index, leaf = name.rsplit(".", 2)
        blocks, scales = (tensors[f"{module}.{leaf}{kind}"] for kind in ("_blocks", "_scales"))
        assert torch.equal(weight.dense(torch.bfloat16), convert_moe_packed_tensors(blocks, scales)[int(index)].T)
    report = compress(model, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert len(report.layers) == 12 and all(one.error_after <= one.error_before for one in report.layers)


def test_experts_one_by_one_come_together_as_the_model_has_them(tmp_path):
    """Mixtral: the file has w1, w2 and w3 of every expert, and another name for the router; the model gate_up_proj."""
    model = mixtral()
    tensors = quantise(tmp_path, matrices(fp8), FP8, model, at=".weight")
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight_scale_inv" in tensors
    unfold(model)
    found = read_checkpoint(tmp_path).of(model)
    assert len(found) == 2 * (4 + 3 * 2)
    for index in range(3):
        parts = []
        for leaf in ("w1", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{index}.{leaf}"
            values, scales = (tensors[f"{name}.{kind}"] for kind in ("weight", "weight_scale_inv"))
            parts.append(values.float() * scales.repeat_interleave(24, 0)[:96].repeat_interleave(40, 1)[:, :64])
        weight = found[f"model.layers.1.mlp.experts.{index}.gate_up_proj"]
        assert weight.kind == "codebook" and torch.equal(weight.dense(), torch.cat(parts))
    del tensors["model.layers.0.block_sparse_moe.gate.weight"]
    rewrite(tmp_path, tensors, FP8)
    with pytest.raises(EoraLabError, match=r"lacks the tensor .*\.0\.block_sparse_moe\.gate\.weight"):
        read_checkpoint(tmp_path).of(model)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_mixture_is_mended_as_its_model_has_it(kind, tmp_path):
    linear, about = FOLDERS[kind]
    model = mixtral()
    quantise(tmp_path, matrices(linear), about, model, at=".weight")
    unfold(model)
    checkpoint = read_checkpoint(tmp_path)
    weight = checkpoint.of(model)["model.layers.1.mlp.experts.2.gate_up_proj"]
    name = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(weight.dense(), torch.cat([checkpoint[f"{name}.{leaf}"].dense() for leaf in ("w1", "w3")]))
    report = compress(model, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert len(report.layers) == 2 * (4 + 3 * 2) and all(one.error_after < one.error_before for one in report.layers)


def test_names_of_a_wrapper_and_layers_that_no_model_loads(tmp_path):
    """The text model of one that also sees has `language_model` in its names; layers for more tokens are left out."""
    tensors = quantise(tmp_path, fp8, FP8)
    plain = {name: weight.dense() for name, weight in read_checkpoint(tmp_path).items()}
    more = {f"mtp.{kind}": one for kind, one in fp8(torch.ones(32, 32)).items()}
    rewrite(tmp_path, {f"language_model.{key}": one for key, one in tensors.items()} | more, FP8)
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match="quantises mtp, which is no linear layer"):
        read_checkpoint(tmp_path).of(model)
    model._keys_to_ignore_on_load_unexpected = [r"^mtp.*"]
    found = read_checkpoint(tmp_path).of(model)
    assert found.keys() == plain.keys() and all(torch.equal(one.dense(), plain[name]) for name, one in found.items())


@pytest.mark.parametrize(("linear", "about"), [(fp8, FP8), (awq, AWQ)])
def test_a_mended_folder_is_a_run(linear, about, tmp_path):
    quantise(tmp_path / "base", linear, about)
    model, _ = load_model(save_tiny(tmp_path / "model"))
    checkpoint = read_checkpoint(tmp_path / "base")
    report = compress(model, tiny_tokens(), weights=checkpoint, **PASS, folder=tmp_path / "run")
    assert report.base == checkpoint.base and all(one.error_after < one.error_before for one in report.layers)
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(model, tiny_tokens(2)))


NAN8 = torch.full((64, 64), 255).byte().view(torch.float8_e4m3fn)
FP8_DAMAGED = [
    ({"drop": [f"{Q_PROJ}.weight"]}, rf"lacks the tensor {Q_PROJ}\.weight"),
    ({"drop": [f"{Q_PROJ}.weight_scale_inv"]}, rf"the values of {Q_PROJ}\.weight differ"),
    ({"tensors": {f"{Q_PROJ}.weight": NAN8}}, rf"{Q_PROJ}\.weight has NaN or Inf"),
    ({"tensors": {f"{Q_PROJ}.weight_scale_inv": torch.full((3, 2), torch.inf)}}, "weight_scale_inv has NaN or Inf"),
    ({"tensors": {f"{Q_PROJ}.weight": torch.zeros(64, 64).char()}}, "weight is int8, not float8_e4m3fn"),
    (
        {"tensors": {"model.layers.0.extra.weight": torch.ones(1)}},
        r"holds model\.layers\.0\.extra\.weight, which is no",
    ),
    ({"weight_block_size": [64, 64]}, "weight_scale_inv is 3 x 2, not 1 x 1"),
    ({"weight_block_size": None}, "names no weight_block_size"),
    ({"weight_block_size": [0, 1]}, "weight_block_size must be two positive numbers"),
    ({"fmt": "e5m2"}, "fmt 'e5m2' is not read"),
    ({"expert_dtype": "fp4"}, "expert_dtype 'fp4' is not read"),
    ({"rotation": 1}, r"rotation \(1\) is not known here"),
]
AWQ_DAMAGED = [
    ({"drop": [f"{Q_PROJ}.qzeros"]}, rf"lacks the tensor {Q_PROJ}\.qzeros"),
    ({"drop": [f"{Q_PROJ}.qweight"]}, rf"lacks the tensor {Q_PROJ}\.weight"),
    ({"tensors": {f"{Q_PROJ}.scales": torch.full((2, 64), torch.nan)}}, "scales has NaN or Inf"),
    ({"tensors": {f"{Q_PROJ}.qzeros": torch.zeros(2, 7).int()}}, "qzeros is 2 x 7, not 2 x 8"),
    ({"tensors": {f"{Q_PROJ}.qweight": torch.zeros(64, 8)}}, "qweight is float32, not int32"),
    ({"group_size": 64}, "qzeros is 2 x 8, not 1 x 8"),
    ({"group_size": 0}, "group_size must be one positive number or -1"),
    ({"q_group_size": 64}, "group_size must be one positive number or -1, not "),
    ({"bits": 3}, "bits 3 is not read, only 4"),
    ({"version": "gemv"}, "version 'gemv' is not read, only gemm"),
    ({"zero_point": False}, "zero_point False is not read"),
    ({"zero_point": "yes"}, "zero_point 'yes' is not read"),
    ({"quant_method": "awq", "scaled": 3}, r"scaled \(3\) is not known here"),
]


TORCHAO_DAMAGED = [
    ({"tensors": {f"{Q_PROJ}._weight_zero_point": torch.zeros(65, 2).char()}}, "zero_point has 130 numbers, not 128"),
    ({"tensors": {f"{Q_PROJ}._weight_scale": torch.ones(64, 1)}}, "_weight_scale has 64 numbers, not 128"),
    ({"tensors": {f"{Q_PROJ}._weight_qdata": torch.full((64, 64), 8).char()}}, "are beyond 4 bits"),
]


@pytest.mark.parametrize(
    ("linear", "about", "damage", "message"),
    [(fp8, FP8, *one) for one in FP8_DAMAGED]
    + [(awq, AWQ, *one) for one in AWQ_DAMAGED]
    + [(torchao, TORCHAO, *one) for one in TORCHAO_DAMAGED],
)
def test_what_is_damaged_or_contradicts_itself_is_one_line(linear, about, damage, message, tmp_path):
    tensors = quantise(tmp_path, linear, about)
    said = {key: value for key, value in damage.items() if key not in ("drop", "tensors")}
    tensors = {key: one for key, one in tensors.items() if key not in damage.get("drop", ())}
    rewrite(tmp_path, tensors | damage.get("tensors", {}), about | said)
    with pytest.raises(EoraLabError, match=message) as caught:
        dict(read_checkpoint(tmp_path).of(tiny_model("llama")).items())
    assert "\n" not in str(caught.value)


def test_scales_of_experts_that_are_no_numbers_are_refused(tmp_path):
    tensors = save_gpt_oss(tmp_path)
    key = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[key] = torch.full_like(tensors[key], 255)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EoraLabError, match=rf"{key} has NaN or Inf"):
        _ = read_checkpoint(tmp_path)["model.layers.0.mlp.experts.1.down_proj"]


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.read and name != "gguf"])
def test_a_dense_folder_is_no_checkpoint(name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(EoraLabError, match=r"quant_method|is no|must be|names no|has neither"):
        read_checkpoint(tmp_path, name)
