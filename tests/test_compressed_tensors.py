"""Checkpoints that the library compressed-tensors makes itself, read bit by bit, and mended."""

import json

import compressed_tensors.compressors as compressors
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.cli import main
from eora_lab.compress import CodebookWeight, GridWeight
from eora_lab.formats import CompressedTensorsCheckpoint, read_checkpoint
from tests.tiny import TEXT, compress, edit_json, logits, save_tiny, tiny_model, tiny_tokens

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
SCHEMES = {
    "W4A16": ("pack-quantized", INT4, None),
    "W4A16 asymmetric": ("pack-quantized", INT4 | {"symmetric": False}, None),
    "W4A16 channel": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False},
        None,
    ),
    "W4A16 tensor": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "tensor"}, None),
    "W3A16": ("pack-quantized", INT4 | {"num_bits": 3, "symmetric": False}, None),
    "W8A16": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, None),
    "W8A16 asymmetric": ("pack-quantized", INT4 | {"num_bits": 8, "symmetric": False}, None),
    "W8A8": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "FP8 tensor": ("float-quantized", FP8 | {"strategy": "tensor"}, DYNAMIC | {"strategy": "tensor", "dynamic": False}),
    "FP8 channel": ("float-quantized", FP8 | {"strategy": "channel"}, DYNAMIC),
    "FP8 block": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [48, 40]}, DYNAMIC),
    "FP8 naive": ("naive-quantized", FP8 | {"strategy": "channel"}, None),
    "NVFP4A16": ("nvfp4-pack-quantized", NVFP4, None),
    "NVFP4": ("nvfp4-pack-quantized", NVFP4, NVFP4 | {"dynamic": "local"}),
    "MXFP4": ("mxfp4-pack-quantized", MXFP4, None),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
PASS = {"rank": 8, "inputs": "original", "progress": False}


def group(**weights) -> dict:
    """config_groups with other weights than INT4, asymmetric, in format pack-quantized."""
    return {"g": {"targets": ["Linear"], "weights": INT4 | {"symmetric": False} | weights}}


