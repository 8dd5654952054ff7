"""Stores and sweeps on a tiny model: what is kept, what is shared, and what a kill, an error or damage does."""

import json
import os
import random
import re
import string
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import DEVNULL

import pandas
import pytest
import torch

from eora_lab import EoraLabError, calibration_batches, load_model, perplexity, token_windows
from eora_lab.cli import main
from eora_lab.compensate import SOLVERS, svd
from eora_lab.errors import MachineError, WriteError
from eora_lab.experiment.cache import ContentCache
from eora_lab.experiment.cells import Cell
from eora_lab.experiment.estimate import work
from eora_lab.experiment.running import running
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, highest_ranks, named_grids, on_model, plan, read_grid, run_plan, sweep
from eora_lab.progress import Stopped
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import BaseSettings
from tests.tiny import CELL, TEXT, compress, moe_model, tiny_model, tiny_tokenizer, tiny_tokens

ROOT = Path(__file__).parents[1]
SMALL = CELL | {"bits": 3}
GRID = SMALL | {"compressor": ["rtn", "gptq"], "bits": [2, 3], "method": ["svd", "eora"], "rank": [2, 4, 8]}  # 24 cells


def contents(folder: Path) -> dict[str, dict]:
    """Everything in a store but what differs from run to run."""
    cells = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {key: value for key, value in cell.items() if key != "cost"} for name, cell in cells.items()}


def quiet_sweep(grid, folder, **options):
    return sweep(grid, folder, announce=lambda plan: None, **options)


# --- grids ---------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_without_repeats():
    grid = [
        {"compressor": "dense", "nsamples": [8, 16], "seed": [0, 1]},
        {"method": ["none", "eora"], "rank": [4, 8], "bits": [3, 4]},
    ]
    cells = expand(grid)
    assert [cell.recipe is None for cell in cells] == [True] + [False] * 6  # dense and none have no rank
    assert {(c.recipe.bits, c.recipe.method, c.recipe.rank) for c in cells[1:]} == {
        (bits, *rest) for bits in (3, 4) for rest in (("none", 0), ("eora", 4), ("eora", 8))
    }
    assert [Cell.from_config(cell.config()).config() for cell in cells] == [cell.config() for cell in cells]
    assert expand({"perplexity": ["a.txt", "b.txt"], "tasks": ["arc_easy"]})[0].evaluation.perplexity == (
        "a.txt",
        "b.txt",
    )


def test_the_named_grids_are_well_formed():
    assert set(named_grids()) == {
        "rank", "calibration-size", "source", "inputs", "group-size", "factor-bits", "modules", "equal-bytes",
        "task-mix", "rivals", "formats", "beyond", "front", "front-small",
    }  # fmt: skip
    for name in named_grids():
        cells = expand(read_grid(name))
        assert len(cells) >= 4 and {cell.model for cell in cells} == {"smollm2-135m"}
        assert {cell.model for cell in expand(on_model(read_grid(name), "other"))} == {"other"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"bitz": 3}, "unknown setting 'bitz'"),
        ({"bits": "three"}, "bits must be a whole number or nothing, not 'three'"),
        ({"source": 124}, "needs quotes in YAML"),
        ({"bits": []}, "empty"),
        ({"limit": 0}, "limit must be 1 or more, not 0"),
        ({"num_fewshot": -1}, "num_fewshot must be 0 or more, not -1"),
        ({"windows": -2}, "windows must be 1 or more, not -2"),
        ({"window_length": 1}, "window_length must be 2 or more, not 1"),
        ({"nsamples": 0}, "nsamples must be 1 or more, not 0"),
        ({"seed": 2**70}, "seed must be a number of 64 bits"),
        ({"seqlen": 32.5}, "seqlen must be a whole number, not 32.5"),
        (["rtn"], "mapping"),
    ],
)
def test_a_grid_that_cannot_be_understood_is_refused(grid, message):
    with pytest.raises(EoraLabError, match=message):
        expand(grid)


def test_cells_that_differ_in_rank_alone_share_a_solve():
    cells = expand({"method": ["svd", "eora"], "rank": [4, 16], "bits": 3}) + expand({"rank": 8, "bits": 4})
    assert sorted(highest_ranks(cells).values()) == [8, 16, 16, 16, 16]


# --- what a sweep measures -----------------------------------------------------------------------------------------


