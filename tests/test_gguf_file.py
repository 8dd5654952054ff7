"""GGUF files written: W^ of a run in the place of other linears, all else as it was."""

import gguf
import numpy as np
import pytest
import torch

from eora_lab import load_model, load_run
from eora_lab.cli import main
from eora_lab.compress import GgufWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats import GgufCheckpoint, write_gguf
from eora_lab.layer.linear import compensated
from tests.gguf_files import model_of
from tests.gguf_files import write_gguf as write_base
from tests.test_expert_adapters import mixture
from tests.tiny import compress, save_tiny, tiny_model, tiny_tokens

GRIDS = {"q4_0": "Q4_0", "q8_0": "Q8_0", "mxfp4": "MXFP4"}


def contents(path) -> tuple[dict, dict]:
    """Fields, and tensors with their types."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in reader.tensors}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_grid_of_gguf_is_read_back_as_it_was(kind, grid, tmp_path):
    write_base(tmp_path / "f32.gguf", tiny_model(kind))
    model, _ = load_model(save_tiny(tmp_path / "model", kind))
    original, _ = load_model(tmp_path / "model")
    compress(model, tiny_tokens(), "rtn", bits=None, grid=grid, method="none", rank=0, progress=False)
    assert GRIDS[grid] in write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "f32.gguf")
    read = GgufCheckpoint(tmp_path / "out.gguf").of(original)
    layers = compensated(model)
    assert read.keys() == layers.keys()
    for name, layer in layers.items():
        assert isinstance(read[name], GgufWeight) and read[name].type == GRIDS[grid]
        assert torch.equal(read[name].dense(), layer.compressed.dense())
    (before, old), (after, new) = contents(tmp_path / "f32.gguf"), contents(tmp_path / "out.gguf")
    assert {key: said for key, said in after.items() if key != "general.file_type"} == before
    assert old.keys() == new.keys()
    for name, (type_, data) in new.items():
        if type_ != GRIDS[grid]:
            assert type_ == old[name][0] and np.array_equal(data, old[name][1])


@pytest.mark.parametrize(("kind", "type_"), [("llama", "Q4_0"), ("qwen2", "Q4_1"), ("llama", "Q5_0")])
def test_a_file_that_was_rounded_again_keeps_its_scales_and_all_else(kind, type_, tmp_path, capsys):
    """By commands: mend --reround --method none, export --format gguf."""
    write_base(tmp_path / "base.gguf", tiny_model(kind), lambda name: type_ if name.startswith("blk.") else "F16")
    save_tiny(tmp_path / "model", kind)
    options = ["--model", str(tmp_path / "model"), "--calibration.nsamples", "8", "--calibration.seqlen", "32"]
    options += ["--no-evaluate", "--inputs", "original", "--method", "none"]
    for run, more in (("same", []), ("again", ["--reround"])):
        assert main(["mend", str(tmp_path / "base.gguf"), str(tmp_path / run), *more, *options]) == 0
        assert main(["export", str(tmp_path / run), str(tmp_path / f"{run}.gguf"), "--format", "gguf"]) == 0
    files = {name: contents(tmp_path / f"{name}.gguf") for name in ("base", "same", "again")}
    for label in ("same", "again"):
        fields, tensors = files[label]
        assert fields == files["base"][0] | {"general.file_type": fields["general.file_type"]}
        for name, (found, data) in files["base"][1].items():
            assert tensors[name][0] == found
            if label == "same" or found != type_:
                assert np.array_equal(tensors[name][1], data)
    mend = ["mend", str(tmp_path / "base.gguf"), str(tmp_path / "both"), "--reround", "--rank", "4", *options[:-2]]
    assert main(mend) == 0
    assert main(["adapter", "export", str(tmp_path / "both"), str(tmp_path / "a.gguf"), "--format", "gguf"]) == 0
    said = capsys.readouterr().out  # the file that was mended has other codes than those the adapter belongs to
    assert "llama-server -m BASE.gguf" in said and "base.gguf --lora" not in said
    assert "BASE is the compressed model, which `eora-lab export" in (tmp_path / "a.md").read_text()
    model, _, report = load_run(tmp_path / "again")
    read = GgufCheckpoint(tmp_path / "again.gguf").of(load_model(tmp_path / "model")[0])
    for name, layer in compensated(model).items():
        assert torch.equal(read[name].dense(), layer.compressed.dense())
    assert all(layer.error_before <= layer.error_given for layer in report.layers)
    assert sum(layer.error_before for layer in report.layers) < 0.9 * sum(layer.error_given for layer in report.layers)
    base = tmp_path / "base.gguf"
    base.rename(tmp_path / "moved.gguf")
    export = ["export", str(tmp_path / "again"), str(tmp_path / "third.gguf"), "--format", "gguf"]
    assert main(export) == 1  # the file that was mended is gone
    assert main([*export, "--like", str(tmp_path / "moved.gguf")]) == 0


def test_experts_are_written_as_the_file_has_them(tmp_path):
    plain = model_of("mixtral")
    write_base(tmp_path / "f32.gguf", plain)
    plain.save_pretrained(tmp_path / "model")
    model = mixture("mixtral")
    from eora_lab.model.unfold import unfold

    unfold(model)
    original = mixture("mixtral")
    unfold(original)
    compress(model, tiny_tokens(), "rtn", bits=None, grid="q8_0", method="none", rank=0, progress=False)
    write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "f32.gguf")
    read = GgufCheckpoint(tmp_path / "out.gguf").of(original)
    for name, layer in compensated(model).items():
        assert torch.equal(read[name].dense(), layer.compressed.dense())


def test_what_cannot_be_written_is_refused(tmp_path):
    write_base(tmp_path / "f32.gguf", tiny_model("llama"))
    write_base(tmp_path / "other.gguf", tiny_model("qwen2"))
    model, _ = load_model(save_tiny(tmp_path / "model"))
    with pytest.raises(EoraLabError, match="not compressed"):
        write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "f32.gguf")
    compress(model, tiny_tokens(), "rtn", bits=4, method="none", rank=0, progress=False)
    with pytest.raises(EoraLabError, match="stored as grid, and no GGUF type holds that"):
        write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "f32.gguf")
    model, _ = load_model(tmp_path / "model")
    compress(model, tiny_tokens(), "rtn", bits=None, grid="q4_0", method="none", rank=0, progress=False)
    with pytest.raises(EoraLabError, match="is of another model"):
        write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "other.gguf")
    with pytest.raises(EoraLabError, match=r"cannot read .*model\.safetensors"):
        write_gguf(tmp_path / "out.gguf", model, like=tmp_path / "model" / "model.safetensors")
    assert not (tmp_path / "out.gguf").exists()