def ranges(weight: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of what shares a scale."""
    if args.strategy == "tensor":
        parts = weight.reshape(1, -1)
        return parts.amin(1), parts.amax(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        weight = F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        parts = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    else:
        parts = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    return parts.amin(-1), parts.amax(-1)


def make(
    folder, scheme: str, dtype=torch.bfloat16, targets=("Linear",), ignore=("lm_head",)
) -> dict[str, torch.Tensor]:
    """Save a model as the library does; what the library makes of its own tensors again, by name."""
    layout, weights, activations = SCHEMES[scheme]
    group = {"targets": list(targets), "weights": weights, "input_activations": activations, "format": layout}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=list(ignore), format=layout)
    model = tiny_model("llama").to(dtype)
    apply_quantization_config(model, config)
    schemes = {name: one.quantization_scheme for name, one in model.named_modules() if hasattr(one, "weight_scale")}
    for name, one in schemes.items():
        module, args = model.get_submodule(name), one.weights
        low, high = ranges(module.weight.data, args)
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.data.copy_(generate_gparam(low.amin(), high.amax()))
        scale, zero = calculate_qparams(low, high, args, getattr(module, "weight_global_scale", None))
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tensors = load_file(folder / "model.safetensors")
    library, truth = compressors.BaseCompressor.get_value_from_registry(layout), {}
    for name, one in schemes.items():
        own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        truth[name] = library.decompress(own, one)["weight"].data
    return truth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_read_is_what_the_library_makes_of_it(scheme, dtype, tmp_path):
    truth = make(tmp_path, scheme, dtype)
    checkpoint = read_checkpoint(tmp_path)
    assert isinstance(checkpoint, CompressedTensorsCheckpoint) and set(checkpoint) == set(truth) and len(truth) == 14
    for name, weight in checkpoint.of(tiny_model("llama")).items():
        assert torch.equal(weight.dense(truth[name].dtype), truth[name])
        assert isinstance(weight, GridWeight if SCHEMES[scheme][1]["type"] == "int" else CodebookWeight)
        assert weight.bits == SCHEMES[scheme][1]["num_bits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a Llama in `model`, and checkpoints of it by the names of their schemes."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    for scheme in ("W4A16 asymmetric", "FP8 block", "NVFP4"):
        make(folder / scheme, scheme)
    return folder


@pytest.fixture
def change(made, tmp_path):
    """Copy a checkpoint with tensors and settings changed; returns the copy."""

    def changed(scheme: str, tensors=(), drop=(), **said):
        found = load_file(made / scheme / "model.safetensors")
        found = {key: tensor for key, tensor in found.items() if key not in drop} | dict(tensors)
        save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((made / scheme / "config.json").read_text())
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        edit_json(tmp_path / "config.json", quantization_config=config | said)
        return tmp_path

    return changed


@pytest.mark.parametrize("scheme", ["W4A16 asymmetric", "NVFP4", "FP8 block"])
def test_a_mended_checkpoint_is_a_run(scheme, made, tmp_path):
    model, _ = load_model(str(made / "model"))
    report = compress(model, tiny_tokens(), weights=read_checkpoint(made / scheme), **PASS, folder=tmp_path / "run")
    assert all(layer.error_after < layer.error_before for layer in report.layers) and len(report.layers) == 14
    assert report.base == read_checkpoint(made / scheme).base
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(model, tiny_tokens(2)))


def test_mend_on_the_command_line(made, tmp_path, capsys):
    text = str(made / "text.txt")
    calibration = ["--calibration.source", text, "--calibration.nsamples", "4", "--calibration.seqlen", "32"]
    evaluation = ["--evaluation.perplexity", text, "--evaluation.windows", "2", "--evaluation.window-length", "32"]
    where = [str(made / "NVFP4"), str(tmp_path / "run"), "--model", str(made / "model")]
    main(["mend", *where, "--rank", "8", *calibration, *evaluation])
    assert "compressed-tensors NVFP4 (activations not modelled)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "run" / "report.json").read_text())["layers"]) == 14


def test_groups_that_are_no_neighbours(change):
    """actorder "group", of older versions of the library: W^ = (q - z[g_idx]) * s[g_idx]."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    g_idx = (order // 32).int()
    plain = read_checkpoint(change("W4A16 asymmetric"))[Q_PROJ]
    index, ordered = {f"{Q_PROJ}.weight_g_idx": g_idx}, {"config_groups": group(actorder="group")}
    shuffled = read_checkpoint(change("W4A16 asymmetric", index, **ordered))[Q_PROJ]
    zero, scale = plain.offsets.float()[:, g_idx.long()], plain.scales[:, g_idx.long()]
    assert torch.equal(shuffled.dense(), (plain.codes.float() - zero) * scale)
    untouched = read_checkpoint(change("W4A16 asymmetric", {f"{Q_PROJ}.weight_g_idx": torch.full((64,), -1).int()}))
    assert torch.equal(untouched[Q_PROJ].dense(), plain.dense())
    with pytest.raises(EoraLabError, match="no order of channels, though actorder"):
        _ = read_checkpoint(change("W4A16 asymmetric", **ordered))[Q_PROJ]
    with pytest.raises(EoraLabError, match="groups that are no neighbours, though actorder in"):
        _ = read_checkpoint(change("W4A16 asymmetric", index))[Q_PROJ]


def test_linears_that_are_named_or_ignored(tmp_path):
    ignore = ["lm_head", r"re:.*down_proj", "model.layers.0.mlp.up_proj"]
    truth = make(tmp_path, "W4A16", targets=[r"re:.*mlp\..*"], ignore=ignore)
    found = read_checkpoint(tmp_path).of(tiny_model("llama"))
    assert (
        set(found) == set(truth) == {f"model.layers.{i}.mlp.{n}_proj" for i, n in ((0, "gate"), (1, "gate"), (1, "up"))}
    )


SCALE, PACKED, ZERO = (f"{Q_PROJ}.weight_{kind}" for kind in ("scale", "packed", "zero_point"))
DAMAGED = [
    ("W4A16 asymmetric", {"drop": [PACKED]}, rf"lacks the tensor {PACKED}"),
    ("W4A16 asymmetric", {"drop": [ZERO]}, rf"lacks the tensor {ZERO}"),
    ("W4A16 asymmetric", {"drop": [SCALE]}, rf"(lacks the tensor {Q_PROJ}.weight|holds {Q_PROJ}) .*of"),
    ("W4A16 asymmetric", {"tensors": {SCALE: torch.ones(64, 3)}}, "weight_scale is 64 x 3, not 64 x 2"),
    ("W4A16 asymmetric", {"tensors": {SCALE: torch.full((64, 2), torch.nan)}}, "weight_scale has NaN or Inf"),
    ("W4A16 asymmetric", {"tensors": {PACKED: torch.zeros(64, 8)}}, "weight_packed is float32, not int32"),
    ("W4A16 asymmetric", {"tensors": {f"{Q_PROJ}.weight_shape": torch.tensor([64, 72])}}, "is 64 x 8, not 64 x 9"),
    (
        "W4A16 asymmetric",
        {"tensors": {f"{Q_PROJ}.weight_g_idx": torch.zeros(64).int()}},
        "groups of other sizes than 32",
    ),
    ("W4A16 asymmetric", {"tensors": {f"{Q_PROJ}.extra": torch.ones(1)}}, r"holds .*q_proj\.extra, which is no tensor"),
    ("W4A16 asymmetric", {"config_groups": group(num_bits=8)}, "weight_packed is 64 x 8, not 64 x 16"),
    ("W4A16 asymmetric", {"config_groups": group(symmetric=True)}, "though config.json says symmetric"),
    ("W4A16 asymmetric", {"config_groups": group(group_size=16)}, "weight_scale is 64 x 2, not 64 x 4"),
    ("W4A16 asymmetric", {"config_groups": group(strategy="token")}, "strategy 'token' is not read"),
    (
        "W4A16 asymmetric",
        {"config_groups": group(type="float")},
        "4 bits of float, .* in format pack-quantized are not",
    ),
    ("W4A16 asymmetric", {"config_groups": group(dynamic=True)}, "dynamic True is not read"),
    ("W4A16 asymmetric", {"config_groups": group(rotated=True)}, r"rotated \(True\) is not known here"),
    ("W4A16 asymmetric", {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 must be names with values"),
    ("W4A16 asymmetric", {"config_groups": {}}, "names no scheme"),
    ("W4A16 asymmetric", {"config_groups": {"g": {"targets": ["re:("], "weights": INT4}}}, "is no regular expression"),
    (
        "W4A16 asymmetric",
        {"config_groups": {"g": {"targets": ["x"], "weights": INT4}}},
        "none of config_groups say how",
    ),
    (
        "W4A16 asymmetric",
        {"config_groups": group() | {"h": {"targets": ["Linear"], "weights": INT4}}},
        "2 of config_group",
    ),
    ("W4A16 asymmetric", {"ignore": [Q_PROJ]}, "q_proj is quantised, though `ignore`"),
    ("W4A16 asymmetric", {"quantization_status": "frozen"}, "quantization_status 'frozen' is not read"),
    ("W4A16 asymmetric", {"format": "marlin-24", "config_groups": group()}, "in format marlin-24 are not read"),
    (
        "W4A16 asymmetric",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "weights with a mask of their own are not",
    ),
    ("W4A16 asymmetric", {"transform_config": {"config_groups": {"R1": {}}}}, "weights in another basis"),
    ("W4A16 asymmetric", {"new_setting": 7}, r"new_setting \(7\) is not known here"),
    ("FP8 block", {"drop": [SCALE]}, rf"{Q_PROJ}\.weight"),
    ("FP8 block", {"tensors": {SCALE: torch.ones(1, 1)}}, "weight_scale is 1 x 1, not 2 x 2"),
    (
        "FP8 block",
        {"tensors": {f"{Q_PROJ}.weight": torch.full((64, 64), 127).byte().view(torch.float8_e4m3fn)}},
        r"q_proj\.weight has NaN or Inf",
    ),
    ("NVFP4", {"drop": [f"{Q_PROJ}.weight_global_scale"]}, "lacks the tensor .*weight_global_scale"),
    ("NVFP4", {"tensors": {f"{Q_PROJ}.weight_global_scale": torch.zeros(1)}}, "weight_global_scale is 0"),
    ("NVFP4", {"tensors": {SCALE: torch.full((64, 4), 255).byte().view(torch.float8_e4m3fn)}}, "weight_scale has NaN"),
]


@pytest.mark.parametrize(("scheme", "damage", "message"), DAMAGED)
def test_what_is_damaged_or_contradicts_itself_is_one_line(scheme, damage, message, change):
    with pytest.raises(EoraLabError, match=message) as caught:
        dict(read_checkpoint(change(scheme, **damage)).of(tiny_model("llama")).items())
    assert "\n" not in str(caught.value)


def test_files_that_are_damaged_and_models_that_are_others(change):
    folder = change("NVFP4")
    with pytest.raises(EoraLabError, match=r"the values of model\.embed_tokens\.weight differ"):
        read_checkpoint(folder).of(tiny_model("llama", seed=1))
    with pytest.raises(EoraLabError, match="its model_type is llama, that of the model qwen2"):
        read_checkpoint(folder).of(tiny_model("qwen2"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EoraLabError, match=r"model\.safetensors is missing or damaged"):
        read_checkpoint(folder)