def test_shared_cells_are_what_compress_model_gives(workplace):
    """Sharing statistics, weights and solves must not show in the numbers."""
    grid = SMALL | {"compressor": "gptq", "method": ["none", "eora"], "rank": [4, 8], "held_out": 0.25}
    frame = quiet_sweep(grid, "store")
    windows = token_windows(tiny_tokenizer(), "text.txt", 2, 32)
    for _, row in frame.iterrows():
        model, tokenizer = load_model("model")
        batches = calibration_batches(tokenizer, "text.txt", 4, 32)
        settings = {"compressor": "gptq", "group_size": 32, "inputs": "original", "held_out": 0.25, "progress": False}
        report = compress(model, batches, method=row["method"], rank=int(row["rank"]), **settings)
        assert row["perplexity.text.txt"] == pytest.approx(perplexity(model, windows), rel=1e-4)
        assert row["nbytes"] == report.nbytes
        after = sum(layer.error_after for layer in report.layers) / len(report.layers)
        assert row["output_error.after"] == pytest.approx(after, rel=1e-3)
        held_out = sum(layer.held_out_after for layer in report.layers) / len(report.layers)
        assert row["held_out_error.after"] == pytest.approx(held_out, rel=1e-3)


@pytest.mark.parametrize("settings", [
    {"compressor": "gptq", "inputs": "original"},
    {"compressor": "sparsegpt", "sparsity": "2:4", "inputs": "original", "held_out": 0.25},
    {"compressor": "gptq", "inputs": "compensated"},
    {"compressor": "gptq", "inputs": "original", "budget": "relative"},
])  # fmt: skip
def test_a_cell_is_what_compress_model_gives_also_where_no_token_came(workplace, monkeypatch, settings):
    """Layer by layer, on a mixture of which one expert sees a token a batch and another none."""
    monkeypatch.setattr("eora_lab.experiment.cells.load", lambda *_: (moe_model(), tiny_tokenizer(), "moe"))
    quiet_sweep(SMALL | {"rank": 8} | settings, "store")
    (cell,) = ResultStore("store").cells()
    budget = {"ranks": Budget(settings["budget"])} if "budget" in settings else {}
    own = {name: value for name, value in settings.items() if name != "budget"} | budget
    batches = calibration_batches(tiny_tokenizer(), "text.txt", 4, 32)
    report = compress(moe_model(), batches, **own, group_size=32, rank=8, progress=False)
    assert cell["error"] == "" and len(cell["result"]["layers"]) == len(report.layers) == 26
    for (name, rank, before, after), layer in zip(cell["result"]["layers"], report.layers, strict=True):
        assert (name, rank) == (layer.name, layer.rank)
        assert (before, after) == pytest.approx((layer.error_before, layer.error_after), rel=1e-4)
        assert before < 0.5  # no weight was set to zero
    assert cell["result"]["data_free"] == [layer.name for layer in report.layers if layer.data_free]
    assert {name.split("experts.")[1][0] for name in cell["result"]["data_free"]} == {"1", "2"}


def test_every_setting_of_the_base_gives_a_base_of_its_own(workplace):
    """And settings of the path give none: what cells share is keyed by all that it depends on."""
    other = {
        "compressor": "rtn", "bits": 4, "group_size": 16, "sym": True, "mse": True, "zero_point": "integer",
        "scale_dtype": "float16", "desc_act": False, "sparsity": "1:4", "grid": "mxfp4",
    }  # fmt: skip
    assert set(other) == {field.name for field in fields(BaseSettings)}
    for name, value in other.items():
        base = {"compressor": "gptq"} if name != "sparsity" else {"compressor": "wanda", "sparsity": "2:4"}
        base |= {"bits": 4} if name == "grid" else {}
        quiet_sweep(
            [SMALL | base | {"method": "none"}, SMALL | base | {"method": "none", name: value}], f"stores/{name}"
        )
        assert len([p for p in Path(f"stores/{name}/cache/weights").iterdir() if p.is_dir()]) == 2, name
    path = {"method": ["svd", "eora"], "rank": [4, 8], "factor_bits": [4, 16], "refit": [True, False]}
    quiet_sweep(SMALL | path, "stores/path")
    assert len([p for p in Path("stores/path/cache/weights").iterdir() if p.is_dir()]) == 1


