"""The command line as users meet it: help, results, exit codes, one-line errors."""

import io
import json
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from eora_lab.cli import main
from eora_lab.cli.commands import COMMANDS
from eora_lab.cli.options import field_texts
from eora_lab.compensate import SOLVERS
from eora_lab.compress import COMPRESSORS, GRIDS
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration
from eora_lab.text.sources import SOURCES
from tests.tiny import CELL, TEXT

TEXTS = (
    "--calibration.source text.txt --calibration.nsamples 4 --calibration.seqlen 32 --evaluation.perplexity text.txt"
)
TEXTS = f"{TEXTS} --evaluation.windows 2 --evaluation.window-length 32".split()
SMALL = ["--model", "model", "--group-size", "32", "--rank", "8"]


def test_help_names_every_command_and_setting(capsys):
    for arguments in ([], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        if not arguments:
            assert all(command in text for command in COMMANDS)
        else:
            assert len(text.split()) > 20


def test_help_names_what_is_to_be_given_and_all_that_a_setting_takes(capsys):
    for command, words in (
        (["mend"], "CHECKPOINT OUTPUT"),
        (["generate"], "MODEL PROMPT"),
        (["evaluate"], r"\[MODEL\]"),
        (["adapter", "export"], "RUN-FOLDER OUTPUT"),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert re.search(rf"usage: .*{words}", " ".join(capsys.readouterr().out.split()))
    texts = field_texts(Recipe) | field_texts(Calibration)
    for setting, known in {"method": SOLVERS, "compressor": COMPRESSORS, "grid": GRIDS, "source": SOURCES}.items():
        assert [name for name in known if not re.search(rf"\b{name}\b", texts[setting])] == [], setting


def test_wrong_usage_names_what_may_be_meant_and_no_other_commands(capsys):
    for arguments, words in (
        (["comprss"], "unknown command 'comprss'.*did you mean compress"),
        (["compress", "run", "--calibraton.source", "pydoc"], "--calibration.source"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(words, said) and "eora-lab mend" not in said
    with pytest.raises(SystemExit) as stop:
        main([])
    overview = capsys.readouterr().err
    assert stop.value.code == 2 and len(overview.splitlines()) < 30
    assert all(len(line) < 130 and not line.endswith(" ") for line in overview.splitlines())
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"eora-lab {version('eora-lab')}\n"


def test_compress_evaluate_generate(workplace, capsys):
    assert main(["compress", "run", *SMALL, *TEXTS]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out and "perplexity on text.txt: dense" in out
    report = json.loads((workplace / "run/report.json").read_text())
    assert main(["evaluate", "run", "--perplexity", "text.txt", "--windows", "2", "--window-length", "32"]) == 0
    measured = float(re.search(r"perplexity ([\d.]+)", capsys.readouterr().out)[1])
    assert measured == pytest.approx(report["perplexity"]["text.txt"]["compressed"], rel=1e-4)
    assert main(["generate", "run", "The quick", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("The quick")
    config = json.loads((workplace / "run/config.json").read_text())
    assert config["settings"]["bits"] == 4 and config["settings"]["seed"] == 0
    assert config["settings"]["source"] == "text.txt" and "torch" in config["versions"]


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ("--rank 8", None),
        ("--rank 0 --method none", None),
        ("--rank 0", "eora at rank 0 adds no path: give it a rank, or take method none"),
        ("--bits 5 --rank 8", "5 bits are for measuring: kernels and checkpoints of other tools take 2, 3, 4 or 8"),
        ("--rank 32", "rank 32 is the full rank of 4 of 14 layers, such as model.layers.0.self_attn.k_proj: "),
        ("--rank 32 --budget.objective relative", None),
        ("--compressor wanda --sparsity 2:4 --bits 16 --rank 8", None),
        ("--compressor rtn --grid nf4 --rank 8", None),
    ],
)
def test_what_may_not_be_meant_is_one_hint(workplace, capsys, settings, hint):
    model = ["--model", "model", *(() if "nf4" in settings else ("--group-size", "32")), "--no-evaluate"]
    assert main(["compress", "run", *model, *TEXTS, *settings.split()]) == 0
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    assert len(hints) == bool(hint) and (not hint or hints[0].startswith(f"hint: {hint}"))


def test_a_run_that_was_finished_says_so(workplace, capsys):
    for said in ("wrote run: ", "run was finished before: "):
        assert main(["compress", "run", *SMALL, *TEXTS, "--no-evaluate"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)


def test_sampling_repeats_with_its_seed(workplace, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "model", "The", "--tokens", "20", "--temperature", "1", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_compare_prints_a_row_a_recipe_and_draws(workplace, capsys):
    arguments = [
        "compare",
        *SMALL,
        *TEXTS,
        "--compressor",
        "rtn",
        "--inputs",
        "original",
        "--method",
        "none",
        "svd",
        "eora",
        "--bits",
        "3",
        "2",
        "--rank",
        "4",
        "8",
        "--budget",
        "uniform",
        "relative",
    ]
    assert main([*arguments, "--figure", "figures/f.png"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^rtn [23]-bit g32 ", out, re.M)) == 2 * (1 + 4 + 4)
    first = {path.suffix: path.read_bytes() for path in (workplace / "figures").iterdir()}
    assert set(first) == {".png", ".svg", ".csv"}
    assert main([*arguments, "--figure", "figures/f.png"]) == 0
    assert first == {path.suffix: path.read_bytes() for path in (workplace / "figures").iterdir()}  # the same bytes


def test_compare_takes_every_setting_of_the_base(workplace, capsys):
    arguments = ["compare", *SMALL, *TEXTS, "--method", "none", "--bits", "4", "16", "--inputs", "compensated"]
    assert main([*arguments, "--compressor", "sparsegpt", "--sparsity", "2:4", "--mse", "--true-sequential"]) == 0
    out = capsys.readouterr().out
    assert "sparsegpt 2:4 4-bit g32 " in out and "sparsegpt 2:4  " in out
    arguments = ["compare", *SMALL, *TEXTS, "--method", "none", "--compressor", "gptq", "--scale-dtype", "float16"]
    assert main([*arguments, "--zero-point", "integer", "--no-desc-act", "--mse"]) == 0
    assert re.search(r"gptq 4-bit g32 .* 4\.6\d ", capsys.readouterr().out)  # 4 + 16/32 + 4/32


def test_models(capsys):
    assert main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_transformers():
    code = """
import sys
from eora_lab.cli import main
from eora_lab.cli.commands import COMMANDS
for arguments in ([], *([command] for command in COMMANDS), ["adapter", "solve"]):
    try:
        main([*arguments, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
sys.exit(f"imported: {heavy}" if (heavy := {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


SWEEPS = {"text": {"source": "wikipedia"}, "model": {"model": "absent"}, "task": {"tasks": ["arc_eazy"]}}
SWEEPS |= {"method": {"method": "eroa"}, "good": {}}


@pytest.fixture
def unloadable(workplace):
    """The workplace with a model whose weights cannot be read: who tries says so."""
    (workplace / "model/model.safetensors").write_bytes(b"no weights")
    for name, grid in SWEEPS.items():
        (workplace / f"{name}.yaml").write_text(json.dumps(CELL | grid))
    (workplace / "notes.md").write_text("my notes")
    (workplace / "notes.csv").write_text("day,note\n1,mine\n")
    return workplace


EVALUATE = ["evaluate", "model", "--perplexity", "text.txt"]
COMPRESS = ["compress", "run", *SMALL, *TEXTS]
COMPARE = ["compare", *SMALL, *TEXTS]
SWEEP = ["sweep", "good.yaml", "--store", "store"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "model", "--perplexity", "wikipedia"], "unknown source 'wikipedia'"),
        (["evaluate", "model", "--perplexity", "pydoc:hedlout"], "pydoc has no split 'hedlout'"),
        (["evaluate", "model", "--against", "absent"], "no model 'absent'"),
        (["evaluate", "model", "--backend", "tilse"], "unknown backend 'tilse'"),
        (["evaluate", "model", "--perplexity"], "nothing to measure"),
        (["evaluate", "model", "--tasks", "arc_eazy"], "did you mean arc_easy"),
        (["evaluate", "model", "--limit", "0"], "limit must be 1 or more, not 0"),
        (["evaluate", "model", "--num-fewshot", "-1"], "num_fewshot must be 0 or more, not -1"),
        (["evaluate", "model", "--batch-size", "0"], "batch_size must be 1 or more, not 0"),
        (["evaluate", "model", "--windows", "0"], "windows must be 1 or more, not 0"),
        (["evaluate", "model", "--window-length", "1"], "window_length must be 2 or more, not 1"),
        (["generate", "model", "The", "--backend", "tilse"], "unknown backend 'tilse'"),
        ([*COMPRESS, "--method", "eroa"], "did you mean eora?"),
        ([*COMPRESS, "--compressor", "gtpq"], "did you mean gptq?"),
        ([*COMPRESS, "--model", "absent"], "no model 'absent'"),
        ([*COMPRESS, "--calibration.source", "wikipedia"], "unknown source 'wikipedia'"),
        ([*COMPRESS, "--evaluation.perplexity", "wikipedia"], "unknown source 'wikipedia'"),
        ([*COMPRESS, "--calibration.nsamples", "0"], "nsamples must be 1 or more, not 0"),
        ([*COMPRESS, "--calibration.seqlen", "-4"], "seqlen must be 1 or more, not -4"),
        (["compress", "text.txt", *SMALL, *TEXTS], "text.txt is a file"),
        (["compress", "text.txt/run", *SMALL, *TEXTS], "text.txt is a file"),
        (["compress", "model", *SMALL, *TEXTS], "not empty and holds no run"),
        (["mend", "checkpoint", "run", "--model", "model", "--format", "gtpq"], "unknown format 'gtpq'"),
        (["export", "run", "out", "--format", "gtpq"], "unknown format 'gtpq'"),
        ([*COMPARE, "--method", "eroa"], "unknown method 'eroa'"),
        ([*COMPARE, "--model", "absent"], "no model 'absent'"),
        ([*COMPARE, "--calibration.source", "wikipedia"], "unknown source 'wikipedia'"),
        ([*COMPARE, "--figure", "f.jpg"], "the name must end in .png, .svg"),
        ([*COMPARE, "--figure", "text.txt/f.png"], "text.txt is a file"),
        ([*COMPARE, "--figure", "model"], "it is a folder"),
        ([*COMPARE, "--figure", "notes.png"], "notes.csv holds something else"),
        ([*COMPARE, "--store", "model"], "model is no result store (it holds config.json)"),
        ([*SWEEP, "--store", "text.txt/store"], "text.txt is a file"),
        ([*SWEEP, "--store", "model"], "model is no result store"),
        ([*SWEEP, "--export", "t.xlsx"], "the name must end in .parquet"),
        ([*SWEEP, "--export", "notes.md"], "notes.md holds something else"),
        ([*SWEEP, "--figure", "f.jpg"], "the name must end in .png, .svg"),
        ([*SWEEP, "--model", "absent"], "no model 'absent'"),
        ([*SWEEP, "--batch-size", "0"], "batch_size must be 1 or more, not 0"),
        (["sweep", "rnak", "--store", "store"], "cannot read the grid rnak"),
        (["sweep", "text.yaml", "--store", "store"], "unknown source 'wikipedia'"),
        (["sweep", "model.yaml", "--store", "store"], "no model 'absent'"),
        (["sweep", "task.yaml", "--store", "store"], "did you mean arc_easy"),
        (["sweep", "method.yaml", "--store", "store"], "did you mean eora?"),
        (["paper", "T99", "--model", "model"], "T99 cannot be run here"),
        (["paper", "2"], "did you mean T2?"),
        (["paper", "T2", "--model", "absent"], "no model 'absent'"),
        (["paper", "T2", "--model", "model", "--figure", "f.jpg"], "the name must end in .png, .svg"),
        (["evaluate", "model", "--plugin", "absent.py"], "no plugin absent.py"),
        (["bench", "--shapes", "4096"], "'4096' is no shape of a layer"),
    ],
)
def test_a_slip_is_found_before_a_model_is_loaded(unloadable, capsys, arguments, message):
    if "arc_eazy" in arguments or "task.yaml" in arguments:
        pytest.importorskip("lm_eval", reason="lm-eval is the extra `eval`")
    before = {path: path.read_bytes() for path in unloadable.rglob("*") if path.is_file()}
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eora-lab: ")]
    assert message in line
    assert {path: path.read_bytes() for path in unloadable.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", [["evaluate", "model", "--perplexity"], [*COMPRESS, "--calibration.source"]])
def test_a_mirror_that_is_no_folder_is_named_before_a_model_is_loaded(unloadable, monkeypatch, capsys, arguments):
    monkeypatch.setenv("EORA_LAB_DATA", "nowhere")
    assert main([*arguments, "wikitext2:test"]) == 1
    assert "EORA_LAB_DATA is nowhere, which is not a folder" in capsys.readouterr().err


def stopped(module: str, number: signal.Signals) -> tuple[list[str], int]:
    """What a command says and ends with that gets a signal when it has imported a module: -X importtime tells when."""
    command = [sys.executable, "-X", "importtime", "-m", "eora_lab.cli", *EVALUATE]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.rpartition("|")[2].strip() == module)
    process.send_signal(number)
    lines = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    return lines, process.wait()


@pytest.mark.parametrize("module", ["tyro", "torch._C", "torch", "transformers.modeling_utils"])
def test_ctrl_c_is_one_line_at_any_moment(workplace, module):
    assert stopped(module, signal.SIGINT) == (["eora-lab: stopped"], 130)


def test_sigterm_ends_quietly(workplace):
    assert stopped("tyro", signal.SIGTERM) == ([], 143)


@pytest.mark.parametrize("arguments", [["--help"], ["models"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "eora_lab.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_what_a_terminal_cannot_show_is_escaped(workplace, monkeypatch):
    Path("€.txt").write_text(TEXT)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert main(["evaluate", "model", "--perplexity", "€.txt", "--windows", "1", "--window-length", "8"]) == 0
    assert r"tokens of \u20ac.txt" in sys.stdout.buffer.getvalue().decode("latin-1")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("no room for S"), "eora-lab: out of memory: no room for S"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "eora-lab: out of memory: [enforce",
        ),
        (PermissionError(13, "Permission denied", "/etc/secret"), "eora-lab: /etc/secret: Permission denied"),
    ],
)
def test_what_the_machine_fails_at_is_one_line(workplace, monkeypatch, capsys, error, line):
    def failing(residual, statistics, rank):
        raise error

    monkeypatch.setitem(SOLVERS, "failing", failing)
    assert main([*COMPRESS, "--method", "failing"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_a_bug_shows_where_it_is(workplace, monkeypatch):
    monkeypatch.setitem(SOLVERS, "failing", lambda residual, statistics, rank: residual.no_such_name)
    with pytest.raises(AttributeError):
        main([*COMPRESS, "--method", "failing"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "absent"], "no model 'absent'"),
        (["evaluate", "model", "--perplexity", "text.txt", "--window-length", "9000"], "one window needs 9000"),
        (["compress", "run", *SMALL, *TEXTS, "--bits", "9"], "bits must be between 2 and 8"),
        (["compress", "run", *SMALL, *TEXTS, "--group-size", "0"], "group size must be 1 or more"),
        (["compress", "run", *SMALL, *TEXTS, "--sparsity", "2:4"], "gptq does not prune"),
        (["compare", *SMALL, *TEXTS, "--compressor", "wanda"], "wanda needs a sparsity"),
        (["compress", "run", *SMALL, *TEXTS, "--rank", "400"], "rank 400 is larger than"),
        (
            ["compress", "run", *SMALL, *TEXTS, "--budget.objective", "relative", "--budget.only", "x{9}"],
            "no layer matches",
        ),
        (["generate", "model", ""], "prompt is empty"),
    ],
)
def test_errors_are_one_line(workplace, capsys, arguments, message):
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eora-lab: ")]
    assert message in line


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compress", "--bits", "three"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_console_script_passes_the_exit_code_on(tmp_path):
    done = subprocess.run([sys.executable, "-m", "eora_lab.cli", "evaluate", "absent"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("eora-lab: no model 'absent'") and "Traceback" not in done.stderr
