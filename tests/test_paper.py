"""The published figures: every table is there, well formed, and reads as printed."""

import math

import pytest

from eora_lab import EoraLabError
from eora_lab.cli import main
from eora_lab.compensate import SOLVERS
from eora_lab.experiment.checklist import checklist, entry, spell
from eora_lab.experiment.estimate import work
from eora_lab.experiment.paper import COLUMNS, FOLDER, METHODS, TABLES, published
from eora_lab.experiment.paper_runs import RUNNABLE, both_sides, measured, rivalry, table_rows
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand

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


def test_rows_run_the_published_settings_on_another_model():
    rows = table_rows("T2", "some/model", "full")
    assert [(row.base, row.method) for row in rows[:4]] == [
        ("GPTQ 4-bit", method) for method in ("none", "ZeroQuant-V2", "Act-S", "EoRA")
    ]  # ApiQ is trained, and not here
    eora = rows[3]
    assert eora.published == {"wikitext2": 6.80, "arc_challenge": 47.44, "mathqa": 37.21, "gsm8k": 30.70}
    cell = eora.cells["mathqa"]
    assert (cell.recipe.bits, cell.recipe.rank, cell.recipe.group_size, cell.calibration.seqlen) == (4, 128, -1, 2048)
    assert (cell.calibration.source, cell.base_source, cell.tasks) == ("mathqa+c4", "wikitext2", ("mathqa",))
    small = table_rows("T2", "smollm2-135m", "small")[3].cells
    assert set(small) == {"wikitext2", "arc_easy"} and small["arc_easy"].limit == 200
    released = table_rows("T2", "some/model", "full", released=True)[2].cells["mathqa"]
    assert released.recipe.method == "act_s_released" and released.calibration.share == 20 / 64
    assert {row.extra for row in table_rows("T8", "some/model")} >= {"nsamples 16", "nsamples 512"}
    with pytest.raises(EoraLabError, match="T9 cannot be run"):
        table_rows("T9", "some/model")
    with pytest.raises(EoraLabError, match="has no model 'GPT-2'"):
        table_rows("T2", "some/model", published_model="GPT-2")


def test_the_small_rank_sweep_goes_beyond_the_published_one(tmp_path):
    rows = table_rows("T10", "smollm2-135m", "small")
    ranks = [row.cells["wikitext2"].recipe.rank for row in rows if row.method == "EoRA"]
    assert ranks == [16, 32, 64, 128, 256]
    assert [bool(row.published) for row in rows if row.method == "EoRA"] == [True] * 4 + [False]
    assert measured(rows, ResultStore(tmp_path))["rank"].iloc[-1] == ""
    assert max(row.rank for row in table_rows("T10", "some/model", "full")) == 512


def test_published_and_measured_stand_apart(tmp_path):
    """Results are put into a store by hand: the table must show them under "here" and the paper's under "paper"."""
    store, rows = ResultStore(tmp_path), table_rows("T2", "smollm2-135m", "small")[:4]
    for i, row in enumerate(rows):
        losses = [["wikitext2:test", [4.0 - i / 10, 5.0 - i / 10, 6.0 - i / 10]]]
        result = {"perplexity": {"wikitext2:test": 100.0 - i}, "window_losses": losses}
        store.put(row.cells["wikitext2"].config(), {}, result=result)
    store.put(rows[3].cells["arc_easy"].config(), {}, error="no such data")
    frame = measured(rows, store)
    assert frame["paper wikitext2"].tolist() == [7.00, 6.80, 6.82, 6.80]
    assert frame["here wikitext2"].tolist() == ["100.00", "99.00", "98.00", "97.00"]
    assert frame["here arc_easy"].tolist() == ["not run"] * 3 + ["failed"]
    assert frame["here rank"].tolist() == [0, 32, 32, 32] and frame["rank"].tolist() == [0, 128, 128, 128]
    (differences,) = rivalry(rows, store).values()
    intervals = {pair.removeprefix("GPTQ 4-bit, rank 32: against "): found for pair, found in differences.items()}
    assert set(intervals) == {"no compensation", "ZeroQuant-V2", "Act-S"}
    assert intervals["Act-S"].difference == pytest.approx(-0.1)
    assert intervals["no compensation"].difference == pytest.approx(-0.3)
    sides = both_sides(rows, store).query("task == 'wikitext2'").set_index(["source", "method"])
    assert sides.loc["published", "value"].tolist() == frame["paper wikitext2"].tolist()
    assert sides.loc["measured", "value"].tolist() == [100.0, 99.0, 98.0, 97.0]
    assert sides.loc[("published", "eora"), "rank"] == 128 and sides.loc[("measured", "eora"), "rank"] == 32
    assert sides.loc[("measured", "eora"), "low"] == pytest.approx(97 * math.exp(-1 / 3**0.5))  # losses 3.7, 4.7, 5.7