def test_the_first_windows_in_place_of_random_ones(workplace):
    frame = quiet_sweep(SMALL | {"first": [True, False], "rank": 4}, "store")
    expected = {}
    for first in (True, False):
        tokens = token_windows(tiny_tokenizer(), "text.txt", 4, 32) if first else None
        batches = calibration_batches(tiny_tokenizer(), "text.txt", 4, 32) if tokens is None else tokens
        report = compress(load_model("model")[0], batches, group_size=32, inputs="original", rank=4, progress=False)
        expected[first] = sum(layer.error_after for layer in report.layers) / len(report.layers)
    assert expected[True] != pytest.approx(expected[False], rel=1e-3)
    assert dict(zip(frame["first"], frame["output_error.after"], strict=True)) == pytest.approx(expected, rel=1e-4)


def test_the_compressor_may_have_a_text_of_its_own(workplace):
    Path("other.txt").write_text(string.printable * 20)
    grid = SMALL | {"compressor": "gptq", "method": ["none", "eora"], "rank": 8}
    one, both, other = (quiet_sweep(grid | change, f"store{i}") for i, change in enumerate((
        {}, {"base_source": "text.txt", "source": "other.txt"}, {"source": "other.txt"},
    )))  # fmt: skip
    none = [frame["perplexity.text.txt"][0] for frame in (one, both, other)]
    assert none[0] == none[1] != none[2]  # the base depends on its own text alone
    assert both["perplexity.text.txt"][1] != one["perplexity.text.txt"][1]
    with pytest.raises(EoraLabError, match="a base_source needs"):
        expand(grid | {"base_source": "text.txt", "inputs": "compensated"})


def test_compensated_inputs_and_a_choice_of_layers(workplace):
    grid = SMALL | {"inputs": "compensated", "bits": 2, "rank": 8, "rank_only": ["", "down_proj"]}
    frame = quiet_sweep([SMALL | {"compressor": "dense"}, grid], "store")
    dense, whole, part = (row for _, row in frame.iterrows())
    assert dense["perplexity.text.txt"] == pytest.approx(
        perplexity(load_model("model")[0], token_windows(tiny_tokenizer(), "text.txt", 2, 32))
    )
    assert part["nbytes"] < whole["nbytes"] and part["output_error.after"] > whole["output_error.after"]
    layers = next(c["result"]["layers"] for c in ResultStore("store").cells() if c["config"].get("rank_only"))
    assert {name: rank for name, rank, *_ in layers if rank} == dict.fromkeys(
        (f"model.layers.{i}.mlp.down_proj" for i in (0, 1)), 8
    )


def test_one_calibration_pass_one_base_and_one_solve_serve_many_cells(workplace):
    quiet_sweep(GRID, "store")
    cache = Path("store/cache")
    assert len(list((cache / "statistics").glob("*/index.json"))) == 1
    assert len([p for p in (cache / "weights").iterdir() if p.is_dir()]) == 4  # rtn and gptq at 2 and 3 bits
    assert len([p for p in (cache / "solves").iterdir() if p.is_dir()]) == 8  # each with svd and eora, at rank 8
    statistics = next((cache / "statistics").glob("*/"))
    assert len(list(statistics.glob("*.safetensors"))) == 2 * 4  # inputs, not linears


def test_tasks_are_measured_and_kept_question_by_question(workplace):
    pytest.importorskip("lm_eval", reason="lm-eval is the extra `eval`")
    frame = quiet_sweep(SMALL | {"method": "none", "tasks": ["exemplars"], "limit": 5}, "store")
    assert 0 <= frame["tasks.exemplars.value"].item() <= 1 and frame["tasks.exemplars.chance"].item() == 0.25
    (cell,) = ResultStore("store").cells()
    task = cell["result"]["tasks"]["exemplars"]
    assert len(task["outcomes"]) == len(task["questions"]) == 5
    assert "within noise of chance" in task["warning"]  # a random model


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_failing_cell_is_recorded_and_the_others_run(workplace):
    grid = SMALL | {"rank": [4, 500], "source": ["text.txt", "absent.txt"]}
    frame = quiet_sweep(grid, "store")
    assert frame["status"].tolist().count("done") == 1
    errors = " ".join(frame["error"])
    assert "rank 500 is larger than" in errors and "unknown source 'absent.txt'" in errors
    store, cells = ResultStore("store"), expand(grid)
    assert (plan(cells, store).failed, len(plan(cells, store).todo)) == (3, 0)
    tried = {path: path.stat().st_mtime_ns for path in Path("store").glob("*.json")}
    quiet_sweep(grid, "store")
    assert tried == {path: path.stat().st_mtime_ns for path in Path("store").glob("*.json")}  # not again unasked
    quiet_sweep(grid, "store", retry_failed=True)
    assert sum(path.stat().st_mtime_ns != at for path, at in tried.items()) == 3
    Path("absent.txt").write_text(TEXT)  # another text of that name than before: none
    assert quiet_sweep(grid, "store")["status"].tolist().count("done") == 2


