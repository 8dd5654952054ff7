"""Our GPTQ checkpoints in the real GPTQModel, and its checkpoints in ours. Optional: it needs a Python of its own.

python -m venv gptqmodel && gptqmodel/bin/pip install gptqmodel
EORA_LAB_GPTQMODEL=gptqmodel/bin/python pytest tests/test_gptqmodel.py
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eora_lab import load_model
from eora_lab.compress import rtn
from eora_lab.formats.gptq_checkpoint import GptqCheckpoint, write_checkpoint
from tests.tiny import compress, tiny_model, tiny_tokenizer

PYTHON = os.environ.get("EORA_LAB_GPTQMODEL")
PEER = Path(__file__).with_name("gptqmodel_peer.py")
TOKENS = torch.arange(3, 67).view(2, 32)

pytestmark = pytest.mark.skipif(not PYTHON, reason="EORA_LAB_GPTQMODEL names no Python that has gptqmodel")

OURS = {
    "v1-4-sym": ("gptq", {"bits": 4, "sym": True}),
    "v1-3-sym": ("gptq", {"bits": 3, "sym": True}),
    "v1-8-sym-desc_act": ("gptq", {"bits": 8, "sym": True}),
    "v2-4-asym": ("gptq_v2", {"bits": 4, "sym": False}),
    "v2-3-asym": ("gptq_v2", {"bits": 3, "sym": False}),
    "v2-2-asym-desc_act": ("gptq_v2", {"bits": 2, "sym": False}),
    "v2-4-sym-row": ("gptq_v2", {"bits": 4, "sym": True, "group_size": -1}),
}
THEIRS = {
    "their-v1-4-sym": {"bits": 4, "sym": True, "desc_act": False},
    "their-v1-4-sym-desc_act": {"bits": 4, "sym": True, "desc_act": True},
    "their-v1-4-asym": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq"},
    "their-v2-3-asym": {"bits": 3, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "their-v2-8-asym-desc_act": {"bits": 8, "sym": False, "desc_act": True, "format": "gptq_v2"},
}


def run_peer(folder: Path, *arguments) -> None:
    """Run the script in `folder`, where GPTQModel leaves its logs."""
    done = subprocess.run([PYTHON, PEER, *map(str, arguments)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def write_ours(folder: Path, checkpoint_format: str, shuffled: bool, grid: dict) -> None:
    """A checkpoint of the tiny Llama; shuffled: groups take channels from all over."""
    model, tokenizer = load_model(folder.parent / "model")
    grid = {"group_size": 32, "zero_point": "integer", "scale_dtype": "float16"} | grid
    weights = {}
    for seed, (name, linear) in enumerate((n, m) for n, m in model.named_modules() if n.endswith("_proj")):
        in_features = linear.in_features
        order = torch.arange(in_features)
        if shuffled:
            order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
        weight = rtn(linear.weight[:, order], None, **grid)
        if shuffled:  # the codes back in place; channel order[i] belongs to the group of place i
            back = order.argsort()
            weight = replace(weight, codes=weight.codes[:, back], g_idx=(back // grid["group_size"]).to(torch.int32))
        weights[name] = weight
    compress(model, TOKENS, weights=weights, method="none", rank=0, inputs="original", progress=False)
    write_checkpoint(folder, model, tokenizer, checkpoint_format=checkpoint_format)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, checkpoints of both makers, and what GPTQModel reads in each (`read.safetensors`)."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, (checkpoint_format, grid) in OURS.items():
        write_ours(folder / name, checkpoint_format, name.endswith("desc_act"), grid)
    theirs = {str(folder / name): settings | {"group_size": 32} for name, settings in THEIRS.items()}
    run_peer(folder, "make", folder / "model", json.dumps(theirs))
    run_peer(folder, "read", folder / "read.safetensors", *(folder / name for name in (*OURS, *THEIRS)))
    return folder


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_both_read_the_same_weights_and_logits(folder, name):
    checkpoint = GptqCheckpoint(folder / name)
    assert checkpoint.config.desc_act == name.endswith("desc_act")
    assert checkpoint.config.checkpoint_format == ("gptq" if "v1" in name else "gptq_v2")
    read = {k.split("/")[1]: t for k, t in load_file(folder / "read.safetensors").items() if k.startswith(f"{name}/")}
    model, _ = load_model(folder / "model")
    checkpoint.check_model(model)
    compress(model, TOKENS, weights=checkpoint, method="none", rank=0, inputs="original", progress=False)
    for module in checkpoint:  # GPTQModel computes (q - z) * s in float16: our exact product, rounded
        assert torch.equal(checkpoint[module].dense().half(), read[module]), module
    with torch.no_grad():
        ours = model(TOKENS).logits
    torch.testing.assert_close(read["logits"].float(), ours, rtol=1e-2, atol=5e-3)  # its activations are float16
    with torch.no_grad():
        unquantised = load_model(folder / "model")[0](TOKENS).logits
    assert (ours - unquantised).abs().max() > 5e-3 or checkpoint.config.bits == 8  # the tolerance tells them apart
