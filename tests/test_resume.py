"""Runs that end in the middle, however they do: what was done stays, damage is told, the result is the same."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from docs.run_files import contents
from eora_lab import EoraLabError
from eora_lab.cli import main
from eora_lab.compress import QUANTISERS
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe
from tests.test_stream import Model
from tests.tiny import SMALL, compress, deep_model, full_disk, logits, save_tiny, tiny_model, tiny_tokens

LAYERS = 7  # linears of a block
INPUTS = [{}, {"inputs": "original"}, {"inputs": "drift", "held_out": 0.34}, {"true_sequential": True}]


class Stop(Exception):
    pass


@contextmanager
def stopping(monkeypatch, calls: int) -> Iterator[None]:
    """Within this context, the compressor `rtn` stops a run at its call number `calls`."""
    rtn, seen = QUANTISERS["rtn"], []

    def stops(weight, statistics, **settings):
        seen.append(1)
        if len(seen) == calls:
            raise Stop
        return rtn(weight, statistics, **settings)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setitem(QUANTISERS, "rtn", stops)
        yield


def passes(module: nn.Module) -> list[int]:
    """Grows by one whenever a mini-batch of several sequences, as those of a pass are, goes through a module."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _module, args: seen.append(1) if len(args[0]) > 1 else None)
    return seen


@pytest.mark.parametrize("settings", INPUTS)
def test_hidden_states_on_disk_give_what_those_in_memory_give(settings, tmp_path):
    for name, where in (("memory", {}), ("disk", {"hidden_states": "disk"})):
        compress(deep_model(3), tiny_tokens(), **SMALL, **settings, **where, folder=tmp_path / name)
    assert contents(tmp_path / "memory") == contents(tmp_path / "disk")
    assert not (tmp_path / "disk" / "hidden").exists()


@pytest.mark.parametrize("settings", INPUTS)
@pytest.mark.parametrize("on_disk", [True, False])
def test_finished_blocks_are_not_run_again_where_hidden_states_were_kept(settings, on_disk, tmp_path, monkeypatch):
    own = SMALL | settings | {"hidden_states": "disk" if on_disk else "memory"}
    compress(deep_model(4), tiny_tokens(), **own, folder=tmp_path / "whole")
    blocks = 2 * LAYERS * (2 if "held_out" in settings else 1)  # two of them done; with each share of a drift
    with stopping(monkeypatch, blocks + 3 - (LAYERS if "held_out" in settings else 0)):
        compress(deep_model(4), tiny_tokens(), **own, folder=tmp_path / "run")
    assert len(list((tmp_path / "run" / "blocks").iterdir())) == 2
    assert (tmp_path / "run" / "hidden").exists() == on_disk
    model = deep_model(4)
    first, last = (passes(model.model.layers[i].input_layernorm) for i in (0, 3))
    compress(model, tiny_tokens(), **own, folder=tmp_path / "run")
    assert last and bool(first) != on_disk
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_finished_run_is_loaded_without_running_the_model(tmp_path):
    compress(deep_model(3), tiny_tokens(), **SMALL, folder=tmp_path / "run")
    model = deep_model(3)
    seen = passes(model.model.layers[0].input_layernorm)
    compress(model, tiny_tokens(), **SMALL, folder=tmp_path / "run")
    assert not seen
    assert torch.equal(logits(model, tiny_tokens(2)), logits(load_again(tmp_path / "run"), tiny_tokens(2)))


def load_again(run: Path) -> nn.Module:
    model = deep_model(3)
    compress(model, tiny_tokens(), **SMALL, folder=run)
    return model