@pytest.mark.parametrize("error", [MemoryError("none left"), OSError(28, "No space left on device"), MachineError("x")])
def test_what_the_machine_failed_is_not_kept(workplace, monkeypatch, capsys, error):
    """And is run again; what failed for reasons of its own is not."""
    troubles = [error, ValueError("a singular matrix")]

    def solver(residual, statistics, rank):
        if troubles:
            raise EoraLabError("the solver gave up") from troubles.pop(0)
        return svd(residual, statistics, rank)

    monkeypatch.setitem(SOLVERS, "troubled", solver)
    grid = SMALL | {"method": "troubled", "rank": 4, "seed": [0, 1, 2]}  # each seed has statistics of its own
    frame = quiet_sweep(grid, "store")
    told = re.compile(r"(\d) cells? failed: .*the solver gave up")
    assert sorted(frame["status"]) == ["done", "failed"]
    assert sum(map(int, told.findall(capsys.readouterr().err))) == 2
    left = plan(expand(grid), ResultStore("store"))
    assert (left.failed, len(left.todo)) == (1, 1)
    assert sorted(quiet_sweep(grid, "store")["status"]) == ["done", "done", "failed"]
    assert told.findall(capsys.readouterr().err) == ["1"]  # before


def test_a_store_that_cannot_be_written_stops_a_sweep(workplace, monkeypatch, capsys):
    def solver(residual, statistics, rank):
        raise WriteError("cannot write store/cache: No space left on device")

    monkeypatch.setitem(SOLVERS, "full", solver)
    Path("grid.yaml").write_text(json.dumps(SMALL | {"method": "full", "seed": [0, 1]}))
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("eora-lab: ") and last.endswith("cannot write store/cache: No space left on device")
    assert not list(Path("store").glob("*.json"))


