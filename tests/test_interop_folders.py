"""Folders that bitsandbytes, torchao and hqq make themselves, against their own dequantisers.

They need an environment of their own: `make interop`.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.compress import CodebookWeight, DenseWeight, GridWeight, HqqWeight
from eora_lab.formats import read_checkpoint
from tests.tiny import compress, edit_json, logits, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens

pytestmark = pytest.mark.interop
PASS = {"rank": 8, "inputs": "original", "progress": False}
Q_PROJ = "model.layers.0.self_attn.q_proj"
BNB = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "NF4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "FP4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "INT8": {"load_in_8bit": True},
}


def bitsandbytes(folder, kind: str, dtype=torch.float32, intermediate_size: int = 128) -> dict[str, torch.Tensor]:
    """Save a model as the library does; what its own functions make of the weights of its modules."""
    import bitsandbytes as bnb

    config = tiny_model("llama").config
    config.intermediate_size = intermediate_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model",
        quantization_config=transformers.BitsAndBytesConfig(**BNB[kind]),
        dtype=dtype,
        device_map="cpu",
    )
    model.save_pretrained(folder / "base")
    truth = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            truth[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            truth[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BNB)
def test_bitsandbytes_is_what_the_library_makes_of_it(kind, dtype, tmp_path):
    truth = bitsandbytes(tmp_path, kind, dtype)
    checkpoint = read_checkpoint(tmp_path / "base")
    assert (
        checkpoint.base.startswith(f"bitsandbytes {kind.split()[0]}")
        and set(checkpoint) == set(truth)
        and len(truth) == 14
    )
    for name, weight in checkpoint.of(load_model(str(save_original(tmp_path)))[0]).items():
        if kind == "INT8":  # it multiplies twice, where a grid does once
            torch.testing.assert_close(weight.dense(), truth[name], rtol=2**-22, atol=0)
            assert isinstance(weight, GridWeight)
        else:
            assert torch.equal(weight.dense(truth[name].dtype), truth[name]) and isinstance(weight, CodebookWeight)


def save_original(folder):
    """The model of `bitsandbytes`, with a tokenizer."""
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


def test_blocks_of_bitsandbytes_that_go_on_in_the_next_row(tmp_path):
    """down_proj has 96 input channels, and blocks 64 weights.

    The library's kernel for the CPU begins a block with every row, which is not how they were made; its own plain code
    does not.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import get_4bit_type

    bitsandbytes(tmp_path, "NF4", intermediate_size=96)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name, weight in read_checkpoint(tmp_path / "base").items():
        packed, scales = tensors[f"{name}.weight"].flatten(), tensors[f"{name}.weight.absmax"]
        code = get_4bit_type("nf4", "cpu")
        truth = _dequantize_4bit_compute(packed, scales, code, 64, weight.shape, torch.float32)
        assert isinstance(weight, DenseWeight if name.endswith("down_proj") else CodebookWeight)
        assert torch.equal(weight.dense(), truth)


@pytest.mark.parametrize("kind", ["NF4 double", "INT8"])
def test_a_mended_bitsandbytes_folder_is_a_run(kind, tmp_path):
    bitsandbytes(tmp_path, kind)
    model, _ = load_model(str(save_original(tmp_path)))
    report = compress(model, tiny_tokens(), weights=read_checkpoint(tmp_path / "base"), **PASS, folder=tmp_path / "run")
    assert all(one.error_after < one.error_before for one in report.layers) and len(report.layers) == 14
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(model, tiny_tokens(2)))


WEIGHT = f"{Q_PROJ}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "tensors", "drop", "said", "message"),
    [
        ("NF4", {}, [STATE], {}, r"lacks the tensor .*quant_state\.bitsandbytes__nf4"),
        ("NF4", {STATE: torch.zeros(3).byte()}, [], {}, "bitsandbytes__nf4 is damaged"),
        (
            "NF4",
            {STATE: torch.tensor(list(b'{"shape": [64, -1], "blocksize": 64}')).byte()},
            [],
            {},
            "sizes that are no",
        ),
        ("NF4", {WEIGHT: torch.zeros(2040, 1).byte()}, [], {}, "weight has 4080 codes, not 4096"),
        ("NF4", {f"{WEIGHT}.absmax": torch.full((64,), torch.nan)}, [], {}, "absmax has NaN or Inf"),
        ("NF4", {f"{WEIGHT}.absmax": torch.ones(63)}, [], {}, "absmax is 63, not 64"),
        ("NF4", {f"{WEIGHT}.quant_map": torch.ones(15)}, [], {}, "quant_map is 15, not 16"),
        ("NF4", {}, [], {"bnb_4bit_quant_type": "fp4"}, r"holds .*bitsandbytes__nf4, which is no tensor"),
        ("NF4", {}, [], {"load_in_8bit": True}, "one of load_in_4bit and load_in_8bit must be true"),
        ("NF4", {}, [], {"new": 1}, r"new \(1\) is not known here"),
        ("INT8", {f"{Q_PROJ}.SCB": torch.ones(3)}, [], {}, "SCB is 3, not 64"),
        ("INT8", {}, [f"{Q_PROJ}.SCB"], {}, rf"({Q_PROJ}\.weight differ|holds {Q_PROJ})"),
        ("INT8", {f"{Q_PROJ}.weight_format": torch.tensor(1).byte()}, [], {}, "weight_format is not 0"),
    ],
)
def test_a_damaged_bitsandbytes_folder_is_one_line(kind, tensors, drop, said, message, tmp_path):
    bitsandbytes(tmp_path, kind)
    file = tmp_path / "base" / "model.safetensors"
    found = {key: one for key, one in load_file(file).items() if key not in drop}
    save_file(found | tensors, file)
    config = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    edit_json(tmp_path / "base" / "config.json", quantization_config=config | said)
    with pytest.raises(EoraLabError, match=message) as caught:
        dict(read_checkpoint(tmp_path / "base").of(load_model(str(save_original(tmp_path)))[0]).items())
    assert "\n" not in str(caught.value)


