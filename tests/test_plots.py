"""Figures: what they show is what the store holds, every time the same, with units, and readable without colour.

A sweep of a tiny model makes a real store. For the named grids and the paper's tables, which need a language model,
results are put into a store by hand: the figures must show them.
"""

import html
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.text import Text
from PIL import Image

from eora_lab import EoraLabError
from eora_lab.cli import main
from eora_lab.experiment.compare import ComparisonRow, table
from eora_lab.experiment.paper_runs import both_sides, rivalry, table_rows
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, named_grids, read_grid, rows, sweep
from eora_lab.plots import (
    alt_text,
    plot_blocks,
    plot_comparison,
    plot_error_map,
    plot_front,
    plot_heads,
    plot_intervals,
    plot_layers,
    plot_losses,
    plot_ranks,
    plot_setting,
    plot_spectra,
    plot_spend,
    plot_sweep,
    plot_table,
    save,
    surprise_html,
    use_style,
)
from eora_lab.plots.front import pareto
from eora_lab.plots.labels import spread
from eora_lab.plots.looks import DARK_INK, DARK_PAPER, INK, LOOKS, OTHERS, PAPER, SERIES, looks
from eora_lab.plots.output import svg
from eora_lab.plots.scales import metrics
from eora_lab.plots.spend import steps
from eora_lab.plots.words import headline, number
from eora_lab.run.intervals import Interval
from eora_lab.run.plugins import OWN
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PERPLEXITY = "perplexity.text.txt"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The frame of a rank sweep of a tiny model, with the dense model, the base alone, and a cell that fails."""
    folder = tmp_path_factory.mktemp("plots")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and 12 more. " * 40)
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    before = Path.cwd()
    os.chdir(folder)
    try:
        small = {"model": "model", "group_size": 32, "inputs": "original", "source": "text.txt", "nsamples": 4}
        small |= {"seqlen": 32, "perplexity": ["text.txt"], "windows": 3, "window_length": 32, "bits": 2}
        grid = [small | {"compressor": "dense"}, small | {"method": ["none", "svd", "eora"], "rank": [2, 4, 8, 500]}]
        yield sweep(grid, "store", announce=lambda plan: None)
    finally:
        os.chdir(before)


def put(store: ResultStore, cells) -> None:
    """Made-up results that differ from cell to cell."""
    for i, cell in enumerate(cells):
        result = {"bits_per_weight": 4 + i / 10, "nbytes": 1000 + i}
        if cell.evaluation.perplexity:
            losses = [[text, [3.0 + i / 50, 3.2 + i / 40, 3.9]] for text in cell.evaluation.perplexity]
            result |= {"window_losses": losses, "perplexity": {t: math.exp(sum(x) / 3) for t, x in losses}}
        outcomes = [float(j % (i + 2) == 0) for j in range(20)]
        score = {"metric": "acc", "value": sum(outcomes) / 20, "stderr": 0.05, "outcomes": outcomes}
        result["tasks"] = dict.fromkeys(cell.tasks, score)
        store.put(cell.config(), {}, result=result)


def paper_store(folder: Path, name: str) -> tuple[list, ResultStore]:
    lines, store = table_rows(name, "smollm2-135m", "small"), ResultStore(folder)
    put(store, expand([cell for line in lines for cell in line.cells.values()]))
    return lines, store


def compared():
    rivals = [
        ComparisonRow("rtn 3-bit", m, 8 * (m != "none"), "uniform", 16, {"text.txt": 30.0 - i}, 0.1, 9, 4.0, 1.0)
        for i, m in enumerate(LOOKS)
    ]
    dense = ComparisonRow("dense", "none", 0, "uniform", 16, {"text.txt": 14.0}, None, 99, 32.0, 0.0)
    return table([dense, *rivals], "model")


BLOCKS = {"dense": [0.1, 0.4, 0.9], "none": [0.1, 0.2, 0.3], "svd": [0.1, 0.2, 0.5], "eora": [0.1, 0.3, 0.8]}
HEADS = {"none": {"m.layers.0.o_proj": torch.tensor([0.2, 0.4]), "m.layers.2.o_proj": torch.tensor([1.5, 0.3])}}
HEADS["eora"] = {name: errors / 4 for name, errors in HEADS["none"].items()}
LAYERS = {"none": {"m.layers.0.q_proj": 0.2, "m.layers.0.k_proj": 0.04, "m.layers.1.q_proj": 0.1}}
LAYERS["eora"] = {name: error / 8 for name, error in LAYERS["none"].items()}


def inside() -> dict:
    """The figures of what is inside a model."""
    shares = plot_blocks(BLOCKS, "right answers (%)")
    return {"blocks": shares, "heads": plot_heads(HEADS), "layers": plot_layers(LAYERS)}


def figures(frame, folder: Path) -> dict:
    """One of every kind."""
    found = {"comparison": plot_comparison(compared()), "rank": plot_setting(frame, "rank"), "front": plot_front(frame)}
    found |= inside()
    for name in ("T2", "T10", "T15"):
        lines, store = paper_store(folder / name, name)
        found[name] = plot_table(both_sides(lines, store))
        found[f"{name}-intervals"] = plot_intervals(rivalry(lines, store))
    for name in named_grids():
        store, cells = ResultStore(folder / name), expand(read_grid(name))
        put(store, cells)
        found[name] = plot_sweep(rows(cells, store))
    return found


# --- all of them ---------------------------------------------------------------------------------------------------


def test_every_axis_says_what_it_shows_and_every_line_is_known_without_its_colour(swept, tmp_path):
    for name, figure in figures(swept, tmp_path).items():
        for axes in figure.axes:
            row = axes.get_shared_y_axes().get_siblings(axes)  # panels of a row share an axis; the first one names it
            named = any(one.get_ylabel() for one in row) or name.endswith("intervals")  # there, every tick is a pair
            assert (axes.get_xlabel() or axes.get_label() == "<colorbar>") and named, name
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # that of error bars too
            drawn = {(line.get_marker(), str(line.get_linestyle()), str(line._dash_pattern)) for line in lines}
            assert len(drawn) == len(set(labels)), name
        written = save(figure, tmp_path / "figures" / name)
        assert [path.name for path in written] == [f"{name}.png", f"{name}.svg"]
        assert all(path.stat().st_size > 5000 for path in written)


def test_methods_look_different():
    assert {"none", "svd", "act_s", "qera_approx", "eora"} <= set(LOOKS) <= OWN["SOLVERS"]
    for drawn in ([*looks([*OWN["SOLVERS"]]).values(), OTHERS[-1]], SERIES):
        for part in ("colour", "marker", "line"):
            assert len({str(getattr(look, part)) for look in drawn}) == len(drawn)
    assert len({look.name for look in LOOKS.values()}) == len(LOOKS)
    assert len(set(looks([16, 32, 64, 128]).values())) == 4
    assert looks(["eora", "none"])["eora"] == LOOKS["eora"]


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out_on_white_and_on_dark_pages():
    for look in (*LOOKS.values(), *OTHERS, *SERIES):
        for page in ("#ffffff", "#111111", "#212121"):  # JupyterLab's pages, and its editors
            assert contrast(look.colour, page) >= 2.99, (look, page)
    assert contrast(INK, PAPER) > 7 and contrast(DARK_INK, DARK_PAPER) > 7


def test_no_two_looks_have_one_colour():
    colours = [look.colour for look in (*LOOKS.values(), *OTHERS, *SERIES)]
    for one, other in itertools.combinations(colours, 2):
        assert np.linalg.norm(np.subtract(to_rgb(one), to_rgb(other))) > 0.1, (one, other)
    assert set(looks(["eora", "rtn 3-bit", 16, "uniform"]).values()) - {LOOKS["eora"]} <= set(SERIES)


def test_a_colour_of_a_method_means_that_method(swept, tmp_path):
    names = {look.colour.lower(): look.name for look in LOOKS.values()}
    seen = set()
    for name, figure in figures(swept, tmp_path).items():
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                colour = to_hex(getattr(handle, "lines", [handle])[0].get_color())
                known = label in names.values()
                assert names.get(colour, label) == label and known == (colour in names), (name, label)
                seen.add(label)
    assert {"EoRA", "SVD", "Act-S", "no compensation", "dense", "rank 64"} <= seen


def test_all_letters_have_one_size(swept, tmp_path):
    for name, figure in figures(swept, tmp_path).items():
        sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()}
        assert sizes == {10.0}, name


# --- what they say in words ----------------------------------------------------------------------------------------


def test_every_figure_has_a_headline_and_a_text_for_those_who_cannot_see_it(swept, tmp_path):
    for name, figure in figures(swept, tmp_path).items():
        headline = " ".join(figure.get_suptitle().split())
        assert re.search(r"\d", headline), name
        assert alt_text(figure).startswith(f"{headline}. ") and len(alt_text(figure)) > 1.5 * len(headline), name
        png, vectors = save(figure, tmp_path / "said" / name)
        assert Image.open(png).text["Description"] == alt_text(figure)
        drawn = ElementTree.parse(vectors)
        assert (drawn.find("{*}title").text, drawn.find("{*}desc").text) == (headline, alt_text(figure))


def test_the_words_of_a_sweep_are_its_numbers(swept):
    done = swept[swept["status"] == "done"]
    cells = done[done["compressor"] != "dense"]
    best = cells.loc[cells[PERPLEXITY].idxmin()]
    alone = cells.loc[cells["method"] == "none", PERPLEXITY].item()
    dense = done.loc[done["compressor"] == "dense", PERPLEXITY].item()
    figure = plot_setting(swept, "rank")
    headline = " ".join(figure.get_suptitle().split())
    name = f"{LOOKS[best['method']].name}, rank {int(best['rank'])}" if best["method"] != "none" else "no compensation"
    assert headline.startswith(f"{name} is best of {len(cells)}: perplexity on text.txt {number(best[PERPLEXITY])}")
    assert headline.endswith(f"{number(dense)} dense")
    assert best["method"] == "none" or f"{number(alone)} without compensation" in headline
    for _, cell in cells[cells["method"] != "none"].iterrows():
        assert f"{number(cell[PERPLEXITY])} at {int(cell['rank'])}" in alt_text(figure)


@pytest.mark.parametrize("name", ["T2", "T10"])
def test_the_words_of_a_table_count_its_wins(tmp_path, name):
    frame = both_sides(*paper_store(tmp_path, name))
    figure = plot_table(frame)
    for source, side in frame.groupby("source"):
        wins = places = 0
        for (task, *_), part in side.groupby(["task", "base", "rank", "extra"]):
            if len(part) > 1 and "eora" in set(part["method"]):
                sign = 1 if task == "wikitext2" else -1
                loss = {method: sign * value for method, value in zip(part["method"], part["value"], strict=True)}
                places += 1
                wins += all(loss["eora"] < other for method, other in loss.items() if method != "eora")
        assert f"in {wins} of {places} {source}" in figure.get_suptitle()
    assert all(number(value) in alt_text(figure) for value in frame["value"])


def test_the_words_of_intervals_count_what_is_decided():
    panel = {"a": Interval(-0.2, -0.3, -0.1, 9), "b": Interval(0.1, 0.05, 0.3, 9), "c": Interval(0.1, -0.1, 0.3, 9)}
    figure = plot_intervals({"loss, nats (below 0: EoRA is better)": panel})
    assert figure.get_suptitle() == "EoRA is better in 1 of 3 and worse in 1 (loss)"
    assert "c, +0.100 [-0.100, +0.300], undecided" in alt_text(figure)
    assert plot_intervals({"loss": panel}).get_suptitle() == "1 of 3 are below 0 and 1 above (loss)"


def test_the_words_of_spectra_and_losses_are_their_numbers():
    figure = plot_spectra({"q_proj": [8.0, 1.0, 0.5, 0.5], "down_proj": [1.0] * 20}, "share")
    assert (
        figure.get_suptitle() == "90% of the sum lies in 2 of 4 directions (q_proj) to 18 of 20 directions (down_proj)"
    )
    assert figure.axes[0].get_xlabel() == "direction, largest first"
    figure = plot_losses({"svd": [4.0, 3.0, 2.0], "eora": [4.0, 1.0, 0.5]}, "error", 1)
    assert figure.get_suptitle() == "At rank 1 EoRA leaves 25.0 % and SVD leaves 75.0 % of the error"
    assert "EoRA 4.00 at 0, 1.00 at 1, 0.5 at 2" in alt_text(figure) and figure.axes[0].get_xlabel() == "rank"
    maps = {"none": torch.ones(4, 4), "eora": torch.full((4, 4), 0.25)}
    assert plot_error_map(maps).get_suptitle().endswith("no compensation 100.0 %, EoRA 25.0 %")
    figure = plot_ranks({"m.layers.0.q_proj": 8, "m.layers.1.q_proj": 16, "m.layers.0.v_proj": 2})
    assert figure.get_suptitle() == "Most rank goes to q_proj (mean 12), least to v_proj (1)"


# --- where they are shown ------------------------------------------------------------------------------------------


def test_a_file_is_readable_on_dark_pages_too(swept):
    text = svg(plot_setting(swept, "rank"))
    assert INK not in text.partition("</style>")[2] and "currentColor" in text and text.count('class="paper"') == 1
    assert f"(prefers-color-scheme: dark) {{svg {{color: {DARK_INK}}} .paper {{fill: {DARK_PAPER}}}}}" in text


def test_a_notebook_shows_the_text_and_follows_the_theme(swept):
    from IPython.core.interactiveshell import InteractiveShell

    figure = plot_setting(swept, "rank")
    shell = InteractiveShell.instance()
    try:
        with matplotlib.rc_context():
            use_style()
            shown = shell.display_formatter.format(figure)[0]["text/html"]
    finally:
        InteractiveShell.clear_instance()
    said, source = re.search(r'alt="([^"]*)" src="data:image/svg\+xml,([^"]*)"', shown).groups()
    again = plot_setting(swept, "rank")  # what is drawn a second time is laid out a little differently
    assert said == alt_text(again) and unquote(source) == svg(again)
    assert "[data-jp-theme-light='false'] img.eora-figure {color-scheme: dark}" in shown


def test_the_same_bytes_in_another_process_with_other_defaults(swept, tmp_path):
    frame = swept.drop(columns=["error"])
    frame.to_pickle(tmp_path / "frame")
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 30\nsvg.fonttype: none\naxes.grid: True\n")
    script = "import sys, pandas; from eora_lab.plots import *; f = pandas.read_pickle('frame')\n"
    script += "save(plot_setting(f, 'rank'), 'rank'); save(plot_front(f), 'front')"
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    for name, figure in (("rank", plot_setting(frame, "rank")), ("front", plot_front(frame))):
        for path in save(figure, tmp_path / "here" / name):
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_folder_that_cannot_be_written_is_named(swept, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EoraLabError, match="cannot write"):
        save(plot_setting(swept, "rank"), tmp_path / "file" / "figure")


# --- a metric against a setting ------------------------------------------------------------------------------------


def test_a_rank_curve_shows_the_cells_and_their_standard_errors(swept):
    (axes,) = plot_setting(swept, "rank").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"dense", "no compensation", "SVD", "EoRA"}
    cells = swept[(swept["method"] == "eora") & (swept["status"] == "done")]
    assert lines["EoRA"].get_xdata().tolist() == [2, 4, 8]  # rank 500 failed
    assert lines["EoRA"].get_ydata().tolist() == cells[PERPLEXITY].tolist()
    assert lines["dense"].get_ydata()[0] == swept.loc[swept["compressor"] == "dense", PERPLEXITY].item()
    edges = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert max(edges) == pytest.approx((cells[PERPLEXITY] * np.exp(cells["loss_stderr.text.txt"])).max())


@pytest.mark.parametrize("highest", [20, 90, 3e2, 3e3, 3e4, 3e6])
def test_what_stands_beside_an_axis_has_room(swept, highest):
    """Also where models differ by orders of magnitude, and a legend stands below."""
    one = swept[(swept["status"] == "done") & ~(swept["rank"] > 2)]
    frame = pandas.concat(
        [one, *(one[one["method"].notna()].assign(compressor=name) for name in ("wanda", "magnitude"))]
    )
    more = [frame[frame["method"] == "svd"].assign(method=method) for method in ("act_s", "qera_approx")]  # two lines
    frame = pandas.concat([frame, *more]).rename(columns=lambda name: name.replace("text.txt", "pydoc:heldout"))
    frame = frame.assign(**{"perplexity.pydoc:heldout": np.geomspace(14, highest, len(frame))})
    figure = plot_setting(frame, "compressor")
    figure.draw_without_rendering()
    (axes,), (low, high) = figure.axes, figure.axes[0].get_ylim()
    ticks = [text for at, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if low <= at <= high]
    boxes = [text.get_window_extent() for text in ticks if text.get_text()]
    assert len(boxes) > 2 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    name = axes.yaxis.label.get_window_extent()
    assert not any(name.overlaps(text.get_window_extent()) for text in figure.texts if text.get_text())


def test_the_standard_error_is_that_of_the_window_losses(swept):
    cell = next(cell for cell in ResultStore("store").cells() if cell["config"].get("rank") == 4)
    losses = cell["result"]["window_losses"][0][1]
    here = swept[(swept["rank"] == 4) & (swept["method"] == cell["config"]["method"])]
    assert here["loss_stderr.text.txt"].item() == pytest.approx(np.std(losses, ddof=1) / len(losses) ** 0.5)


def test_what_a_grid_varies_becomes_its_axes(tmp_path):
    """Axis, number of panels and first ticks of every named grid."""
    wanted = {
        "rank": ("rank", 1, None),
        "calibration-size": ("calibration sequences", 1, None),
        "source": ("calibration text", 3, ["pydoc", "mmlu-exemplars"]),
        "inputs": ("model that calibration inputs come from", 2, ["original", "compensated"]),
        "group-size": ("group size (input channels)", 2, ["64", "192", "whole row"]),
        "factor-bits": ("bits of an entry of A and B", 1, None),
        "modules": ("layers with a low-rank path", 1, ["all", "self_attn"]),
        "equal-bytes": ("bits a weight, all counted", 1, None),
        "task-mix": ("calibration text", 3, ["wikitext2:validation", "arc"]),
        "rivals": ("bits a weight, all counted", 1, None),
        "formats": ("bits a weight, all counted", 1, None),
        "beyond": ("bits a weight, all counted", 1, None),
        "front": ("bits a weight, all counted", 5, None),
        "front-small": ("bits a weight, all counted", 2, None),
    }
    found = figures_of_grids(tmp_path)
    assert set(found) == set(wanted)
    for name, (label, panels, ticks) in wanted.items():
        axes = found[name].axes
        assert (axes[0].get_xlabel(), len(axes)) == (label, panels), name
        if ticks:
            assert [tick.get_text() for tick in axes[0].get_xticklabels()][: len(ticks)] == ticks
    (factor_bits,) = found["factor-bits"].axes
    assert [line.get_label() for line in factor_bits.lines] == ["rank 32", "rank 64", "rank 128"]
    assert len(found["equal-bytes"].axes[0].texts) == 9  # every cell has its label


def figures_of_grids(folder: Path) -> dict:
    found = {}
    for name in named_grids():
        store, cells = ResultStore(folder / name), expand(read_grid(name))
        put(store, cells)
        found[name] = plot_sweep(rows(cells, store))
    return found


def test_nothing_to_draw_is_said(swept):
    failed = swept.assign(status="failed")
    for draw in (lambda: plot_setting(failed, "rank"), lambda: plot_setting(swept, "age"), lambda: plot_sweep(failed)):
        with pytest.raises(EoraLabError, match="nothing to draw"):
            draw()


# --- fronts, intervals, tables -------------------------------------------------------------------------------------


def test_the_front_holds_what_nothing_beats():
    rng = np.random.default_rng(0)
    cost, loss = rng.integers(0, 9, 60).astype(float), rng.integers(0, 9, 60).astype(float)
    front = set(zip(cost[pareto(cost, loss)], loss[pareto(cost, loss)], strict=True))
    for point in zip(cost, loss, strict=True):
        beaten = any(
            (c <= point[0] and v < point[1]) or (c < point[0] and v <= point[1])
            for c, v in zip(cost, loss, strict=True)
        )
        assert (point in front) == (not beaten)


def test_of_many_cells_only_those_that_nothing_beats_are_named(swept):
    few = len(plot_front(swept).axes[0].texts)
    many = pandas.concat([swept] * 20, ignore_index=True)
    finished = many[(many["status"] == "done") & (many["compressor"] != "dense")]
    value, bits = (finished[name].to_numpy(float) for name in (next(iter(metrics(finished))), "bits_per_weight"))
    assert 0 < len(pareto(bits, value)) == len(plot_front(many).axes[0].texts) <= few < len(finished)


def test_bytes_go_to_what_leaves_less_of_the_loss():
    """Next bits against the best path in their bytes, rung by rung; a path that takes more does not count."""
    rungs = [("none", 2, 2.25, 90.0), ("none", 3, 3.25, 40.0), ("none", 4, 4.25, 20.0)]
    paths = [("eora", 2, 3.0, 50.0), ("eora", 3, 4.0, 19.0), ("eora", 3, 4.5, 10.0), ("svd", 2, 3.3, 30.0)]
    frame = pandas.DataFrame(rungs + paths, columns=["method", "bits", "bits_per_weight", PERPLEXITY])
    frame = frame.assign(compressor="rtn", sparsity="", grid="integer", status="done", rank=8)
    found = steps(frame, PERPLEXITY)
    assert found == [("rtn", "rtn 2-bit", 40.0, 50.0), ("rtn", "rtn 3-bit", 20.0, 19.0)]
    figure = plot_spend(frame)
    assert headline(figure) == "The next megabyte belongs to rank on rtn 3-bit, and to bits on rtn 2-bit"
    assert "rtn 2-bit: next bits 40.00, rank 50.00" in alt_text(figure)
    assert "all 1 bases" in headline(plot_spend(frame[frame["bits"] > 2]))
    assert "Of 3 cells, none is a base with both" in headline(plot_spend(frame[frame["method"] == "none"]))
    with pytest.raises(EoraLabError, match="nothing to draw"):
        plot_spend(frame.assign(status="failed"))


def test_labels_keep_their_order_and_their_distance():
    places = np.array([0.5, 0.1, 0.52, 0.51, 0.9])
    moved = spread(places, 0.1)
    assert (np.argsort(moved) == np.argsort(places)).all() and np.diff(np.sort(moved)).min() >= 0.1 - 1e-9
    assert spread(np.array([0.1, 0.9]), 0.1).tolist() == [0.1, 0.9]


def test_undecided_intervals_are_hollow():
    figure = plot_intervals(
        {"difference, nats": {"sure": Interval(-0.2, -0.3, -0.1, 9), "open": Interval(0.1, -0.1, 0.3, 9)}}
    )
    (axes,) = figure.axes
    dots = {line.get_ydata()[0]: line for line in axes.lines if line.get_marker() == "o"}
    assert [to_rgba(dots[i].get_markerfacecolor())[3] for i in (0, 1)] == [1, 0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["sure", "open"]


@pytest.mark.parametrize(("name", "published", "measured"), [("T2", 4, 2), ("T10", 3, 2)])
def test_published_and_measured_share_no_panel(tmp_path, name, published, measured):
    lines, store = paper_store(tmp_path, name)
    frame = both_sides(lines, store)
    figure = plot_table(frame)
    tinted = [axes.get_facecolor()[3] > 0 for axes in figure.axes]
    assert tinted == [True] * published + [False] * measured
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles[0].startswith("published: LLaMA3-8B") and titles[published].startswith("measured: smollm2-135m")
    for axes, (source, task) in zip(figure.axes, frame.groupby(["source", "task"], sort=False).groups, strict=True):
        values = frame[(frame["source"] == source) & (frame["task"] == task)]["value"]
        low, high = axes.get_ylim()
        assert low <= values.min() and values.max() <= high and axes.get_title("left").endswith(task)


# --- commands and committed figures --------------------------------------------------------------------------------


def test_the_commands_draw(swept, tmp_path, capsys):
    grid = "{model: model, group_size: 32, inputs: original, source: text.txt, nsamples: 4, seqlen: 32, bits: 2,\n"
    grid += "perplexity: text.txt, windows: 3, window_length: 32, method: [svd, eora], rank: [2, 4, 8]}"
    Path("grid.yaml").write_text(grid)
    assert main(["sweep", "grid.yaml", "--store", "store", "--figure", str(tmp_path / "sweep")]) == 0
    assert "6 done" in capsys.readouterr().out and (tmp_path / "sweep.svg").exists()
    paper_store(tmp_path / "paper", "T2")
    arguments = ["paper", "T2", "--scale", "small", "--dry-run", "--store", str(tmp_path / "paper")]
    assert main([*arguments, "--figure", str(tmp_path / "T2")]) == 0
    assert "against Act-S" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("T2*")} == {"T2.png", "T2.svg", "T2-intervals.png", "T2-intervals.svg"}


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("docs/guides/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("notebooks/*.ipynb")],
    ids=lambda path: path.name,
)
def test_texts_say_of_a_committed_figure_what_it_says(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    for alt, place in re.findall(r"!\[([^\]]*)\]\(([^)\s]+\.svg)\)", text):
        title = ElementTree.parse(path.parent / place).find("{*}title").text
        assert alt == title, f"{path.name}: ![{title}]({place})"


def test_the_committed_figures_are_those_of_the_recorded_numbers(tmp_path):
    """`make figures` in another process, into another folder."""
    subprocess.run([sys.executable, "-m", "figures.rebuild", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    committed = {path.relative_to(ROOT) for path in ROOT.glob("figures/*.*") if path.suffix in (".png", ".svg")}
    assert made >= committed | {Path("kernels/floors.png"), Path("kernels/floors.svg")}
    for path in made:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"{path}: run make figures"


def test_the_words_of_what_is_inside_are_its_numbers():
    blocks, heads, layers = inside().values()
    said = "0.9 (dense), 0.3 (no compensation), 0.5 (SVD) and 0.8 (EoRA)"
    assert " ".join(blocks.get_suptitle().split()) == f"Right answers (%) after the last block: {said}"
    assert "EoRA 0.1 at 0, 0.3 at 1, 0.8 at 2" in alt_text(blocks)
    headline = (
        "Error of the median head: 0.35 (no compensation) and 0.0875 (EoRA); of the worst, head 0 of block 2: 1.50"
    )
    assert " ".join(heads.get_suptitle().split()) == f"{headline} and 0.375"
    assert "no compensation 0.3 at block 0, 0.9 at block 2" in alt_text(heads)
    assert "of the worst, q_proj of block 0: 0.2 and 0.025" in " ".join(layers.get_suptitle().split())
    drawn = heads.axes[0].images[0].get_array()
    assert drawn.shape == (2, 3) and np.isnan(drawn.filled(np.nan)[:, 1]).all()  # a block without heads stays blank
    assert plot_layers({"eora": {"m.layers.0.q_proj": 0.0}}).get_suptitle().startswith("Error of the median linear: 0 ")


# --- a text, coloured ----------------------------------------------------------------------------------------------

WORDS = ["A", " <b>", "\n", " x"]
SURPRISES = {"dense": [0.5, 2.5, 1.5], "none": [9.0, 2.5, 1.5], "eora": [0.75, 4.5, 1.0]}


def test_a_coloured_text_says_every_token_and_its_surprise():
    page = surprise_html(WORDS, SURPRISES)
    assert page.count('class="s') == 5 + 3 * 3 and '<b>"' not in page  # legend and tokens
    texts = [html.unescape(re.sub(r"<[^>]*>", "", one)) for one in re.findall(r"<p [^>]*>(.*?)</p>", page, re.S)]
    assert texts == ["A <b>\u21b5\n x"] * 3
    assert re.findall(r'class="(s\d)" title="([\d.]+) nats"', page)[:4] == [
        ("s0", "0.5"), ("s2", "2.50"), ("s1", "1.50"), ("s4", "9.00"),
    ]  # fmt: skip
    for label, values in (("dense", "1.50"), ("no compensation", "4.33"), ("EoRA", "2.08")):
        assert f"<b>{label}</b>, {values} nats a token" in page
    finding = "Mean surprise of a token: dense 1.50, no compensation 4.33 and EoRA 2.08 nats; hit most is "
    assert f"{finding}{'<b>'!r}: 0.5 (dense), 9.00 (no compensation) and 0.75 (EoRA)" in html.unescape(page)
    assert "border-color: currentColor" in page and f"border-color: {LOOKS['eora'].colour}" in page


def test_a_coloured_text_can_be_read_on_white_and_dark_pages_and_without_colours():
    marks = dict(re.findall(r"\.eora-surprise \.(s\d) \{([^}]*)\}", surprise_html(WORDS, SURPRISES)))
    assert list(marks) == ["s0", "s1", "s2", "s3", "s4"]
    lines = [int(one[0]) for one in (re.findall(r"border-bottom: (\d+)px", mark) for mark in marks.values()) if one]
    assert lines == sorted(set(lines)) and len(lines) == 4  # thicker with every step
    line = re.search(r"px solid (#\w+)", marks["s4"])[1]
    assert to_hex(line) not in {to_hex(look.colour) for look in LOOKS.values()}
    for ink, papers in ((INK, ["#ffffff"]), (DARK_INK, [DARK_PAPER, "#14181e"])):
        for paper in papers:
            before = 1.0
            for mark in [*marks.values()][1:]:
                *colour, opacity = (float(one) for one in re.search(r"rgba\(([^)]*)\)", mark)[1].split(", "))
                behind = [opacity * c / 255 + (1 - opacity) * p for c, p in zip(colour, to_rgb(paper), strict=True)]
                assert contrast(ink, to_hex(behind)) >= 4.5, (ink, mark)
                assert contrast(paper, to_hex(behind)) > before  # stronger with every step
                before = contrast(paper, to_hex(behind))
            assert contrast(line, paper) >= 3
