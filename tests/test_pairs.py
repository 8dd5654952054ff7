"""Differences of two models are paired where both measured the same windows or questions, and nowhere else."""

import re

import numpy as np
import pytest
import tokenizers
import transformers

from eora_lab.cli import main
from eora_lab.errors import EoraLabError
from eora_lab.experiment.paper_runs import rivalry, table_rows
from eora_lab.experiment.store import ResultStore, scores
from eora_lab.plots.scales import figures, metric_name
from eora_lab.run.intervals import Outcomes, paired
from tests.tiny import begins_texts, save_tiny, tiny_tokenizer

REFUSED = "no paired interval: the windows or questions are not the same"
WINDOWS = ["--perplexity", "text.txt", "--windows", "3", "--window-length", "16"]


@pytest.fixture
def others(workplace):
    """Models beside the one of the workplace: with its own weights, with another tokenizer, with a BOS token."""
    save_tiny("same", seed=1)
    save_tiny("words", seed=1)
    vocabulary = tiny_tokenizer().get_vocab()
    pairs = {"qu": vocabulary.pop("Y"), "th": vocabulary.pop("Z")}
    merges = [tuple(pair) for pair in pairs]
    inside = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary | pairs, merges=merges, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inside, **names).save_pretrained("words")
    save_tiny("begun", seed=1)
    begins_texts(tiny_tokenizer()).save_pretrained("begun")
    return workplace


def test_outcomes_of_the_same_are_paired():
    a, b = Outcomes("x", [1.0, 2.0, 3.0]), Outcomes("x", [2.0, 3.0, 4.0])
    assert paired(a, b).difference == 1.0
    with pytest.raises(EoraLabError, match=REFUSED):
        paired(a, Outcomes("y", b.scores))


def test_evaluate_against_a_model_with_another_tokenizer(others, capsys):
    assert main(["evaluate", "model", "--against", "same", *WINDOWS]) == 0
    assert re.search(r"^log perplexity on text.txt [+-]\d\.\d+ \[", capsys.readouterr().out, re.M)
    for other in ("words", "begun"):
        assert main(["evaluate", "model", "--against", other, *WINDOWS]) == 0
        out = capsys.readouterr().out
        assert out.count("perplexity ") == 3 and f"log perplexity on text.txt: {REFUSED}" in out


def test_a_sweep_over_models_pairs_those_with_the_same_tokens(others, capsys):
    grid = "model: [model, same, words]\ncompressor: dense\nperplexity: text.txt\nwindows: 3\nwindow_length: 16\n"
    (others / "grid.yaml").write_text(grid)
    assert main(["sweep", "grid.yaml", "--store", "store", "--paired"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^row 1: log perplexity text.txt [+-]\d\.\d+ \[", out, re.M)
    assert f"row 2: log perplexity text.txt: {REFUSED}" in out


def test_a_cell_says_that_its_texts_begin_with_a_token(others):
    grid = "model: [model, begun]\ncompressor: dense\nperplexity: text.txt\nwindows: 3\nwindow_length: 16\n"
    (others / "grid.yaml").write_text(grid)
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 0
    found = {cell["config"]["model"]: cell["result"].get("bos") for cell in ResultStore("store").cells()}
    assert found == {"model": None, "begun": "<bos>"}
    begins_texts(tiny_tokenizer()).save_pretrained("model")  # the same weights
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 0
    assert {cell["result"].get("bos") for cell in ResultStore("store").cells()} == {"<bos>"}


def test_other_questions_are_not_paired(tmp_path):
    store = ResultStore(tmp_path)
    for limit, questions in ((1, ["a", "b"]), (2, ["a", "c"])):
        task = {"metric": "acc", "num_fewshot": 0, "questions": questions, "outcomes": [1.0, 0.0]}
        store.put({"limit": limit}, {}, result={"tasks": {"arc_easy": task}})
    first, second = (scores(store.get({"limit": limit}))["arc_easy acc"] for limit in (1, 2))
    with pytest.raises(EoraLabError, match=REFUSED):
        paired(first, second)


def test_margins_are_paired_beside_accuracy_where_a_cell_has_them(tmp_path):
    store, rows = ResultStore(tmp_path), table_rows("T2", "smollm2-135m", "small")[:4]
    for i, row in enumerate(rows):
        task = {"metric": "acc", "num_fewshot": 0, "questions": ["a", "b", "c"], "outcomes": [1.0, 0.0, 0.0]}
        if row.method != "none":  # measured before there were margins
            task |= {"margin": i - 1.0, "margin_stderr": 1.0, "margins": [i + 0.0, i - 1.0, i - 2.0]}
        store.put(row.cells["arc_easy"].config(), {}, result={"tasks": {"arc_easy": task}})
    found = rivalry(rows, store)
    score, margin = (next(what for what in found if words in what) for words in ("mean score", "margin"))
    assert len(found[score]) == 3 and not any(interval.decided for interval in found[score].values())
    assert {pair.rpartition(" ")[2]: one.difference for pair, one in found[margin].items()} == {
        "ZeroQuant-V2": pytest.approx(2.0), "Act-S": pytest.approx(1.0),
    }  # fmt: skip
    assert all(interval.decided for interval in found[margin].values())
    frame = store.frame()
    assert sorted(frame["tasks.arc_easy.margin"].dropna()) == [0.0, 1.0, 2.0]
    assert not any(name.endswith("margins") for name in frame)
    values, low, high = figures(frame, "tasks.arc_easy.margin")
    assert np.nanmax(values) == 2 and np.nanmax(low) == 1 and np.nanmax(high) == 3
    assert "nats" in metric_name(frame, "tasks.arc_easy.margin")


def test_a_rival_with_other_tokens_is_left_out_with_a_word(tmp_path):
    store, rows = ResultStore(tmp_path), table_rows("T2", "smollm2-135m", "small")[:4]
    for i, row in enumerate(rows):
        losses, tokens = [["wikitext2:test", [4.0 - i / 10, 5.0, 6.0]]], [["wikitext2:test", "x" if i else "y"]]
        result = {"perplexity": {"wikitext2:test": 100.0}, "window_losses": losses, "window_tokens": tokens}
        store.put(row.cells["wikitext2"].config(), {}, result=result)
    with pytest.warns(UserWarning, match=f"against no compensation: {REFUSED}"):
        (pairs,) = rivalry(rows, store).values()
    assert {pair.rpartition(" ")[2] for pair in pairs} == {"ZeroQuant-V2", "Act-S"}