def torchao(folder, config) -> dict[str, torch.Tensor]:
    """Save a model as torchao does; what its own tensors say."""
    save_tiny(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model",
        quantization_config=transformers.TorchAoConfig(config),
        dtype=torch.bfloat16,
        device_map="cpu",
    )
    model.save_pretrained(folder / "base")
    return {
        name: module.weight.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def torchao_configs() -> dict:
    """Those that save on a CPU, in a layout that is no kernel's."""
    from torchao import quantization as ao

    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "float8": ao.Float8WeightOnlyConfig(),
        "int4": ao.IntxWeightOnlyConfig(torch.int4, granularity=ao.PerGroup(32)),
        "int3": ao.IntxWeightOnlyConfig(
            torch.int3, granularity=ao.PerGroup(32), mapping_type=ao.quant_primitives.MappingType.ASYMMETRIC
        ),
    }


@pytest.mark.parametrize("kind", ["int8", "float8", "int4", "int3"])
def test_torchao_is_what_the_library_makes_of_it(kind, tmp_path):
    truth = torchao(tmp_path, torchao_configs()[kind])
    checkpoint = read_checkpoint(tmp_path / "base")
    assert checkpoint.base.startswith("torchao ") and set(checkpoint) == set(truth)
    for name, weight in checkpoint.of(load_model(str(tmp_path / "model"))[0]).items():
        assert torch.equal(weight.dense(torch.bfloat16), truth[name])
        assert isinstance(weight, CodebookWeight if kind == "float8" else GridWeight)


def test_a_damaged_torchao_folder_is_one_line(tmp_path):
    torchao(tmp_path, torchao_configs()["int4"])
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file), file)  # without its metadata
    with pytest.raises(EoraLabError, match="the metadata of its file do not say what"):
        dict(read_checkpoint(tmp_path / "base"))


def hqq(folder, **how) -> dict[str, torch.Tensor]:
    """Save a model as hqq does, whose layers encode what they are as tensors; what it makes of them itself."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    save_tiny(folder / "model")
    model = tiny_model("llama")
    dtype, truth = how.pop("dtype"), {}
    said = BaseQuantizeConfig(**how)
    for name, module in list(model.model.named_modules(prefix="model")):
        if isinstance(module, torch.nn.Linear):
            made = HQQLinear(module, said, compute_dtype=dtype, device="cpu")
            model.set_submodule(name, made)
            truth[name] = made.dequantize()
    model.config.save_pretrained(folder / "base")
    save_file({key: one.contiguous() for key, one in model.state_dict().items()}, folder / "base" / "model.safetensors")
    edit_json(folder / "base" / "config.json", quantization_config={"quant_method": "hqq", "quant_config": said})
    return truth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1.58, 1])
def test_hqq_is_what_the_library_makes_of_it(bits, axis, dtype, tmp_path):
    truth = hqq(tmp_path, nbits=bits, group_size=32, axis=axis, dtype=dtype)
    checkpoint = read_checkpoint(tmp_path / "base")
    assert checkpoint.base.startswith("HQQ ") and set(checkpoint) == set(truth) and len(truth) == 14
    for name, weight in checkpoint.of(load_model(str(tmp_path / "model"))[0]).items():
        assert torch.equal(weight.dense(dtype), truth[name])
        assert isinstance(weight, HqqWeight if axis == 1 else DenseWeight)


@pytest.mark.parametrize("how", [{"view_as_float": True}, {"group_size": None}, {"group_size": 128}])
def test_other_ways_of_hqq(how, tmp_path):
    truth = hqq(tmp_path, **{"nbits": 3, "group_size": 64, "axis": 1, "dtype": torch.float16} | how)
    for name, weight in read_checkpoint(tmp_path / "base").items():
        assert torch.equal(weight.dense(torch.float16), truth[name])