def test_failed_cells_show_in_the_exit_code_with_each_reason_once(workplace, capsys):
    grid = SMALL | {"method": ["svd", "eora"], "rank": [4, 500]}
    Path("grid.yaml").write_text(json.dumps(grid))
    for arguments in ([], ["--retry-failed"], []):  # fails, again, and stays failed
        assert main(["sweep", "grid.yaml", "--store", "store", *arguments]) == 3
        found = re.findall(r"^(\d+) cells? failed: (.*)", capsys.readouterr().err, re.M)
        assert found == [("2", "rank 500 is larger than any layer allows: at most 64")]
    assert main(["sweep", "grid.yaml", "--store", "store", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "2 failed before" in captured.out and "rank 500 is larger" in captured.err
    Path("grid.yaml").write_text(json.dumps(grid | {"rank": [500, 501]}))  # no cell is done
    assert main(["sweep", "grid.yaml", "--store", "other", "--figure", "f.png"]) == 3


def test_data_that_is_missing_is_asked_for_again(workplace, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EORA_LAB_DATA", str(workplace))
    Path("grid.yaml").write_text(json.dumps(SMALL | {"method": "none", "source": ["text.txt", "wikitext2:test"]}))
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 3
    assert "1 cell failed: no data for Salesforce/wikitext" in capsys.readouterr().err
    assert [cell["status"] for cell in ResultStore("store").cells()] == ["done"]
    place = Path("Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")
    place.parent.mkdir(parents=True)
    pandas.DataFrame({"text": [TEXT]}).to_parquet(place)
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 0


def test_a_sweep_killed_three_times_ends_like_an_undisturbed_one(workplace):
    quiet_sweep(GRID, "undisturbed")
    assert len(contents(Path("undisturbed"))) == 24
    Path("grid.json").write_text(json.dumps(GRID))
    code = "import json; from eora_lab.experiment import sweep; sweep(json.load(open('grid.json')), 'killed')"
    moments = random.Random(0)
    for cells in (1, 6, 14):  # any moment after these: between cells, in a cell, while a file is written
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=DEVNULL)
        while len(list(Path("killed").glob("*.json"))) < cells:
            assert child.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        child.kill()
        child.wait()
        before = {path: path.stat().st_mtime_ns for path in Path("killed").glob("*.json")}
        assert cells <= len(before) < 24
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_sweep(GRID, "killed")
    aside = [str(warning.message) for warning in caught if "cannot be used" in str(warning.message)]
    assert all("cache" in message for message in aside)  # a kill leaves nothing but half-made cache entries
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())  # nothing done twice
    assert contents(Path("killed")) == contents(Path("undisturbed"))
    assert not list(Path("killed").glob(".*")) or all(p.name.endswith(".partial") for p in Path("killed").glob(".*"))


@pytest.mark.parametrize("inputs", ["original", "compensated"])
def test_who_watches_a_cell_can_stop_it_at_every_step_and_it_goes_on(workplace, inputs):
    """Nothing half made is kept, and the numbers in the end are the same."""
    grid = SMALL | {"compressor": "gptq", "rank": 4, "inputs": inputs}
    quiet_sweep(grid, "undisturbed")
    cells, store = expand(grid), ResultStore("store")
    told: list[str] = []
    noted: list[str] = []

    def stop_one_step_later(step):
        noted.append(str(step))
        if len(noted) > len(told):
            raise Stopped

    for _ in range(100):
        noted.clear()
        if list(run_plan(plan(cells, store), cells, store, watch=stop_one_step_later)):
            break
        assert list(store.cells()) == [] and running(store) == []
        told.append(noted[-1])
    assert {"load", "compress, block 2 of 2"} <= set(told), told
    assert any(one.startswith("perplexity") for one in told), told
    assert ("statistics, block 2 of 2" in told) == (inputs == "original")
    assert contents(Path("store")) == contents(Path("undisturbed"))


def test_a_watcher_that_stopped_in_a_cell_loses_no_layer_that_was_finished(workplace):
    cells, store = expand(SMALL | {"compressor": "gptq", "rank": 4}), ResultStore("store")

    def stop_at_the_second_block(step):
        if str(step) == "compress, block 2 of 2":
            raise Stopped

    assert list(run_plan(plan(cells, store), cells, store, watch=stop_at_the_second_block)) == []
    kept = {path: path.stat().st_mtime_ns for path in Path("store/cache").rglob("*.safetensors")}
    assert len([path for path in kept if "solves" in path.parts]) == 7  # the layers of the first block
    assert list(run_plan(plan(cells, store), cells, store)) == [""]
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def test_what_runs_can_be_seen_from_elsewhere(workplace):
    """By another process, too: it is in a file of the store, as long as the cell runs."""
    cells, store, seen = expand(SMALL | {"rank": 4}), ResultStore("store"), []
    assert list(run_plan(plan(cells, store), cells, store, watch=lambda _: seen.extend(running(store)))) == [""]
    assert seen and {one.cell.config() == cells[0].config() for one in seen} == {True}
    assert seen[0].step.what == "load" and seen[0].began <= seen[0].heard
    assert running(store) == []
    Path("store/running").mkdir(exist_ok=True)
    Path(f"store/running/{'0' * 24}.json").write_text('{"config": {"bitz": 3}}')  # none of ours
    assert running(store) == []


def test_a_sweep_stops_in_time_and_says_what_is_left(workplace):
    grid, plans = SMALL | {"method": ["svd", "eora"], "rank": [2, 4]}, []
    frame = sweep(grid, "store", announce=plans.append, until=datetime.now() - timedelta(seconds=1))
    assert frame.empty and [(one.done, len(one.todo)) for one in plans] == [(0, 4), (0, 4)]
    frame = sweep(grid, "store", announce=plans.append, until=datetime.now() + timedelta(hours=1))
    assert frame["status"].tolist() == ["done"] * 4 and len(plans) == 3


def test_the_plan_says_what_is_left_and_refuses_what_cannot_fit(workplace, monkeypatch):
    store, cells = ResultStore("store"), expand(GRID)
    first = plan(cells, store)
    assert (len(first.todo), first.done) == (24, 0) and first.basis == "rough" and first.seconds > 0
    weights = sum(p.numel() * 4 for p in tiny_model("llama").parameters())
    moments = 4 * (3 * 64**2 + 128**2)  # float32, of the four inputs of a block
    assert 2 * weights + 2 * moments < first.memory < 2 * (2 * weights + 2 * moments + 6 * 8 * 128**2)
    block_by_block = plan(expand(GRID | {"inputs": "compensated"}), store).memory
    assert moments / 2 < first.memory - block_by_block < 2 * moments  # holds those of one block in place of two
    quiet_sweep(GRID | {"bits": 3}, store)
    second = plan(cells, store)
    assert (len(second.todo), second.done, second.basis) == (12, 12, "from finished cells")
    assert "12 done" in str(second) and "12 to run" in str(second)
    tiny_config = json.loads(Path("model/config.json").read_text())
    Path("huge").mkdir()
    huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 100, "head_dim": 16384}
    Path("huge/config.json").write_text(json.dumps(tiny_config | huge))
    with pytest.raises(EoraLabError, match=r"needs about [\d.]+ GB"):
        quiet_sweep(SMALL | {"model": "huge"}, store)


