"""A user's own methods in a file: used by every command and in notebooks, and measured again when they change."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eora_lab import EoraLabError, Recipe, calibration_batches, load_model, load_plugin, solve, token_windows
from eora_lab.cli import main
from eora_lab.compress import COMPRESSORS
from eora_lab.experiment import sweep
from eora_lab.layer.linear import backends_in_use
from eora_lab.plots import plot_comparison, plot_setting, plot_sweep
from eora_lab.run import plugins
from eora_lab.run.plugins import REGISTRIES
from tests.tiny import CELL, compress, tiny_model, tiny_tokenizer, tiny_tokens

SOLVER = """
from eora_lab.compensate import principal_errors

def mine(residual, statistics, rank):
    return principal_errors(residual, statistics.second_moment.diagonal() ** POWER, rank)

SOLVERS = {"mine": mine}
"""
SMALL = CELL | {"bits": 2}
FLAGS = "--model model --group-size 32 --inputs original --calibration.source text.txt --calibration.nsamples 4 "
FLAGS += "--calibration.seqlen 32 --evaluation.perplexity text.txt --evaluation.windows 2 --evaluation.window-length 32"


@pytest.fixture(autouse=True)
def clean():
    """Afterwards nothing of a plugin is left."""
    before = {name: dict(registry) for name, registry in REGISTRIES.items()}
    yield
    for name, registry in REGISTRIES.items():
        registry.clear()
        registry.update(before[name])
    plugins._added.clear()


def write(text: str, name: str = "mine.py") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def quiet(grid):
    return sweep(grid, "store", announce=lambda plan: None)


def test_a_solver_is_compared_swept_and_drawn_from_the_command_line(workplace, capsys):
    write(SOLVER.replace("POWER", "0.5"))
    arguments = [*FLAGS.split(), "--compressor", "rtn", "--bits", "2", "--method", "svd", "mine", "--rank", "4"]
    assert main(["compare", "--plugin", "mine.py", *arguments, "--figure", "f"]) == 0
    assert re.search(r"^rtn 2-bit g32 +mine +4 ", capsys.readouterr().out, re.M) and Path("f.svg").exists()
    grid = SMALL | {"method": ["svd", "mine"], "rank": [2, 4]}
    Path("grid.yaml").write_text(json.dumps(grid))
    assert main(["sweep", "grid.yaml", "--store", "store", "--plugin=mine.py", "--figure", "g"]) == 0
    assert "4 to run" in capsys.readouterr().out and Path("g.svg").exists()
    assert main(["compress", "run", *FLAGS.split(), "--method", "mine", "--rank", "4", "--plugin", "mine.py"]) == 0
    assert main(["evaluate", "run", "--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]) == 0


def test_a_changed_solver_is_measured_again_and_the_others_are_not(workplace):
    load_plugin(write(SOLVER.replace("POWER", "0.5")))
    grid = SMALL | {"method": ["svd", "mine"], "rank": [2, 4]}
    first = quiet(grid)
    kept = {path: path.stat().st_mtime_ns for path in Path("store").glob("*.json")}
    assert load_plugin(write(SOLVER.replace("POWER", "0.5"))) == ["mine"]
    quiet(grid)
    assert kept == {path: path.stat().st_mtime_ns for path in Path("store").glob("*.json")}
    load_plugin(write(SOLVER.replace("POWER", "2.0")))
    second = quiet(grid)
    again = {path for path, at in kept.items() if path.stat().st_mtime_ns != at}
    methods = {json.loads(path.read_text())["config"]["method"] for path in again}
    assert len(again) == 2 and methods == {"mine"}
    assert len(list(Path("store/aside").glob("*.json"))) == 2  # the results of the former code
    error = "output_error.after"
    assert (first[error] == second[error]).tolist() == [True, True, False, False]


def test_figures_fall_back_to_its_name(workplace):
    load_plugin(write(SOLVER.replace("POWER", "0.5")))
    frame = quiet(SMALL | {"method": ["none", "svd", "eora", "mine"], "rank": [2, 4]})
    (axes,) = plot_setting(frame, "rank").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert "mine" in lines and len({line.get_color() for line in lines.values()}) == len(lines)
    assert plot_sweep(frame).axes
    rows = frame.assign(base="rtn", text="text.txt", factor_bits=16, budget="uniform", model="model")
    assert plot_comparison(rows.assign(perplexity=rows["perplexity.text.txt"])).axes


def test_the_form_of_the_ablation_lab_offers_it(workplace):
    widgets = pytest.importorskip("eora_lab.widgets", reason="ipywidgets is the extra `lab`")
    load_plugin(write(SOLVER.replace("POWER", "0.5")))
    form = widgets.AblationForm("store", model="model", method=["mine"])
    assert form.controls["method"].value == ("mine",)


def test_a_compressor_with_settings_of_the_base(workplace):
    text = """