def checked(tmp_path, table="T2"):
    """An entry of the checklist whose cells hold made-up losses: EoRA's are 0.1 below Act-S's, which is below SVD's."""
    store, rows = ResultStore(tmp_path), table_rows(table, "smollm2-135m", "small")
    for i, line in enumerate(row for row in rows if row.base == "GPTQ 4-bit"):
        losses = [["wikitext2:test", [4.0 - i / 10, 5.0 - i / 10, 6.0 - i / 10]]]
        result = {"perplexity": {"wikitext2:test": 100.0 - i}, "window_losses": losses}
        store.put(line.cells["wikitext2"].config(), {}, result=result, cost={"total": 30.0})
    return entry(table, "smollm2-135m", [store])


def test_a_gap_is_measured_minus_published(tmp_path):
    found = checked(tmp_path)
    assert (found.cells, found.done, found.spent) == (16, 4, 120.0)
    cells = expand([cell for row in found.rows for cell in row.cells.values()])
    done = [cell for cell in cells if found.store.get(cell.config())]
    todo = [cell for cell in cells if cell not in done]
    assert found.left == pytest.approx(120.0 * work(todo) / work(done))  # at the pace of those that are done
    assert found.verdict == "3 better of 3"
    pair = found.gaps.query("against == 'Act-S' and task == 'wikitext2 log perplexity'").iloc[0]
    assert pair["published"] == pytest.approx(math.log(6.80 / 6.82))
    assert pair["here"] == pytest.approx(-0.1) and pair["gap"] == pytest.approx(-0.1 - math.log(6.80 / 6.82))
    unmeasured = found.gaps[found.gaps["here"].isna()]
    arc = unmeasured.query("task == 'arc_challenge' and base == 'GPTQ 3-bit' and against == 'no compensation'")
    assert arc["published"].item() == pytest.approx((31.74 - 20.90) / 100)


def test_every_table_is_on_the_checklist_with_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    entries = checklist()
    assert [one.table for one in entries] == list(TABLES)
    assert all(one.shows and one.why and one.command for one in entries)
    runnable = [one for one in entries if one.cells]
    assert {one.table for one in runnable} == set(RUNNABLE)
    known = {one.table: one for one in entries}
    assert known["T2"].done == known["T2"].cells == 16 and known["T2"].left is None  # recorded in the repository
    assert known["T6"].done == 0 and known["T6"].left > 0
    for one in runnable:
        assert 60 < one.gpu_seconds < 86400 and 20e9 < one.gpu_memory < 141e9
    command, _, rest = known["T3"].command.partition(" ")
    assert command == "eora-lab" and rest.startswith("finetune")
    assert main(["paper", "--store", str(tmp_path / "none")]) == 0 and not (tmp_path / "none").exists()
    out = capsys.readouterr().out
    assert all(f"\n{table:4} " in out for table in TABLES) and out.count("(predicted)") == len(RUNNABLE)
    assert "eora-lab paper T6 --scale small" in out


def test_times_are_said_as_people_do():
    assert [spell(seconds) for seconds in (8.0, 90.0, 5400.0)] == ["8 s", "1.5 min", "1.5 h"]
