"""The command line as users meet it: help, results, exit codes, one-line errors."""

import json
import re
import subprocess
import sys

import pytest

from eora_lab.cli import COMMANDS, main

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "absent"], "no model 'absent'"),
        (["evaluate", "model", "--perplexity", "wikipedia"], "unknown source 'wikipedia'"),
        (["evaluate", "model", "--perplexity", "text.txt", "--window-length", "9000"], "one window needs 9000"),
        (["compress", "run", *SMALL, *TEXTS, "--bits", "9"], "bits must be between 2 and 8"),
        (["compress", "run", *SMALL, *TEXTS, "--group-size", "0"], "group size must be 1 or more"),
        (["compress", "run", *SMALL, *TEXTS, "--sparsity", "2:4"], "gptq does not prune"),
        (["compare", *SMALL, *TEXTS, "--compressor", "wanda"], "wanda needs a sparsity"),
        (["compress", "run", *SMALL, *TEXTS, "--rank", "400"], "rank 400 is larger than"),
        (["compress", "model", *SMALL, *TEXTS], "not empty and holds no run"),
        (["compress", "text.txt/run", *SMALL, *TEXTS], "cannot write"),
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
