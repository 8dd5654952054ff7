"""The best combination fills up what was left open, and a result says what it needed."""

import json
import re

import pytest

from eora_lab import Budget, EoraLabError, Recipe, best_recipe
from eora_lab.cli import main
from eora_lab.experiment.cells import Cell
from eora_lab.run.best import BEST, BEST_BUDGET
from eora_lab.run.folder import read_report
from eora_lab.run.tiers import TIERS, tier
from tests.tiny import TEXT, calibrated, compress, save_tiny, tiny_model, tiny_tokens


def test_what_is_given_stays_and_the_rest_is_filled_up():
    recipe, budget = best_recipe()
    assert {name: getattr(recipe, name) for name in BEST} == BEST
    assert {name: getattr(budget, name) for name in BEST_BUDGET} == BEST_BUDGET
    recipe, budget = best_recipe(Recipe("rtn", bits=3, rank=8, held_out=0.25), Budget(multiple=4))
    assert (recipe.compressor, recipe.bits, recipe.rank, recipe.held_out) == ("rtn", 3, 8, 0.25)
    assert recipe.inputs == BEST["inputs"] and budget == Budget(**BEST_BUDGET, multiple=4)


def test_what_is_given_by_name_is_checked_once_it_is_filled_up():
    assert best_recipe({"distil": True, "bits": 3})[0] == Recipe(**BEST, distil=True, bits=3)
    with pytest.raises(EoraLabError, match="unknown method 'eoro'"):
        best_recipe({"distil": True, "method": "eoro"})


@pytest.mark.parametrize(
    ("settings", "about", "wanted"),
    [
        ({"method": "svd"}, {}, 0),
        ({"method": "none"}, {"spreads": True}, 0),
        ({"method": "svd", "inputs": "original"}, {"spreads": True}, 1),
        ({"method": "svd"}, {"given": True}, 0),
        ({"method": "svd"}, {"given": True, "reround": True}, 2),
        ({"method": "svd", "factor_bits": 4}, {}, 2),
        ({"method": "svd", "factor_bits": 4, "refit": False}, {}, 0),
        ({"compressor": "gptq", "method": "none"}, {}, 2),
        ({"compressor": "gptq", "method": "none", "inputs": "original"}, {}, 1),
        ({"inputs": "original"}, {}, 1),
        ({}, {}, 2),
        ({"inputs": "drift", "held_out": 0.25}, {}, 2),
        ({"method": "eora_fisher", "inputs": "original"}, {}, 3),
        ({"method": "svd", "distil": True, "held_out": 0.25}, {}, 3),
    ],
)
def test_a_tier_is_what_the_neediest_part_needs(settings, about, wanted):
    recipe = Recipe(**{"compressor": "rtn"} | settings)
    assert tier(recipe, **about) == TIERS[wanted]


def test_a_report_and_a_cell_name_their_tier():
    report = compress(tiny_model("llama"), tiny_tokens(), rank=8, group_size=32, method="svd", progress=False)
    assert report.tier == TIERS[0] and f"tier {TIERS[0]}\n" in report.summary()
    assert "distil" not in Cell(recipe=Recipe()).config()  # older cells stay what they are


def test_the_best_recipe_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny("model")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    given = ["--model", "model", "--distil", "--rank", "8", *calibrated("text.txt", 16), "--no-evaluate"]
    assert main(["compress", "run", *given]) == 1
    assert "eora-lab: how far to distil is found on held-out samples" in capsys.readouterr().err
    assert main(["compress", "run", *given, "--recipe", "best"]) == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert {name: settings[name] for name in BEST} == BEST and settings["rank"] == 8
    assert settings["distil"] and read_report(tmp_path / "run").distilled
    assert settings["budget"]["objective"] == BEST_BUDGET["objective"]
    assert read_report(tmp_path / "run").tier == TIERS[3]
    assert re.search(r"tier 3: backward passes", capsys.readouterr().out)
