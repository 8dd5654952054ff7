"""HQQ folders, laid down here as the library hqq lays them down, by its formula; `test_interop_folders` has hqq."""

import json

import pytest
import torch

from eora_lab import EoraLabError, load_model, load_run
from eora_lab.compress import DenseWeight, HqqWeight, reround, tagged_state_dict, weight_from_state_dict
from eora_lab.formats import HqqCheckpoint, read_checkpoint
from tests.folders import HQQ, PACKINGS, Q_PROJ, hqq, letters, quantise, rewrite
from tests.test_reround import layer, losses
from tests.tiny import compress, logits, save_tiny, tiny_model, tiny_tokens


def save(folder, **how) -> dict[str, torch.Tensor]:
    """The tensors of a tiny model's folder; W^ by the formula under `NAME.true`."""
    found = quantise(folder, lambda weight: hqq(weight, **how), HQQ)
    rewrite(folder, {key: one for key, one in found.items() if not key.endswith(".true")}, HQQ)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", PACKINGS)
def test_hqq_is_code_minus_zero_times_scale(bits, axis, dtype, tmp_path):
    tensors = save(tmp_path, bits=bits, axis=axis, dtype=dtype)
    checkpoint = read_checkpoint(tmp_path)
    assert isinstance(checkpoint, HqqCheckpoint) and checkpoint.base == f"HQQ {bits}-bit g32" and len(checkpoint) == 14
    for name, weight in checkpoint.of(tiny_model("llama")).items():
        assert torch.equal(weight.dense(dtype), tensors[f"{name}.true"])
        assert isinstance(weight, HqqWeight if axis == 1 else DenseWeight)


@pytest.mark.parametrize("bits", [3, 4])
def test_bytes_that_look_like_floats_and_groups_that_go_on_in_the_next_row(bits, tmp_path):
    """64 or 128 input channels, groups of 128, and codes seen as float16, of which some are NaN."""
    tensors = save(tmp_path, bits=bits, size=128, as_float=True)
    for name, weight in read_checkpoint(tmp_path).items():
        assert torch.equal(weight.dense(torch.float16), tensors[f"{name}.true"])
        assert isinstance(weight, HqqWeight if name.endswith("down_proj") else DenseWeight)


def test_a_mended_folder_is_a_run_of_as_many_bits(tmp_path):
    save(tmp_path / "base", bits=3)
    model, _ = load_model(save_tiny(tmp_path / "model"))
    checkpoint = read_checkpoint(tmp_path / "base")
    settings = {"rank": 8, "inputs": "original", "progress": False, "folder": tmp_path / "run"}
    report = compress(model, tiny_tokens(), weights=checkpoint, **settings)
    assert report.base == "HQQ 3-bit g32" and all(one.error_after < one.error_before for one in report.layers)
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(model, tiny_tokens(2)))
    weight = checkpoint[Q_PROJ]
    state = tagged_state_dict(weight)
    rows = {key: one if key in ("kind", *weight.whole) else one[3:7] for key, one in state.items()}
    assert torch.equal(weight_from_state_dict(rows).dense(), weight.dense()[3:7])
    assert 8 * weight.nbytes / weight.shape.numel() == 3 + 2 * 16 / 32


def test_codes_are_rounded_again_on_their_own_grid(tmp_path):
    weight, statistics = layer(64, 64, seed=0)
    model = tiny_model("llama")
    model.get_submodule(Q_PROJ).weight.data = weight
    found = quantise(tmp_path, lambda weight: hqq(weight, bits=3), HQQ, model)
    rewrite(tmp_path, {key: one for key, one in found.items() if not key.endswith(".true")}, HQQ)
    base = read_checkpoint(tmp_path)[Q_PROJ]
    made = reround(weight, statistics, base)
    lost, was = (losses(weight - one.dense(), statistics) for one in (made, base))
    assert (lost <= was * (1 + 1e-4)).all() and lost.sum() < 0.8 * was.sum()
    assert torch.equal(made.scales, base.scales) and torch.equal(made.zeros, base.zeros) and made.codes.max() < 8


DAMAGED = [
    ({f"{Q_PROJ}.W_q": None}, rf"lacks the tensor {Q_PROJ}\.weight"),
    ({f"{Q_PROJ}.zero": None}, rf"lacks the tensor {Q_PROJ}\.zero"),
    ({f"{Q_PROJ}.shape": None}, rf"lacks the tensor {Q_PROJ}\.shape"),
    ({f"{Q_PROJ}.W_q": torch.zeros(64, 32).int()}, "W_q is int32, not uint8"),
    ({f"{Q_PROJ}.W_q": torch.zeros(63, 32).byte()}, "W_q holds 126 x 32 codes, not 128 x 32"),
    ({f"{Q_PROJ}.W_q": torch.zeros(64, 31).byte()}, "W_q holds 128 x 31 codes, not 128 x 32"),
    ({f"{Q_PROJ}.scale": torch.ones(127, 1).half()}, "scale is 127 x 1, not 128 x 1"),
    ({f"{Q_PROJ}.scale": torch.full((128, 1), torch.nan).half()}, "scale has NaN or Inf"),
    ({f"{Q_PROJ}.zero": torch.ones(128, 1)}, "zero is float32, not float16"),
    ({f"{Q_PROJ}.shape": torch.tensor([64, 63])}, "W_q holds 128 x 32 codes, not 126 x 32"),
    ({f"{Q_PROJ}.shape": torch.tensor([-64, -64])}, r"cannot have shape \[-64, -64\]"),
    ({f"{Q_PROJ}.axis": torch.tensor(2).int()}, "groups of 32 and axis 2"),
    ({f"{Q_PROJ}.group_size": torch.tensor(0).int()}, "groups of 0"),
    ({f"{Q_PROJ}.quant_zero": torch.tensor(1).byte()}, "has quant_zero 1, which is not read, only 0"),
    (
        {f"{Q_PROJ}.view_as_float": torch.tensor(1).byte(), f"{Q_PROJ}.W_q": torch.zeros(64, 16)},
        "W_q is no matrix of torch.float16, though view_as_float is 1",
    ),
    ({f"{Q_PROJ}.packing": letters("5bit_u8")}, "packing '5bit_u8' of .* is not read, only 8bit_u8"),
    ({f"{Q_PROJ}.compute_dtype": letters("torch.int8")}, "compute_dtype of .* is 'torch.int8', not one of"),
    ({f"{Q_PROJ}.zero_scale": torch.ones(2, 128, 1)}, "zero_scale, which is no tensor of"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_what_is_damaged_is_one_line(changes, message, tmp_path):
    tensors = save(tmp_path) | changes
    rewrite(tmp_path, {k: one for k, one in tensors.items() if one is not None and not k.endswith(".true")}, HQQ)
    with pytest.raises(EoraLabError, match=message) as caught:
        dict(read_checkpoint(tmp_path).of(tiny_model("llama")).items())
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_and_a_stranger_named(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": HQQ | {"rotation": 1}}))
    with pytest.raises(EoraLabError, match=r"rotation \(1\) is not known here"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "qmodel.pt")
    with pytest.raises(EoraLabError, match=r"qmodel\.pt is a pickle, .* save_to_safetensors"):
        read_checkpoint(tmp_path)