from eora_lab.compress import rtn

def coarse(weight, statistics, *, bits, group_size):
    return rtn(weight, statistics, bits=bits - 1, group_size=group_size)

QUANTISERS = {"coarse": coarse}
"""
    load_plugin(write(text))
    assert "coarse" in COMPRESSORS
    model, other = tiny_model("llama"), tiny_model("llama")
    one = compress(model, tiny_tokens(), "coarse", bits=3, group_size=32, rank=4, progress=False)
    two = compress(other, tiny_tokens(), "rtn", bits=2, group_size=32, rank=4, progress=False)
    assert [layer.error_after for layer in one.layers] == [layer.error_after for layer in two.layers]


def test_a_text(workplace):
    text = """
from types import SimpleNamespace

def texts(split):
    return ["The quick brown fox. "] * 50

SOURCES = {"fox": SimpleNamespace(texts=texts, DEFAULT_SPLIT="all", JOIN=" ", PACKING="running")}
"""
    load_plugin(write(text))
    assert calibration_batches(tiny_tokenizer(), "fox", 2, 16).shape == (2, 16)
    assert token_windows(tiny_tokenizer(), "fox:all", 2, 16).shape == (2, 16)


STORAGE = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import Tensor
from eora_lab.compress import Compressed

@dataclass(frozen=True)
class Signs(Compressed):
    """W^[o, i] = scales[o] codes[o, i], codes of -1 and 1."""

    kind: ClassVar = "signs"
    whole: ClassVar = ()
    scales: Tensor  # (out, 1)
    codes: Tensor  # (out, in) int8

    @property
    def bits(self):
        return 1

    @property
    def shape(self):
        return self.codes.shape

    def dense(self, dtype=torch.float32):
        return (self.scales * self.codes).to(dtype)

    def state_dict(self):
        return {"scales": self.scales, "codes": self.codes}

    @classmethod
    def from_state_dict(cls, state):
        return cls(state["scales"], state["codes"])

def signs(weight, statistics):
    return Signs(weight.abs().mean(1, keepdim=True), torch.where(weight < 0, -1, 1).to(torch.int8))

KINDS = {"signs": Signs}
QUANTISERS = {"signs": signs}
'''


def test_a_storage_kind_goes_through_run_folder_layer_and_export(workplace, capsys):
    write(STORAGE)
    plugin = ["--plugin", "mine.py"]
    assert main(["compress", "run", *FLAGS.split(), "--compressor", "signs", "--rank", "8", *plugin]) == 0
    assert "signs" in json.loads(Path("run/config.json").read_text())["settings"]["compressor"]
    assert main(["generate", "run", "The quick", "--tokens", "3", *plugin]) == 0
    assert "14 layers by tiles" in capsys.readouterr().err
    assert main(["export", "run", "dense", "--format", "dense", *plugin]) == 0
    assert load_model("dense")
    assert main(["export", "run", "out", *plugin]) == 1
    assert "is stored as signs, and a GPTQ checkpoint holds grids" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "eora_lab.cli", "generate", "run", "The"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 1 and "stored as 'signs', which is not known here" in done.stderr


def test_a_format_is_written_and_read(workplace, capsys):
    text = """
from pathlib import Path
from eora_lab.formats import Format, GptqCheckpoint, write_checkpoint

def write(folder, model, tokenizer, dtype):
    write_checkpoint(folder, model, tokenizer, dtype, "gptq")
    Path(folder, "hello").write_text("")
    return "hello"