def test_the_estimate_counts_shared_work_once(workplace):
    def added(**settings) -> float:
        """By one more cell, beside that of EoRA at rank 4."""
        first = SMALL | {"compressor": "gptq", "rank": 4}
        return work(expand([first, first | settings])) - work(expand(first))

    rank, method, bits = added(rank=8), added(method="svd"), added(bits=2)
    assert 0 < rank < method < bits  # one more measurement; and one more solve; and one more base
    assert rank == pytest.approx(work(expand(SMALL | {"compressor": "dense"})))
    assert added(rank=8, windows=None) > 1000 * rank  # a whole text


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "edited", "foreign", "renamed", "not text", "no cost"])
def test_files_that_cannot_be_trusted_are_set_aside(workplace, damage):
    grid = SMALL | {"method": "none"}
    quiet_sweep(grid, "store")
    before = contents(Path("store"))
    (path,) = Path("store").glob("*.json")
    text = path.read_text()
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    elif damage == "edited":
        path.write_text(text.replace('"nbytes": ', '"nbytes": 1'))
    elif damage == "foreign":
        path.write_text('{"config": {}, "status": "done"}')
    elif damage == "no cost":
        path.write_text(text.replace('"cost": {', '"costs": {'))
    elif damage == "renamed":
        path = path.rename(path.with_name("0" * 24 + ".json"))
    else:
        path.write_bytes(b"\xff\xfe\x00")
    kept = path.read_bytes()
    with pytest.warns(UserWarning, match="cannot be used"):
        rows = len(ResultStore("store").frame())
    assert rows == 0
    assert (Path("store/aside") / path.name).read_bytes() == kept  # never deleted
    quiet_sweep(grid, "store")
    assert contents(Path("store")) == before


@pytest.mark.parametrize("name", ["model", "run", "adapter"])
def test_a_folder_of_something_else_is_no_store(workplace, name):
    """Its files would be taken for damaged cells, and moved."""
    for folder, file in (("run", "config.json"), ("adapter", "adapter_config.json")):
        Path(folder).mkdir()
        Path(folder, file).write_text("{}")
    with pytest.raises(EoraLabError, match=f"{name} is no result store"):
        ResultStore(name)


def test_other_files_in_a_store_stay_where_they_are(workplace):
    store = ResultStore("store")
    Path("store/notes.json").write_text("{}")
    assert list(store.cells()) == [] and Path("store/notes.json").exists()


def test_two_damaged_files_of_one_name_are_both_kept(workplace):
    store = ResultStore("store")
    for text in ("one", "two"):
        Path(f"store/{'0' * 24}.json").write_text(text)
        with pytest.warns(UserWarning, match="cannot be used"):
            list(store.cells())
    assert {path.read_text() for path in Path("store/aside").iterdir()} == {"one", "two"}


def test_a_damaged_cache_entry_is_made_again(workplace):
    quiet_sweep(SMALL | {"method": "none"}, "store")
    before = contents(Path("store"))
    for path in Path("store").glob("*.json"):
        path.unlink()
    for path in [*Path("store/cache").glob("*/*/*.safetensors")][::3]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.warns(UserWarning, match="checksum"):
        quiet_sweep(SMALL | {"method": "none"}, "store")
    assert contents(Path("store")) == before