def test_hidden_states_of_one_of_two_streams_alone_are_not_gone_on_from(tmp_path, monkeypatch):
    """As where a run ends after those of the compressed model are written, and before those of the original are."""
    own = SMALL | {"hidden_states": "disk", "inputs": "drift", "held_out": 0.34}
    compress(deep_model(3), tiny_tokens(), **own, folder=tmp_path / "whole")
    with stopping(monkeypatch, 3 * LAYERS + 3):  # in the last block
        compress(deep_model(3), tiny_tokens(), **own, folder=tmp_path / "run")
    (tmp_path / "run" / "hidden" / "original" / "002" / "00001.safetensors").unlink()
    compress(deep_model(3), tiny_tokens(), **own, folder=tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_damaged_hidden_states_are_told_and_made_anew(tmp_path, monkeypatch):
    own = SMALL | {"hidden_states": "disk"}
    compress(deep_model(4), tiny_tokens(), **own, folder=tmp_path / "whole")
    with stopping(monkeypatch, 2 * LAYERS + 3):
        compress(deep_model(4), tiny_tokens(), **own, folder=tmp_path / "run")
    second = tmp_path / "run" / "hidden" / "002" / "00001.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match=r"00001\.safetensors is damaged .*: finished blocks are run again"):
        compress(deep_model(4), tiny_tokens(), **own, folder=tmp_path / "run")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_blocks_that_hand_each_other_more_are_run_again(tmp_path, monkeypatch):
    own = SMALL | {"hidden_states": "disk", "rank": 2, "only": "up"}

    def fresh() -> nn.Module:
        model = Model("hands on more")
        model.config = tiny_model("llama").config  # of which a folder keeps a digest
        model.dtype = torch.float32
        return model

    compress(fresh(), tiny_tokens(), **own, folder=tmp_path / "whole")
    with stopping(monkeypatch, 3):  # in the last block
        compress(fresh(), tiny_tokens(), **own, folder=tmp_path / "run")
    model = fresh()
    seen = passes(model.blocks[0].down)
    compress(model, tiny_tokens(), **own, folder=tmp_path / "run")
    assert seen and contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_hidden_states_on_disk_need_a_folder():
    with pytest.raises(EoraLabError, match="lie in the folder of a run: give folder="):
        compress(tiny_model("llama"), tiny_tokens(), **SMALL, hidden_states="disk")


OTHER = {  # setting -> another value, and what has to go with it
    "compressor": {"compressor": "gptq"},
    "bits": {"bits": 4},
    "group_size": {"group_size": 16},
    "grid": {"grid": "nf4", "bits": None, "group_size": None},
    "sym": {"sym": True},
    "mse": {"mse": True},
    "zero_point": {"zero_point": "integer"},
    "scale_dtype": {"scale_dtype": "float16"},
    "sparsity": {"compressor": "magnitude", "sparsity": "2:4"},
    "desc_act": {"desc_act": False},
    "method": {"method": "svd"},
    "rank": {"rank": 4},
    "factor_bits": {"factor_bits": 4},
    "refit": {"refit": False},
    "shrink": {"shrink": True, "held_out": 0.34},
    "labels": {"labels": "text"},
    "inputs": {"inputs": "original"},
    "true_sequential": {"true_sequential": True},
    "held_out": {"held_out": 0.34},
    "distil": {"distil": True, "held_out": 0.34},
    "rounds": {"rounds": 2},
    "shared_factors": {"shared_factors": True},
    "preserve": {"preserve": True},
    "skip": {"skip": "o_proj"},
    "only": {"only": "o_proj"},
    "keep_first": {"keep_first": 1},
    "keep_last": {"keep_last": 1},
    "ranks": {"ranks": {"model.layers.0.self_attn.q_proj": 4}},
    "budget": {"ranks": Budget("relative")},
    "source": {"notes": {"source": "c4", "seed": 0}},
    "seed": {"notes": {"source": "arc", "seed": 1}},
}
NOTES = {"source": "arc", "seed": 0}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run."""
    place = tmp_path_factory.mktemp("begun") / "run"
    compress(tiny_model("llama"), tiny_tokens(), **SMALL, notes=NOTES, folder=place)
    return place


def test_every_setting_has_another_value_here():
    assert {field.name for field in fields(Recipe)} <= OTHER.keys()


@pytest.mark.parametrize("setting", OTHER)
def test_a_run_of_other_settings_is_refused_with_the_difference_named(setting, begun):
    own, before = {"notes": NOTES} | SMALL | OTHER[setting], contents(begun)
    with pytest.raises(EoraLabError, match=r"holds another run \(.* was .*, now .*\): choose another") as caught:
        compress(tiny_model("llama"), tiny_tokens(), **own, folder=begun)
    assert f"{setting} was" in str(caught.value)
    assert contents(begun) == before


def test_a_damaged_block_is_told_in_one_line_and_made_again(sharded, capsys):
    block = Path("run/blocks/000.safetensors")
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(
        UserWarning, match="000.safetensors is damaged .its checksum does not agree.: it was moved"
    ) as told:
        assert command("run") == 0
    (line,) = [
        warnings.formatwarning(one.message, one.category, "file.py", 1) for one in told if "damaged" in str(one.message)
    ]
    assert line.startswith("warning: run/blocks/000.safetensors is damaged") and line.count("\n") == 1
    found = contents(Path("run"))
    assert found.pop("aside/000.safetensors")
    assert found == contents(Path("whole"))


# --- machines and files that fail ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A folder, which is the current one, with a model in shards; a run of it that was stopped in its last block; and
    the same run, undisturbed."""
    monkeypatch.chdir(tmp_path)
    save_tiny("model", max_shard_size="100KB")
    assert command("whole") == 0
    with stopping(monkeypatch, LAYERS + 3):
        command("run")
    return tmp_path


def command(run: str) -> int:
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    text = ["--calibration.source", "text.txt", "--calibration.nsamples", "6", "--calibration.seqlen", "32"]
    settings = ["--compressor", "rtn", "--rank", "4", "--group-size", "32", "--bits", "3", "--no-evaluate"]
    return main(["compress", run, "--model", "model", "--hidden-states", "disk", *settings, *text])


def a_shard() -> Path:
    return sorted(Path("model").glob("model-*.safetensors"))[1]


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1000])