FORMATS = {"greeting": Format("a checkpoint that says hello", write, GptqCheckpoint)}
"""
    write(text)
    grid = ["--sym", "--zero-point", "integer", "--scale-dtype", "float16", "--rank", "4"]
    assert main(["compress", "run", *FLAGS.split(), *grid]) == 0
    assert main(["export", "run", "out", "--format", "greeting", "--plugin", "mine.py"]) == 0
    assert "wrote out: hello" in capsys.readouterr().out and Path("out/hello").exists()
    flags = ["--model", "model", "--rank", "4", "--calibration.source", "text.txt", "--calibration.nsamples", "4"]
    flags += ["--calibration.seqlen", "32", "--no-evaluate", "--format", "greeting", "--plugin", "mine.py"]
    assert main(["mend", "out", "again", *flags]) == 0


def test_a_backend_comes_before_the_packages_own():
    text = """
import torch
from eora_lab.layer.backends import Backend, with_path

class Mine(Backend):
    name = "mine"

    def why_not(self, layer, x, gradients):
        return None if layer.sample.bits == 3 else "3 bits only"

    def prepare(self, layer):
        W = layer.compressed.dense(layer.lora_A.dtype)
        return with_path(lambda _, x: x @ W.T)

BACKENDS = {"mine": Mine()}
"""
    model = tiny_model("llama")
    compress(model, tiny_tokens(), bits=3, group_size=32, rank=4, progress=False)
    with torch.no_grad():
        before = model(tiny_tokens(1)).logits
    path = Path(__file__).parent / "mine_backend.py"
    try:
        load_plugin(write(text, str(path)))
        for layer in model.modules():
            getattr(layer, "_forget", lambda: None)()
        assert backends_in_use(model) == {"mine": 14}
        with torch.no_grad():
            torch.testing.assert_close(model(tiny_tokens(1)).logits, before, rtol=1e-4, atol=1e-5)
    finally:
        path.unlink()


ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVERS = {'mine': 1", "cannot be loaded: SyntaxError"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("x = 1", "adds nothing: it defines none of SOLVERS, QUANTISERS"),
        ("SOLVERS = {'eora': print}", "cannot add 'eora' to SOLVERS: that name is taken"),
        ("SOLVERS = [print]", "which is no dict whose keys are names"),
        ("from eora_lab.compensate import SOLVERS\nSOLVERS['x'] = print", "changes the package's SOLVERS"),
    ],
)
def test_plugins_that_cannot_be_used(workplace, text, message, capsys):
    write(text)
    assert main(["models", "--plugin", "mine.py"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "x" not in REGISTRIES["SOLVERS"]


def test_names_and_files_that_are_not_there(workplace, capsys):
    assert main(["models", "--plugin"]) == 1
    assert main(["models", "--plugin", "absent.py"]) == 1
    assert "no plugin absent.py: give a Python file" in capsys.readouterr().err
    with pytest.raises(EoraLabError, match="unknown method 'mine'"):
        Recipe(method="mine")
    load_plugin(write(SOLVER.replace("POWER", "1.0")))
    with pytest.raises(EoraLabError, match="that name is taken"):
        load_plugin(write(SOLVER.replace("POWER", "1.0"), "other.py"))
    R = torch.randn(8, 12)
    assert torch.allclose(solve("mine", R, torch.eye(12), 2).dense(), solve("qera_approx", R, torch.eye(12), 2).dense())
    write(SOLVER.replace("mine", "renamed").replace("POWER", "1.0"))
    assert load_plugin("mine.py") == ["renamed"]
    with pytest.raises(EoraLabError, match="unknown method 'mine'"):
        solve("mine", R, torch.eye(12), 2)


def test_an_installed_package_is_loaded_by_every_command(tmp_path):
    site = tmp_path / "site"
    (site / "theirs-1.0.dist-info").mkdir(parents=True)
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (site / "theirs-1.0.dist-info" / "entry_points.txt").write_text("[eora_lab.plugins]\ntheirs = theirs\n")
    (site / "theirs.py").write_text(SOLVER.replace("mine", "theirs").replace("POWER", "0.5"))
    code = "from eora_lab.cli.commands import with_plugins; with_plugins([])\n"
    code += "from eora_lab import Recipe; Recipe(method='theirs')"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{site}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