def test_cached_statistics_are_those_that_were_measured(workplace):
    model = load_model("model")[0]
    tokens = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(0))
    first = ContentCache("cache").statistics(model, tokens, 0.25, "key")
    second = ContentCache("cache").statistics(model, tokens[:0], 0.25, "key")  # nothing is measured again
    assert set(first) == set(second)
    for name, statistics in first.items():
        assert torch.equal(statistics.second_moment, second[name].second_moment)
        assert torch.equal(statistics.held_out.mean_abs, second[name].held_out.mean_abs)
        assert statistics.tokens == second[name].tokens
    assert len({id(s) for s in second.values()}) == len({id(s) for s in first.values()}) == 8


@pytest.mark.parametrize("damage", ["", "[]", "swapped"])
def test_a_damaged_index_or_checksum_of_the_cache_is_made_again(workplace, damage):
    model, tokens = load_model("model")[0], tiny_tokens(4, 32)
    first = ContentCache("cache").statistics(model, tokens, 0.0, "key")
    index = Path("cache/statistics/key/index.json")
    kept = index.read_text()
    index.write_text(kept.replace("k_proj", "x_proj").replace("o_proj", "k_proj") if damage == "swapped" else damage)
    next(Path("cache/statistics/key").glob("*.sha256")).write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="cannot be used"):
        second = ContentCache("cache").statistics(model, tokens, 0.0, "key")
    assert index.read_text() == kept and set(second) == set(first)
    assert all(torch.equal(second[name].second_moment, first[name].second_moment) for name in first)


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_store_says_what_its_numbers_were_made_with(workplace):
    quiet_sweep(SMALL | {"method": "none", "seed": 7}, "store")
    (cell,) = ResultStore("store").cells()
    assert cell["config"]["seed"] == 7 and cell["cost"]["total"] > 0 and cell["cost"]["peak_memory"] > 0
    assert {"versions", "commit", "machine"} == set(cell["environment"])
    assert cell["environment"]["versions"]["torch"] == torch.__version__
    assert str(workplace) not in json.dumps(cell)


def test_exports_hold_the_same_table(workplace):
    quiet_sweep(SMALL | {"method": "eora", "rank": [2, 4]}, "store")
    store = ResultStore("store")
    frame = store.frame()
    for suffix in ("parquet", "csv", "md", "tex"):
        store.export(f"table.{suffix}")
    assert pandas.read_parquet("table.parquet")["nbytes"].tolist() == frame["nbytes"].tolist()
    assert pandas.read_csv("table.csv")["rank"].tolist() == frame["rank"].tolist()
    assert Path("table.md").read_text().count("\n") == 2 + len(frame)
    assert "\\begin{tabular}" in Path("table.tex").read_text()
    for suffix in ("parquet", "csv", "md", "tex"):
        store.export(f"table.{suffix}")  # its own are written again
    with pytest.raises(EoraLabError, match=r"must end in .parquet"):
        store.export("table.xlsx")
    Path("table.md").write_text("my notes")
    with pytest.raises(EoraLabError, match=r"table.md holds something else"):
        store.export("table.md")


def test_the_command(workplace, capsys):
    grid = "model: model\ngroup_size: 32\nsource: text.txt\nnsamples: 2\nseqlen: 32\nperplexity: text.txt\n"
    Path("grid.yaml").write_text(grid + "windows: 2\nwindow_length: 32\nmethod: [none, eora]\nrank: [4]\n")
    assert main(["sweep", "grid.yaml", "--store", "store", "--dry-run"]) == 0
    assert "2 to run" in capsys.readouterr().out and not list(Path("store").glob("*.json"))
    assert main(["sweep", "grid.yaml", "--store", "store", "--export", "t.csv"]) == 0
    out = capsys.readouterr().out
    assert "2 to run" in out and "eora" in out and len(pandas.read_csv("t.csv")) == 2
    assert main(["sweep", "grid.yaml", "--store", "store", "--paired"]) == 0
    out = capsys.readouterr().out
    assert "2 done" in out and re.search(r"row 1: log perplexity text.txt [+-]\d\.\d+ \[", out)
    Path("grid.yaml").write_text("bits: [2, 3")
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 1
    assert "cannot read the grid" in capsys.readouterr().err
    Path("grid.yaml").write_text("rtn")
    assert main(["sweep", "grid.yaml", "--store", "store"]) == 1
    assert "holds no grid" in capsys.readouterr().err
