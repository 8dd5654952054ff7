"""Run folders: written block by block, loaded back, resumed, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from eora_lab import EoraLabError, collect_statistics, load_model, load_run
from eora_lab.cli import main
from eora_lab.compress import QUANTISERS
from eora_lab.files import locked
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.run.budget import Budget
from eora_lab.run.folder import load_original
from eora_lab.run.ranks import plan_ranks
from eora_lab.run.recipe import Recipe
from tests.tiny import CONFIGS, SMALL, compress, full_disk, logits, save_tiny, tiny_model, tiny_tokens


def run_settings(folder) -> dict:
    return SMALL | {"compressor": "gptq", "folder": folder}


@pytest.mark.parametrize("method", ["eora", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_loads_back_with_the_same_logits(kind, method, tmp_path):
    name = save_tiny(tmp_path / "model", kind)
    model, _ = load_model(name)
    report = compress(model, tiny_tokens(), **run_settings(tmp_path / "run"), method=method)
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tiny_tokens(2, seed=1)), logits(model, tiny_tokens(2, seed=1)))
    assert loaded_report == report
    with pytest.raises(EoraLabError, match="compressed already"):
        compress(loaded, tiny_tokens(), **SMALL)


@pytest.mark.parametrize("bits", [3, 16])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_a_pruned_run_loads_back_with_the_same_logits_and_bytes(sparsity, bits, tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "model"))
    settings = run_settings(tmp_path / "run") | {"compressor": "sparsegpt", "sparsity": sparsity, "bits": bits}
    report = compress(model, tiny_tokens(), **settings)
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, tiny_tokens(2, seed=1)), logits(model, tiny_tokens(2, seed=1)))
    assert loaded_report == report
    on_disk = sum(file.stat().st_size for file in (tmp_path / "run" / "blocks").iterdir())
    assert report.nbytes < on_disk < report.nbytes + 25_000  # headers


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_adapter_loads_in_peft(kind, tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "model", kind))
    compress(model, tiny_tokens(), **run_settings(tmp_path / "run"))
    base = tiny_model(kind)
    for name, module in model.named_modules():
        if isinstance(module, CompensatedLinear):
            base.get_submodule(name).weight.data.copy_(module.dense())
    tokens = tiny_tokens(2, seed=1)
    without = logits(base, tokens)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert (without - logits(model, tokens)).abs().max() > 1e-3  # the adapter does something


class Stop(Exception):
    pass


@pytest.mark.parametrize("inputs", ["compensated", "original"])
def test_an_interrupted_run_resumes_to_the_same_result(inputs, tmp_path, monkeypatch):
    name = save_tiny(tmp_path / "model")
    whole, _ = load_model(name)
    compress(whole, tiny_tokens(), **run_settings(tmp_path / "whole"), inputs=inputs)

    calls = []

    def stopping(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 10:  # in the second block
            raise Stop
        return gptq(*args, **kwargs)

    gptq = QUANTISERS["gptq"]
    settings = run_settings(tmp_path / "run") | {"inputs": inputs}
    monkeypatch.setitem(QUANTISERS, "gptq", stopping)
    with pytest.raises(Stop):
        compress(load_model(name)[0], tiny_tokens(), **settings)
    with pytest.raises(EoraLabError, match="not finished; start it again"):
        load_run(tmp_path / "run")
    calls.clear()
    calls += [None] * 10  # count on, without stopping
    resumed, _ = load_model(name)
    report = compress(resumed, tiny_tokens(), **settings)
    assert len(calls) - 10 == 7  # the first block was not compressed again
    assert len(report.layers) == 14
    assert torch.equal(logits(resumed, tiny_tokens(2)), logits(whole, tiny_tokens(2)))
    assert torch.equal(logits(load_run(tmp_path / "run")[0], tiny_tokens(2)), logits(whole, tiny_tokens(2)))
    assert not list(tmp_path.glob("run/**/*.partial"))


def test_a_finished_run_is_read_and_not_computed_again(tmp_path, monkeypatch):
    name = save_tiny(tmp_path / "model")
    model, _ = load_model(name)
    compress(model, tiny_tokens(), **run_settings(tmp_path / "run"))
    monkeypatch.setitem(QUANTISERS, "gptq", None)  # calling it would fail
    again, _ = load_model(name)
    compress(again, tiny_tokens(), **run_settings(tmp_path / "run"))
    assert torch.equal(logits(again, tiny_tokens(2)), logits(model, tiny_tokens(2)))


def test_a_run_folder_refuses_other_settings_and_other_contents(tmp_path):
    settings = run_settings(tmp_path / "run")
    compress(tiny_model("llama"), tiny_tokens(), **settings)
    with pytest.raises(EoraLabError, match=r"holds another run \(bits was 3, now 4\): choose another"):
        compress(tiny_model("llama"), tiny_tokens(), **settings | {"bits": 4})
    with pytest.raises(EoraLabError, match=r"holds another run \(tokens was"):
        compress(tiny_model("llama"), tiny_tokens(seed=5), **settings)
    with pytest.raises(EoraLabError, match=r"holds another run \(weights was"):
        compress(tiny_model("llama", seed=1), tiny_tokens(), **settings)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    with pytest.raises(EoraLabError, match="not empty and holds no run"):
        compress(tiny_model("llama"), tiny_tokens(), **settings | {"folder": tmp_path / "photos"})


def test_a_damaged_run_is_one_clear_error(tmp_path):
    name = save_tiny(tmp_path / "model")
    compress(load_model(name)[0], tiny_tokens(), **run_settings(tmp_path / "run"))
    block = tmp_path / "run" / "blocks" / "001.safetensors"
    whole = block.read_bytes()
    tensors = {key: tensor.clone() for key, tensor in load_file(block).items()}  # not the file, mapped
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damage in (whole[: len(whole) // 2], b"", b"not a tensor", flipped):
        block.write_bytes(damage)
        with pytest.raises(EoraLabError, match=r"001\.safetensors is damaged \(.*\): start the run again"):
            load_run(tmp_path / "run")
        with pytest.warns(UserWarning, match=r"001\.safetensors is damaged \(.*\): it was moved to .* made again"):
            compress(load_model(name)[0], tiny_tokens(), **run_settings(tmp_path / "run"))
        again = load_file(block)
        assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items()) and load_run(tmp_path / "run")
        assert damage in [one.read_bytes() for one in (tmp_path / "run" / "aside").iterdir()]
    block.unlink()
    with pytest.raises(EoraLabError, match=r"holds model\.layers\.1\.self_attn\.q_proj is missing"):
        load_run(tmp_path / "run")
    with pytest.raises(EoraLabError, match="not a run folder"):
        load_run(tmp_path)


def same_losses(_model) -> dict[str, list[float]]:
    return {"text": [2.0, 3.0]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model and a run of it."""
    place = tmp_path_factory.mktemp("finished")
    model, _ = load_model(save_tiny(place / "model"))
    compress(model, tiny_tokens(), **run_settings(place / "run"), judge=same_losses)
    return place


