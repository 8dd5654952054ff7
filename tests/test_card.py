"""The card beside every adapter: what is in it comes from the run, and what was not measured is not there."""

import json

import pytest

from eora_lab import Report, load_model
from eora_lab.cli import main
from eora_lab.formats.made_for import read_made_for
from eora_lab.model.digest import files_digest
from eora_lab.run.card import card_text
from tests.tiny import TEXT, calibrated, compress, save_tiny, tiny_tokens

SMALL = ["--compressor", "rtn", "--bits", "3", "--group-size", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model; a run of it with perplexities, of one rank; a ragged one without; a mended checkpoint."""
    folder = tmp_path_factory.mktemp("cards")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    text = [*calibrated(folder / "text.txt"), "--model", str(folder / "model")]
    judged = ["--evaluation.perplexity", str(folder / "text.txt"), "--evaluation.windows", "2"]
    judged += ["--evaluation.window-length", "32"]
    grid = ["--zero-point", "integer", "--scale-dtype", "float16"]
    assert main(["compress", str(folder / "run"), *text, *judged, *SMALL, *grid, "--rank", "8"]) == 0
    model, _ = load_model(folder / "model")
    ranks = {name: i % 5 for i, (name, m) in enumerate(model.named_modules()) if name.endswith("_proj")}
    compress(model, tiny_tokens(), group_size=32, ranks=ranks, folder=folder / "ragged", progress=False)
    assert main(["export", str(folder / "run"), str(folder / "gptq"), "--format", "gptq_v2"]) == 0
    assert main(["mend", str(folder / "gptq"), str(folder / "mended"), *text, "--no-evaluate", "--rank", "4"]) == 0
    return folder


def report_of(run) -> Report:
    return Report.from_json((run / "report.json").read_text())


def test_it_says_what_the_run_measured(place):
    card, report = (place / "run" / "adapter" / "README.md").read_text(), report_of(place / "run")
    made_for = read_made_for(place / "run" / "adapter")
    assert made_for.base == files_digest(place / "model") and made_for.base in card and made_for.weights in card
    ((text, values),) = report.perplexity.items()
    assert f"Perplexity on {text}, 2 windows, with paired 95 % intervals over them:" in card
    assert f"- original model {values['dense']:.2f}\n" in card
    bare, original = (report.ratio(text, "compressed", to) for to in ("bare", "dense"))
    line = f"- compressed, with the adapter {values['compressed']:.2f}: {original} times the original's, {bare} times"
    assert f"{line} that without it\n" in card and f"- compressed, without the adapter {values['bare']:.2f}: " in card
    before = sum(layer.error_before for layer in report.layers) / len(report.layers)
    after = sum(layer.error_after for layer in report.layers) / len(report.layers)
    assert f"{before:.5f} without the adapter, {after:.5f} with it" in card
    assert report.base in card and "eora, rank 8" in card and "4 sequences of 32 tokens" in card


def test_it_tells_no_number_that_was_not_measured(place):
    card = (place / "ragged" / "adapter" / "README.md").read_text()
    assert "Perplexity was not measured." in card and "erplexity on" not in card and "interval" not in card
    assert "rank 0 to 4" in card and "statistics" not in card.split("## What was measured")[0]


def test_a_mended_checkpoint_is_named(place):
    card = (place / "mended" / "adapter" / "README.md").read_text()
    settings = json.loads((place / "mended" / "config.json").read_text())["settings"]
    assert f"gptq, SHA-256 {settings['checkpoint_sha256']}" in card and "BASE is the compressed model, gptq" in card
    assert "eora-lab export" in (place / "run" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("run", "flags", "tools", "others"),
    [
        ("run", ["--universal"], ["peft", "vLLM", "SGLang", "GPTQModel", "llama.cpp"], ["MLX"]),
        ("ragged", ["--universal"], ["peft", "vLLM", "SGLang", "GPTQModel", "llama.cpp"], ["MLX"]),
        ("ragged", [], ["peft", "vLLM"], ["SGLang", "GPTQModel", "MLX"]),
        ("run", ["--format", "gguf"], ["llama.cpp"], ["peft", "vLLM", "SGLang", "GPTQModel", "MLX"]),
        ("run", ["--format", "mlx"], ["MLX"], ["peft", "vLLM", "SGLang", "GPTQModel", "llama.cpp"]),
    ],
)
def test_it_tells_how_to_run_it_only_where_it_runs(run, flags, tools, others, place, tmp_path):
    gguf = "gguf" in flags
    out = tmp_path / ("out.gguf" if gguf else "out")
    assert main(["adapter", "export", str(place / run), str(out), *flags]) == 0
    card = (tmp_path / "out.md" if gguf else out / "README.md").read_text()
    served = card.split("## How to run it")[1]
    assert all(f"\n{tool}:\n" in served for tool in tools)
    assert not any(f"\n{tool}:\n" in served for tool in others)
    commands = [block.strip().splitlines() for block in served.split("\n\n") if block.startswith("    ")]
    assert len(commands) == len(tools) and all(len(lines) <= 4 for lines in commands)
    rank = max(layer.rank for layer in report_of(place / run).layers)
    assert "vLLM" not in tools or f"--max-lora-rank {8 if rank > 1 else 1}" in served


def test_the_same_export_again_has_the_same_bytes(place, tmp_path):
    for _ in range(2):
        assert main(["adapter", "export", str(place / "run"), str(tmp_path / "out")]) == 0
    first = (tmp_path / "out" / "README.md").read_bytes()
    assert main(["adapter", "export", str(place / "run"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_bytes() == first


def test_a_model_of_a_hub_is_named_for_the_hub(place):
    made_for, report = read_made_for(place / "run" / "adapter"), report_of(place / "run")
    card = card_text({"model": "someone/some-model"}, report, made_for, {})
    assert card.startswith("---\nbase_model: someone/some-model\n") and "eora-lab adapter check" in card
    assert not card_text({"model": str(place / "model")}, report, made_for, {}).startswith("---")
