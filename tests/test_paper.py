"""The published figures: every table is there, well formed, and reads as printed."""

import pytest

from eora_lab import EoraLabError
from eora_lab.compensate import SOLVERS
from eora_lab.paper import COLUMNS, FOLDER, METHODS, TABLES, published

EXTRA = {"T3": "finetuned", "T8": "nsamples", "T9": "kernel", "T11": "finetuned", "T12": "data_share"}
EXTRA |= {"T13": "factor_bits", "T17": "layer"}


@pytest.mark.parametrize("table", [*TABLES, "abstracts"])
def test_schema(table):
    frame = published(table)
    assert set(frame) == {*COLUMNS, *([EXTRA[table]] if table in EXTRA else [])}
    keys = [name for name in frame if name not in ("value", "note", "source")]
    assert len(frame) and not frame.duplicated(keys).any()
    assert frame["value"].notna().all() and (frame["value"] >= 0).all()
    assert frame["source"].str.match(r"arXiv:2410\.21271v\d ").all()
    assert frame.loc[frame["unit"] == "%", "value"].between(0, 100).all()
    none = frame["method"] == "none"
    assert (frame.loc[none, "rank"] == 0).all()
    assert not (frame.loc[~none, "rank"] == 0).any()


def test_no_file_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.csv")} == {*TABLES, "abstracts"}


@pytest.mark.parametrize(
    ("table", "row", "value"),
    [
        ("T1", {"model": "LLaMA3-8B", "base": "dense", "task": "wikitext2"}, 6.13),
        ("T4", {"model": "LLaMA2-13B", "base": "SparseGPT 2:4", "method": "ApiQ", "task": "gsm8k"}, 12.13),
        ("T2", {"model": "LLaMA3-8B", "base": "GPTQ 3-bit", "method": "none", "task": "wikitext2"}, 15.64),
        ("T2", {"model": "LLaMA3-8B", "base": "GPTQ 3-bit", "method": "EoRA", "task": "arc_challenge"}, 31.74),
        ("T5", {"model": "LLaMA2-13B", "base": "GPTQ 3-bit", "method": "EoRA", "task": "gsm8k"}, 15.08),
        ("T6", {"model": "LLaMA3-8B", "method": "none", "task": "wikitext2"}, 86.15),
        ("T7", {"method": "EoRA", "task": "arc_challenge"}, 34.81),
        ("T8", {"base": "GPTQ 3-bit", "nsamples": 512, "task": "mathqa"}, 30.40),
        ("T9", {"base": "3-bit", "rank": 128, "kernel": "yes"}, 43),
        ("T10", {"model": "LLaMA3-8B", "method": "EoRA", "rank": 512, "task": "gsm8k"}, 23.28),
        ("T11", {"base": "GPTQ 3-bit", "method": "LoftQ", "task": "mathqa"}, 48.17),
        ("T12", {"method": "EoRA", "data_share": "30%", "task": "mathqa"}, 44.79),
        ("T13", {"base": "GPTQ 3-bit", "rank": 512, "factor_bits": 3, "task": "mathqa"}, 30.45),
        ("T14", {"base": "GPTQ 3-bit", "method": "Act-S"}, 0.1286),
        ("T15", {"base": "GPTQ 4-bit", "method": "none"}, 24.16),
        ("T16", {"base": "GPTQ 3-bit g128", "method": "EoRA"}, 35.10),
        ("T17", {"method": "none", "layer": 30}, 11.5),
        ("T18", {"base": "GPTQ 4-bit", "method": "SLiM"}, 35.90),
        ("T19", {"method": "RILQ+EoRA-init"}, 38.90),
    ],
)
def test_figures(table, row, value):
    frame = published(table)
    for column, wanted in row.items():
        found = frame[column].astype("str") == str(wanted)
        frame = frame[found | (frame[column].astype("str") == f"{wanted}.0")]
    assert frame["value"].tolist() == [value]


def test_odd_figures_carry_a_note():
    base = published("T15").query("base == 'GPTQ 4-bit' and method == 'none'")
    assert "chance" in base["note"].item()
    copied = published("T6").query("model == 'LLaMA2-7B' and method == 'ApiQ' and task == 'wikitext2'")
    assert "copy error" in copied["note"].item()


def test_methods_are_this_packages():
    names = set(published("T18")["method"]) | set(published("T2")["method"])
    assert set(METHODS) <= names and set(METHODS.values()) <= set(SOLVERS)


def test_an_unknown_table_is_refused():
    with pytest.raises(EoraLabError, match="no table 'T20'"):
        published("T20")