def change(**made) -> None:
    """Change the first matrix of a shard."""
    shard = a_shard()
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    if "value" in made:
        tensors[name][1, 1] = made["value"]
    else:
        tensors[name] = tensors[name].to(made["dtype"])
    save_file(tensors, shard, {"format": "pt"})


DAMAGE = {
    "truncated": (lambda: cut(a_shard()), "model has a damaged weight file model-00002-of-"),
    "gone": (lambda: a_shard().unlink(), "model lacks the weight file model-00002-of-"),
    "NaN": (lambda: change(value=torch.nan), "holds NaN or Inf"),
    "8-bit": (lambda: change(dtype=torch.int8), "weights of that type are quantised"),
    "another dtype": (lambda: change(dtype=torch.bfloat16), r"run holds another run (weights was"),
    "other numbers": (lambda: change(value=1.0), r"run holds another run (weights was"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_went_bad_is_one_line_and_earlier_work_is_intact(damage, sharded, capsys):
    make, message = DAMAGE[damage]
    before = contents(Path("run"))
    shutil.copytree("model", "good")
    make()
    capsys.readouterr()
    assert command("run") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eora-lab: ") and message in error
    assert contents(Path("run")) == before
    shutil.rmtree("model")
    Path("good").rename("model")
    assert command("run") == 0
    assert contents(Path("run")) == contents(Path("whole"))


def test_a_disk_that_is_full_is_one_line_and_earlier_work_is_intact(sharded, capsys):
    before = contents(Path("run"))
    capsys.readouterr()
    with full_disk(10_000):
        assert command("run") == 1
    assert "cannot write run/hidden/000/00000.safetensors: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert contents(Path("run")) == before
    assert command("run") == 0
    assert contents(Path("run")) == contents(Path("whole"))


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Whom a folder can be closed to, unlike root."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_one_line_and_earlier_work_is_intact(tmp_path, monkeypatch):
    compress(deep_model(3), tiny_tokens(), **SMALL, folder=tmp_path / "whole")
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        with stopping(monkeypatch, LAYERS + 3):
            compress(deep_model(3), tiny_tokens(), **SMALL, folder=run)
        before = contents(run)
        Path(name).chmod(0o755)
        for path in (run, *run.rglob("*")):
            path.chmod(0o555)
        with an_ordinary_user(), pytest.raises(EoraLabError, match=r"^cannot write .*run: Permission denied$"):
            compress(deep_model(3), tiny_tokens(), **SMALL, folder=run)
        assert contents(run) == before
        for path in (run, *run.rglob("*")):
            path.chmod(0o755)
        compress(deep_model(3), tiny_tokens(), **SMALL, folder=run)
        assert contents(run) == contents(tmp_path / "whole")


def test_runs_killed_at_random_moments_resume_to_the_same_files():
    """Twenty and more of them: `python -m tests.kills`."""
    command = [sys.executable, "-m", "tests.kills", "3"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr + found.stdout
    assert found.stdout.splitlines()[-1] == "3 of 3 resumed to the files of an undisturbed run"
