"""Widgets driven by their controls, on a tiny model: what a reader sees must be what the package computes."""

import copy
import re
from pathlib import Path

import pytest
import torch

from docs.stills import still
from eora_lab import Adapters, EoraLabError, calibration_batches, collect_statistics, solve_adapter
from eora_lab.board import board
from eora_lab.calibrate.statistics import output_energy
from eora_lab.compensate import solve
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, plan, run_plan, sweep
from eora_lab.measure.at_rank import AtRank
from eora_lab.measure.explore import Exploration
from eora_lab.model.generate import generate
from eora_lab.plots.looks import LOOKS
from eora_lab.run.budget import Budget, allocate_ranks, factor_bytes, predicted_error
from eora_lab.run.ranks import layer_spectra
from eora_lab.run.recipe import Recipe
from tests.tiny import TEXT, compress, tiny_model, tiny_tokenizer

pytest.importorskip("anywidget", reason="anywidget is the extra `lab`")

from eora_lab import widgets
from eora_lab.widgets.slider import Slider

RECIPE = Recipe("rtn", bits=2, group_size=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def batches(text):
    return calibration_batches(tiny_tokenizer(), str(text), 4, 32)


@pytest.fixture(scope="module")
def exploration(batches):
    model = tiny_model("llama")
    return Exploration(model, collect_statistics(model, batches, progress=False), RECIPE)


def words(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html)


def pictures(*figures) -> tuple[bytes, ...]:
    """What is shown now."""
    shown = tuple(figure.png for figure in figures)
    assert all(png.startswith(b"\x89PNG") for png in shown)
    return shown


# --- what each rank buys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "act_s", "qera_approx", "eora", "eora_paper"])
def test_losses_at_all_ranks_are_those_of_solving_at_each(exploration, method):
    layer = "model.layers.1.mlp.down_proj"
    S = exploration.statistics[layer].second_moment.double()
    R, W = exploration.residual(layer).double(), exploration.weight(layer).double()
    losses = exploration.losses(layer, method)
    assert losses.shape == (65,) and losses.dtype == torch.float64
    for rank in (0, 1, 7, 64):
        answer = solve(method, exploration.residual(layer), exploration.statistics[layer], rank)
        left = output_energy(R - answer.dense().double(), S) / output_energy(W, S)
        assert losses[rank].item() == pytest.approx(left, rel=1e-5, abs=1e-6 * losses[0].item())


def test_losses_hold_for_factors_that_are_not_orthonormal():
    generator = torch.Generator().manual_seed(0)
    R, X = torch.randn(12, 20, generator=generator), torch.randn(20, 50, generator=generator)
    S = X @ X.T / 50
    answer = solve("eora", R, S, 6).balanced()
    skewed = type(answer)(answer.A + 0.1 * answer.A.roll(1, 0), answer.B, answer.spectrum)
    for rank, loss in enumerate(skewed.losses(R, S).tolist()):
        left = (R - skewed.truncate(rank).dense()).double()
        assert loss == pytest.approx(output_energy(left, S.double()), rel=1e-5)


def test_the_error_map_adds_up_to_the_loss(exploration):
    layer = "model.layers.0.self_attn.q_proj"
    losses = exploration.losses(layer, "svd")
    for rank in (0, 5):
        cells = exploration.error_map(layer, "svd", rank, bins=16)  # 64 divides evenly: means of equal blocks
        assert cells.shape == (16, 16)
        assert cells.mean().item() == pytest.approx((losses[rank] / losses[0]).item(), rel=1e-4)
    first, last = (
        exploration.error_map(layer, "svd", 0)[:, 0].mean(),
        exploration.error_map(layer, "svd", 0)[:, -1].mean(),
    )
    assert first > last  # loud directions on the left


def test_a_lower_highest_rank_changes_no_answer(exploration):
    layer = exploration.layers[0]
    few = Exploration(tiny_model("llama"), exploration.statistics, RECIPE, highest=8)
    assert few.highest(layer) == 8
    assert torch.allclose(few.losses(layer, "eora"), exploration.losses(layer, "eora")[:9])
    with pytest.raises(EoraLabError, match="no layer 'lm_head'"):
        few.weight("lm_head")


def test_the_rank_explorer_has_a_layer_at_all_ranks_and_solves_it_when_it_is_looked_at(exploration):
    explorer = widgets.RankExplorer(exploration, layer=exploration.layers[2], rank=9)
    assert (explorer.rank, explorer.ranks[-1]) == (8, 64)  # the nearest stop
    assert list(explorer.views) == [exploration.layers[2]] and not explorer.writes
    explorer.layer = exploration.layers[-1]
    view = explorer.views[exploration.layers[-1]]
    losses = exploration.losses(explorer.layer, "svd")
    assert view["left"]["svd"][explorer.ranks.index(8)] == pytest.approx((losses[8] / losses[0]).item(), rel=1e-3)
    assert [one["name"] for one in explorer.methods] == ["SVD", "Act-S", "QERA-approx", "EoRA"]
    assert explorer.methods[-1]["colour"] == LOOKS["eora"].colour
    kept = still({"m": {"state": explorer.get_state()}}, "IPY_MODEL_m")  # what a page without a kernel has of it
    assert 'type="module"' in kept and f"SVD leaves {100 * view['left']['svd'][6]:.1f} %" in kept
    with pytest.raises(EoraLabError, match="no layer 'lm_head'"):
        explorer.layer = "lm_head"


def test_the_rank_explorer_writes_what_the_model_at_this_rank_writes(exploration):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    explorer = widgets.RankExplorer(exploration, model, tokenizer, rank=6, prompt="Fox", tokens=12)
    at, whole = explorer.ranks.index(6), AtRank(model, exploration, progress=False)

    def texts(rank):
        return {method: generate(whole.model(method, rank), tokenizer, "Fox", 12) for method in ("svd", "eora")}

    shown = explorer.texts["Fox"]
    assert shown["original"] == generate(model, tokenizer, "Fox", 12)
    assert {method: shown[method][at] for method in ("svd", "eora")} == texts(6)
    assert shown["eora"].count(None) == len(explorer.ranks) - 1
    done = []
    explorer.send = done.append  # what the browser hears
    explorer._handle_custom_msg({"prompt": "Fox", "rank": 64}, [])
    shown = explorer.texts["Fox"]
    assert {method: shown[method][-1] for method in ("svd", "eora")} == texts(64) and shown["eora"][at] is not None
    explorer._handle_custom_msg({"prompt": "", "rank": 64}, [])
    assert "the prompt is empty" in explorer.problem and done == [{"done": True}] * 2


# --- side by side --------------------------------------------------------------------------------------------------


def test_side_by_side_writes_what_each_model_would(batches):
    dense, tokenizer = tiny_model("llama"), tiny_tokenizer()
    compressed = copy.deepcopy(dense)
    compress(compressed, batches, bits=2, group_size=32, rank=16, progress=False)
    alone = copy.deepcopy(compressed)
    adapters = Adapters(compressed)
    adapters.add("svd", solve_adapter(alone, dense, batches, Recipe(method="svd", rank=16), progress=False))
    with pytest.raises(EoraLabError, match="cannot be called 'svd'"):
        adapters.add("svd", {})
    expected_svd = generate(alone, tokenizer, "Fox <b>", 12)
    box = widgets.SideBySide(tokenizer, dense, adapters, prompt="Fox <b>")
    box.tokens.value = 12
    seen = []
    box._view.observe(lambda change: seen.append(re.findall(r"<b>(.*?)</b>", change["new"])), "value")
    box.write.click()
    assert list(box.answers) == ["original", "compressed", "+ EoRA", "+ SVD"]
    assert [set(cards) for cards in seen] == [set(box.answers)] * len(seen) and len(seen) > 4  # none moves
    assert "After “Fox &lt;b&gt;”:" in box._view.value
    assert box.answers["original"] == generate(dense, tokenizer, "Fox <b>", 12)
    assert box.answers["+ SVD"] == expected_svd
    assert adapters.active == "own"  # as it was
    assert box.answers["+ EoRA"] == generate(compressed, tokenizer, "Fox <b>", 12)
    box.prompt.value = ""
    box.write.click()
    assert "the prompt is empty" in box.status.value and not box.write.disabled


def test_a_slider_stays_between_its_ends_and_says_on_a_page_where_it_stands():
    slider = Slider(description="Rank", min=1, max=9, value=12)
    assert slider.value == 9
    slider.value = 0
    assert slider.value == 1
    assert still({"m": {"state": slider.get_state()}}, "IPY_MODEL_m") == "<div><em>Rank:</em> 1</div>"


# --- budget --------------------------------------------------------------------------------------------------------


def test_the_budget_explorer_shows_what_the_ranks_cost_and_leave(exploration, batches):
    model = tiny_model("llama")
    layers = layer_spectra(model, exploration.statistics, RECIPE, progress=False)
    explorer = widgets.BudgetExplorer(layers, highest=32)
    seen, given = set(), set()
    for objective in ("uniform", "relative", "absolute"):
        for average in (8, 16):
            explorer.objective.value, explorer.average.value = objective, average
            ranks = allocate_ranks(layers, average, Budget(objective))
            assert explorer.ranks == ranks
            megabytes, error = factor_bytes(layers, ranks) / 1e6, predicted_error(layers, ranks)
            assert f"{megabytes:.1f} MB" in explorer.status.value and f"error {error:.4f}" in explorer.status.value
            assert all(f"error {error:.4f}" in one.value.partition("src=")[0] for one in (explorer.curve, explorer.map))
            seen.add(pictures(explorer.curve, explorer.map))
            given.add(tuple(ranks.values()))
    assert len(seen) == len(given) >= 4  # a picture for each choice of ranks
    settings = {"bits": 2, "group_size": 32, "inputs": "original", "statistics": exploration.statistics}
    report = compress(model, batches, **settings, ranks=explorer.ranks, progress=False)
    measured = sum(layer.error_after for layer in report.layers) / len(report.layers)
    assert predicted_error(layers, explorer.ranks) == pytest.approx(measured, rel=1e-2)  # factors are in float16
    assert sum(layer.rank for layer in report.layers) == sum(explorer.ranks.values())


# --- sweeps --------------------------------------------------------------------------------------------------------


SMALL = {"model": "model", "group_size": 32, "source": "text.txt", "nsamples": 4, "seqlen": 32}
SMALL |= {"perplexity": "text.txt", "windows": 2, "window_length": 32}
AXES = {"compressor": ["rtn"], "bits": [2], "method": ["none", "eora"], "rank": [4, 8, 16]}


def test_a_plan_that_is_stopped_keeps_what_it_ran(workplace):
    store = ResultStore("store")
    cells = expand(SMALL | AXES | {"inputs": "original"})
    steps = run_plan(plan(cells, store), cells, store)
    assert [next(steps), next(steps)] == ["", ""]
    steps.close()
    assert len(list(store.cells())) == 2
    left = plan(cells, store)
    assert (left.done, len(left.todo)) == (2, 2)
    assert list(run_plan(left, cells, store)) == ["", ""]
    assert plan(cells, store).done == 4


def test_the_form_builds_the_grid_of_its_controls(workplace):
    form = widgets.AblationForm("store", **SMALL, **AXES, seed=7)
    assert [cell["status"] for cell in form.board.data["cells"]] == ["waiting"] * 5  # with all axes, before any runs
    assert {one["key"] for one in form.board.data["columns"]} >= {"compressor", "bits", "method", "rank"}
    assert {(c.recipe.method, c.recipe.rank) for c in expand(form.grid) if c.recipe} == {
        ("none", 0), ("eora", 4), ("eora", 8), ("eora", 16),
    }  # fmt: skip
    assert {(c.calibration.seed, c.recipe.inputs) for c in expand(form.grid) if c.recipe} == {(7, "original")}
    assert "5 cells: 0 done" in form._plan.value
    form.controls["compressor"].value = ("rtn", "wanda")
    form.dense.value = False
    pruned = [cell.recipe for cell in expand(form.grid) if cell.recipe.compressor == "wanda"]
    assert len(pruned) == 4 and {(r.sparsity, r.bits) for r in pruned} == {("2:4", 16)}
    form.controls["rank"].value = ()
    assert "empty" in form._plan.value and form.run.disabled
    form.controls["rank"].value = (4,)
    assert not form.run.disabled
    form.controls["grid"].value = ("integer", "fp8", "mxfp4")
    form.controls["bits"].value = (3,)  # of the integers
    found = {(r.compressor, r.base) for r in (cell.recipe for cell in expand(form.grid))}
    assert found == {("rtn", "rtn 3-bit g32"), ("rtn", "rtn fp8"), ("rtn", "rtn mxfp4"), ("wanda", "wanda 2:4")}


def test_the_form_runs_stops_and_goes_on(workplace):
    form = widgets.AblationForm("store", **SMALL, **AXES)
    stopped_at = []

    def stop_after_two(change):
        if change["new"] == 2:
            form.stop.click()
            stopped_at.append(len(list(ResultStore("store").cells())))

    form._bar.observe(stop_after_two, "value")
    form.run.click()
    assert form.run.disabled
    form.join()
    assert form.state == "stopped" and "2 cells run, 0 failed, 3 left" in form._status.value
    kept = {path: path.stat().st_mtime_ns for path in Path("store").glob("*.json")}
    assert stopped_at == [2] and len(kept) == 2
    assert form.run.description == "Go on" and not form.run.disabled and form.stop.disabled
    form._bar.unobserve_all()
    form.run.click()
    form.join()
    assert form.state == "finished" and form.run.disabled
    assert len(list(Path("store").glob("*.json"))) == 5
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())  # nothing done twice
    assert [cell["status"] for cell in form.board.data["cells"]] == ["done"] * 5


