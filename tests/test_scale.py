"""What the bench of large models does beside running commands: it kills, compares, records, and knows the shapes."""

import subprocess
import sys
import time

import pandas
import pytest

from docs import scale
from docs.predict import skeleton
from docs.run_files import differing
from docs.scale_models import LINEARS, Shape
from eora_lab import load_model
from tests.tiny import SMALL, compress, save_tiny, tiny_tokens

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is of files")
LLAMA_3_8B = Shape(hidden=4096, ffn=14336, blocks=1, kv_heads=8, vocabulary=128256)


def test_the_shape_of_llama_3_8b_has_its_parameters():
    model = skeleton(LLAMA_3_8B.config)
    sizes = {name: LLAMA_3_8B.size(name) for name in LINEARS}
    assert {name: tuple(model.get_submodule(f"model.layers.0.{name}").weight.shape) for name in LINEARS} == sizes
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(p.numel() for p in model.parameters()) + 31 * block == 8_030_261_248


@LINUX
def test_a_process_is_killed_once_it_has_come_far_enough(tmp_path):
    there = tmp_path / "there"
    program = f"import pathlib, time; pathlib.Path({str(there)!r}).touch(); time.sleep(60)"

    def reached() -> bool:  # and was looked at
        return there.exists() and time.time() > there.stat().st_mtime + 0.2

    found = scale.measure([sys.executable, "-c", program], None, reached)
    assert found["seconds"] < 60 and 0 < found["anonymous"] < found["peak"]
    with pytest.raises(subprocess.CalledProcessError):
        scale.measure([sys.executable, "-c", ""], None, lambda: False)  # it ended before
    with pytest.raises(subprocess.CalledProcessError):
        scale.measure([sys.executable, "-c", "raise SystemExit(3)"], None)


def test_two_runs_differ_in_what_is_damaged_alone(tmp_path):
    save_tiny(tmp_path / "model")
    for name in ("one", "other"):
        compress(load_model(tmp_path / "model")[0], tiny_tokens(), folder=tmp_path / name, **SMALL)
    assert differing(tmp_path / "one", tmp_path / "other") == []
    block = tmp_path / "other" / "blocks" / "001.safetensors"
    whole = bytearray(block.read_bytes())
    whole[-1] ^= 1
    block.write_bytes(whole)
    (tmp_path / "other" / "more").touch()
    assert differing(tmp_path / "one", tmp_path / "other") == ["blocks/001.safetensors", "more"]


def test_a_record_has_one_row_for_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "RECORD", tmp_path / "scale.csv")
    settings = dict.fromkeys(scale.SETTINGS, 1)
    for row in (settings | {"seconds": 3}, settings | {"blocks": 2, "seconds": 5}, settings | {"seconds": 4}):
        scale.keep(pandas.DataFrame([row]))
    found = pandas.read_csv(tmp_path / "scale.csv")
    assert sorted(found["seconds"]) == [4, 5]


def test_half_of_the_blocks_are_awaited_and_some_time(tmp_path):
    (tmp_path / "blocks").mkdir()
    soon, late = (scale.middle(tmp_path, blocks=4, seconds=seconds) for seconds in (-1, 1000))
    (tmp_path / "blocks" / "000.safetensors").touch()
    assert not soon()
    (tmp_path / "blocks" / "001.safetensors").touch()
    assert soon() and not late()