LAYER = "layers", 0


@pytest.mark.parametrize(
    ("file", "where", "value", "message"),
    [
        ("report.json", None, "", "report.json is damaged"),
        ("report.json", None, '{"layers": [', "report.json is damaged"),
        ("report.json", None, "[]", "its content must be names with values"),
        ("report.json", None, "{}", "Report without layers"),
        ("report.json", None, b"\xff\xfe{\x00}\x00", "report.json is damaged"),
        ("report.json", ("layers",), {}, "layers must be a list, not {}"),
        ("report.json", ("layers",), [7], "a LayerReport must be names with values, not int"),
        ("report.json", (*LAYER, "rank"), "8", "rank must be a whole number, not '8'"),
        ("report.json", (*LAYER, "rank"), None, "rank must be a whole number, not None"),
        ("report.json", (*LAYER, "error_after"), "low", "error_after must be a number"),
        ("report.json", (*LAYER, "spectrum"), [], "spectrum must be names with values"),
        ("report.json", (*LAYER, "spectrum"), {"one": 0.5}, "spectrum must be a whole number, not 'one'"),
        ("report.json", (*LAYER, "name"), 4, "name must be text, not 4"),
        ("report.json", ("seconds",), True, "seconds must be a number, not True"),
        ("report.json", ("losses",), {"text": 9.0}, "losses.text must be names with values, not 9.0"),
        ("report.json", ("losses", "text", "dense"), [2.0], "losses.text must be numbers for every window"),
        ("report.json", ("losses", "text", "dense"), ["2", 3.0], "losses.text.dense must be a number, not '2'"),
        ("report.json", ("backends",), {"tiles": "all"}, "backends.tiles must be a whole number"),
        ("config.json", None, "", "not a run folder"),
        ("config.json", None, "null", "not a run folder"),
        ("config.json", None, b"\xff\xfe{\x00}\x00", "not a run folder"),
        ("config.json", ("settings",), [], "not a run folder"),
        ("config.json", ("settings",), {}, "config.json does not name the model of the run"),
        ("config.json", ("settings", "weights"), 7, "config.json does not name the weights of the run"),
        ("config.json", ("settings", "dtype"), None, "config.json does not name the dtype of the run"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(finished, tmp_path, file, where, value, message):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    if where is None:
        (run / file).write_bytes(value if isinstance(value, bytes) else value.encode())
    else:
        content = place = json.loads((run / file).read_text())
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = value
        (run / file).write_text(json.dumps(content))
    with pytest.raises(EoraLabError) as caught:
        load_run(run)
    assert message in str(caught.value) and file in str(caught.value) and "\n" not in str(caught.value)
    if file == "report.json":
        assert "start the run again" in str(caught.value)
        compress(load_model(finished / "model")[0], tiny_tokens(), **run_settings(run), judge=same_losses)
        assert load_run(run)[2].layers == load_run(finished / "run")[2].layers


@pytest.mark.parametrize("content", ["", "[]", '{"model.layers.0.self_attn.q_proj": "8"}', '{"typo": 8}'])
def test_damaged_ranks_of_a_run_are_one_line_before_anything_changes(tmp_path, content):
    settings = run_settings(tmp_path / "run") | {"ranks": Budget("relative", multiple=1)}
    report = compress(tiny_model("llama"), tiny_tokens(), **settings)
    (tmp_path / "run" / "ranks.json").write_text(content)
    model = tiny_model("llama")
    with pytest.raises(EoraLabError, match=r"ranks\.json cannot be used.*delete it|a rank is given for typo"):
        compress(model, tiny_tokens(), **settings)
    assert not any(isinstance(module, CompensatedLinear) for module in model.modules())
    (tmp_path / "run" / "ranks.json").unlink()
    assert compress(model, tiny_tokens(), **settings).layers == report.layers


def test_a_run_goes_into_a_folder_and_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".config.json.7.partial").write_text('{"set')  # all that a kill left
    (tmp_path / "empty" / ".tmpb9x0yK").write_bytes(b"\x00" * 8)
    assert compress(tiny_model("llama"), tiny_tokens(), **run_settings(tmp_path / "empty"))
    assert not list((tmp_path / "empty").glob(".[!l]*"))  # but for the lock
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    for name, message in (("file", "Not a directory; choose another"), ("photos", "holds no run: choose another")):
        with pytest.raises(EoraLabError, match=message):
            compress(tiny_model("llama"), tiny_tokens(), **run_settings(tmp_path / name))
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path / "photos") == ["cat.png"]


@pytest.mark.parametrize("loaded", ["bfloat16", "float32"])
def test_a_run_is_the_same_in_16_bits_wherever_it_is_read(finished, tmp_path, loaded):
    """Rotary frequencies stay in float32, as in a model that is loaded in bfloat16."""
    model = load_model(finished / "model", loaded)[0]
    compress(model, tiny_tokens(), **run_settings(tmp_path / "run"))
    again = load_run(tmp_path / "run", "bfloat16")[0]
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    if loaded == "bfloat16":
        assert torch.equal(logits(again, tiny_tokens(2)), logits(model, tiny_tokens(2)))


def last_row(model) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1


CHANGES = {
    "embeddings": lambda model: model.model.embed_tokens.weight.data[50].add_(1),
    "a norm": lambda model: model.model.norm.weight.data.mul_(2),
    "the head": lambda model: model.lm_head.weight.data.mul_(2),
    "one weight": last_row,
    "rope": lambda model: setattr(model.config, "rope_parameters", {"rope_type": "default", "rope_theta": 999.0}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_put_on_no_other_model_than_its_own(finished, tmp_path, change):
    """Wherever the other model differs, and whether it lies in the place of the first one or elsewhere."""
    place = shutil.copytree(finished, tmp_path / "place")
    other = load_model(place / "model")[0]
    CHANGES[change](other)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(place / "model" / "tokenizer.json", tmp_path / "other")
    shutil.copy(place / "model" / "tokenizer_config.json", tmp_path / "other")
    for load in (load_run, load_original):
        with pytest.raises(EoraLabError, match=r"other is no longer the model that .* was made from: bring that one"):
            load(place / "run", model=tmp_path / "other")
    with pytest.raises(EoraLabError, match=r"holds another run \((model|weights) was"):
        compress(load_model(tmp_path / "other")[0], tiny_tokens(), **run_settings(place / "run"))
    moved = load_run(place / "run", model=place / "model")[0]  # an equal copy of the first one
    assert torch.equal(logits(moved, tiny_tokens(2)), logits(load_run(finished / "run")[0], tiny_tokens(2)))


def test_a_run_is_read_with_no_other_tokenizer_than_its_own(finished, tmp_path):
    """The same weights with other tokens would give another perplexity. Runs from before this was noted stay usable."""
    place = shutil.copytree(finished, tmp_path / "place")
    config, tokenizer = place / "run" / "config.json", place / "model" / "tokenizer.json"
    words = json.loads(tokenizer.read_text())
    words["added_tokens"] = []
    tokenizer.write_text(json.dumps(words))
    for load in (load_run, load_original):
        with pytest.raises(EoraLabError, match=r"the tokenizer of .* is no longer the one that .*: bring that one"):
            load(place / "run", model=place / "model")
    with pytest.raises(EoraLabError, match=r"holds another run \((model|tokenizer) was"):
        compress(load_model(place / "model")[0], tiny_tokens(), **run_settings(place / "run"))
    older = json.loads(config.read_text())
    del older["settings"]["tokenizer"]
    older["settings"]["model"] = str(place / "model")
    config.write_text(json.dumps(older))
    assert load_run(place / "run")[2].layers
    compress(load_model(place / "model")[0], tiny_tokens(), **run_settings(place / "run"))  # resumed


PASS = ["--rank", "4", "--group-size", "32", "--bits", "3", "--no-evaluate", "--calibration.source", "text.txt"]
PASS += ["--calibration.nsamples", "4", "--calibration.seqlen", "32"]
TEXT = ["--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]
COMMANDS = {
    "evaluate": ["evaluate", "run", *TEXT],
    "generate": ["generate", "run", "The fox", "--tokens", "2"],
    "export": ["export", "run", "out", "--format", "dense"],
    "adapter solve": ["adapter", "solve", "run", "out", *PASS[-6:]],
}


def test_every_command_refuses_a_base_model_that_was_replaced(workplace, capsys):
    assert main(["compress", "run", "--model", "model", *PASS]) == 0
    report = Path("run/report.json").read_text()
    model, _ = load_model("model")
    model.model.embed_tokens.weight.data[50] += 1
    shutil.copytree("model", "first")
    model.save_pretrained("model")
    for command in COMMANDS.values():
        capsys.readouterr()
        assert main(command) == 1
        assert "model is no longer the model that run was made from" in capsys.readouterr().err
        assert not Path("out").exists()
    Path("run/report.json").unlink()
    Path("run/blocks/001.safetensors").unlink()
    assert main(["compress", "run", "--model", "model", *PASS]) == 1
    assert "run holds another run (weights was" in capsys.readouterr().err
    for command in COMMANDS.values():
        (workplace / "run" / "report.json").write_text(report)
        assert not Path("run/blocks/001.safetensors").exists()
        assert main([*command, "--base", "first"]) == 1  # the base is right, the block is missing
        assert "is missing" in capsys.readouterr().err


def test_two_passes_cannot_work_in_one_folder_at_once(tmp_path):
    settings = run_settings(tmp_path / "run")

    def second(_model) -> dict:
        with pytest.raises(EoraLabError, match=r"somebody is at work in .*run: wait until that has ended"):
            compress(tiny_model("llama"), tiny_tokens(), **settings)
        return {}

    report = compress(tiny_model("llama"), tiny_tokens(), **settings, judge=second)
    assert compress(tiny_model("llama"), tiny_tokens(), **settings).layers == report.layers
    with locked(tmp_path / "run"), pytest.raises(EoraLabError, match="somebody is at work"):
        compress(tiny_model("llama"), tiny_tokens(), **settings)


def stored(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run folder."""
    files = sorted(run.rglob("*.safetensors"))
    return {f"{file.relative_to(run)} {key}": t for file in files for key, t in load_file(file).items()}


def same_bytes(one: Path, other: Path) -> bool:
    first, second = stored(one), stored(other)
    return len(first) > 100 and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_full_disk_is_one_line_and_the_run_resumes(finished, tmp_path):
    settings = run_settings(tmp_path / "run")
    with full_disk(10_000), pytest.raises(EoraLabError, match=r"cannot write .*000\.safetensors: "):
        compress(load_model(finished / "model")[0], tiny_tokens(), **settings)
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"config.json", "blocks", ".lock"}
    compress(load_model(finished / "model")[0], tiny_tokens(), **settings)
    assert same_bytes(tmp_path / "run", finished / "run")


STOPPED = """
import functools, os, signal, sys
import torch
from eora_lab.cli import main
from eora_lab.compress import QUANTISERS
torch.set_num_threads(1)
calls, gptq = [], QUANTISERS["gptq"]
@functools.wraps(gptq)
def stopping(weight, statistics, **settings):
    calls.append(1)
    if len(calls) == 10:  # in the second block
        open("run/blocks/.001.safetensors.1.partial", "w").close()  # as if in the middle of a file
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return gptq(weight, statistics, **settings)
QUANTISERS["gptq"] = stopping
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("sent", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_a_pass_that_is_killed_in_the_middle_resumes_to_the_same_bytes(workplace, sent, code):
    command = ["compress", "run", "--model", "model", *PASS]
    script = [sys.executable, "-c", STOPPED, sent, *command]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    stopped = subprocess.run(script, env=os.environ | path, capture_output=True, text=True)
    assert stopped.returncode == code and "Traceback" not in stopped.stderr, stopped.stderr
    assert sorted(path.name for path in Path("run/blocks").iterdir() if path.suffix == ".safetensors") == [
        "000.safetensors"
    ]
    first = Path("run/blocks/000.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert main(["compress", "whole", *command[2:]]) == 0
    assert Path("run/blocks/000.safetensors").stat().st_mtime_ns == first
    assert same_bytes(Path("run"), Path("whole"))
    assert not list(Path("run").rglob("*.partial"))


@pytest.mark.parametrize("factor_bits", [16, 4])
def test_ragged_ranks_flow_through_run_folder_and_adapter(factor_bits, tmp_path):
    name = save_tiny(tmp_path / "model")
    model, _ = load_model(name)
    recipe, tokens = Recipe("rtn", bits=3, group_size=32, rank=8), tiny_tokens()
    statistics = collect_statistics(model, tokens, progress=False)
    ranks = plan_ranks(model, statistics, recipe, Budget("relative", maximum=24, only="mlp|q_proj"), progress=False)
    assert len(set(ranks.values())) > 2 and min(ranks.values()) == 0
    uniform = compress(tiny_model("llama"), tokens, **SMALL, inputs="original")
    settings = SMALL | {"ranks": ranks, "inputs": "original", "factor_bits": factor_bits, "folder": tmp_path / "run"}
    report = compress(model, tokens, **settings)
    assert {layer.name: layer.rank for layer in report.layers} == ranks
    assert report.nbytes <= uniform.nbytes
    loaded, _, loaded_report = load_run(tmp_path / "run")
    assert loaded_report == report and torch.equal(logits(loaded, tiny_tokens(2)), logits(model, tiny_tokens(2)))
    base = tiny_model("llama")
    for name, module in model.named_modules():
        if isinstance(module, CompensatedLinear):
            base.get_submodule(name).weight.data.copy_(module.dense())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(logits(adapted, tiny_tokens(2)), logits(model, tiny_tokens(2)), rtol=1e-3, atol=1e-4)