def test_the_form_says_what_failed(workplace):
    form = widgets.AblationForm(
        "store", **SMALL | {"source": "absent.txt"}, compressor=["rtn"], method=["eora"], rank=[4]
    )
    form.run.click()
    form.join()
    assert "2 cells run, 1 failed" in form._status.value and "absent.txt" in form.board.data["failures"][0][0]
    assert form.run.disabled  # failed cells wait until they are asked for
    form.retry.value = True
    assert not form.run.disabled


def test_the_form_stops_within_a_cell(workplace):
    form = widgets.AblationForm("store", **SMALL, **AXES)
    form._status.observe(lambda change: form.stop.click() if "running cell 1" in change["new"] else None, "value")
    form.run.click()
    form.join()
    assert form.state == "stopped" and "0 cells run, 0 failed, 5 left" in form._status.value
    assert [cell["status"] for cell in form.board.data["cells"]] == ["waiting"] * 5 and form.board.running == []
    form._status.unobserve_all()
    form.run.click()
    form.join()
    assert form.state == "finished" and len(list(ResultStore("store").cells())) == 5


def test_the_board_follows_its_store(workplace):
    shown = widgets.Board("store")
    assert shown.data["cells"] == [] and shown.running == []
    grid = SMALL | {"inputs": "original", "method": ["none", "eora"], "rank": [4, 500]}
    sweep(grid, "store", announce=lambda plan: None)
    shown.refresh()
    assert [cell["status"] for cell in shown.data["cells"]] == ["done", "done", "failed"]
    assert shown.data == board(ResultStore("store"))
    assert widgets.Board("store", expand(grid)[:1]).data["cells"] == shown.data["cells"][:1]
