"""Boards of small stores: what they show is what the package computes, and texts of a store start nothing."""

import base64
import hashlib
import html
import json
import re
import shutil
import threading
import urllib.request
from pathlib import Path

import pytest

from docs.stills import still
from eora_lab.board import board, page, write_page
from eora_lab.board.serve import Server
from eora_lab.cli import main
from eora_lab.errors import EoraLabError
from eora_lab.experiment import MEASURED, ResultStore, expand, paired, plan, run_plan, scores
from eora_lab.progress import Stopped
from eora_lab.run.intervals import Outcomes, all_pairs, paired_bootstrap
from tests.test_sweep import SMALL, quiet_sweep

ROOT = Path(__file__).parents[1]
GRID = [{"compressor": "dense"} | {k: v for k, v in SMALL.items() if k in ("model", "perplexity", "windows")}]
GRID = [GRID[0] | {"window_length": 32}, SMALL | {"bits": [2, 3], "method": ["none", "eora"], "rank": [4, 500]}]
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def sweep_of(name: str, folder: Path) -> ResultStore:
    """A copy of a recorded store, which reading may change."""
    return ResultStore(shutil.copytree(ROOT / "data" / "measured" / name, folder / name))


def by_name(data: dict) -> dict[str, dict]:
    return {cell["name"]: cell for cell in data["cells"]}


def data_in(text: str) -> dict:
    """What a page was made of."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_a_board_shows_a_grid_whole_before_while_and_after_it_runs(workplace):
    store, cells = ResultStore("store"), expand(GRID)
    before = board(store, cells)
    assert [cell["status"] for cell in before["cells"]] == ["waiting"] * 7
    assert {c["key"] for c in before["columns"]} >= {"compressor", "bits", "method", "rank"}
    seen = []

    def look(step):
        if len(seen) < 2:
            seen.append(board(store, cells))

    steps = run_plan(plan(cells, store), cells, store, watch=look)
    next(steps)
    (now,) = seen[-1]["running"]
    assert (
        now["id"] == by_name(before)["dense"]["id"]
        and now["name"] == "dense"
        and now["doing"] == "load"
        and now["share"] is None
    )
    list(steps)
    after = board(store, cells, figure=True)
    cells_of = by_name(after)
    assert [cell["status"] for cell in after["cells"]].count("done") == 5
    assert after["failures"] == [("rank 500 is larger than any layer allows: at most 64", 2)]
    assert cells_of["EoRA, 2-bit, rank 4"]["values"]["bits"] == 2
    assert cells_of["EoRA, 2-bit, rank 500"]["error"].startswith("rank 500")
    assert after["baseline"] == cells_of["no compensation, 2-bit"]["id"]
    assert after["question"]["sentence"].startswith("How does perplexity on text.txt depend on bits of a weight,")
    assert after["findings"][0].startswith("EoRA, ") or after["findings"][0].startswith("no compensation")
    assert after["figures"][0]["svg"].startswith("<?xml") and "2-bit" in after["figures"][0]["alt"]
    assert after["cost"][0].startswith("5 cells took ")
    assert set(by_name(board(store))) == set(cells_of)  # the whole store is this grid


def test_intervals_of_all_pairs_are_those_of_two(tmp_path):
    store = sweep_of("task-mix", tmp_path)
    data = board(store)
    kept = {store.path(cell["config"]).stem: cell for cell in store.cells()}
    order = [kept[cell["id"]] for cell in data["cells"]]
    assert {table["name"] for table in data["intervals"]} == {
        "log perplexity arc:test, nats a token", "log perplexity wikitext2:test, nats a token",
        "arc_easy acc, percentage points",
    }  # fmt: skip
    for table in data["intervals"]:
        name, factor = table["name"].partition(",")[0], 100.0 if table["name"].startswith("arc_easy") else 1.0
        assert len(table["pairs"]) == 6
        for i, j, *found in table["pairs"]:
            one = paired(scores(order[i])[name], scores(order[j])[name])
            assert found == pytest.approx([factor * x for x in (one.difference, one.low, one.high)], rel=1e-12)


def test_pairs_that_cannot_be_compared_are_left_out_and_ties_stay_ties():
    same, other = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    outcomes = [Outcomes("a", same), Outcomes("b", same), Outcomes("a", other), Outcomes("a", same[:2])]
    outcomes += [Outcomes("a", [float("nan"), 0.0, 0.0, 0.0]), Outcomes("a", same)]
    found = all_pairs(outcomes)
    assert set(found) == {(0, 2), (0, 5), (2, 5)}
    assert (found[0, 5].low, found[0, 5].high) == (0.0, 0.0) and not found[0, 5].decided
    assert found[0, 2] == paired_bootstrap(same, other)


def test_layers_and_numbers_of_a_board_are_those_of_the_store(tmp_path):
    store = sweep_of("formats", tmp_path)
    data = board(store)
    assert len(data["cells"]) == 37 and data["cells"][0]["name"] == "dense"
    assert len({cell["name"] for cell in data["cells"]}) == 37  # told apart by their names
    kept = {store.path(cell["config"]).stem: cell for cell in store.cells()}
    for cell in data["cells"]:
        result = kept[cell["id"]]["result"]
        assert cell["values"]["perplexity.wikitext2:test"] == result["perplexity"]["wikitext2:test"]
        low, high = cell["spread"]["perplexity.wikitext2:test"]
        assert low < result["perplexity"]["wikitext2:test"] < high
        if layers := data["layers"].get(cell["id"]):
            assert data["layerNames"][layers["of"]] == [name for name, *_ in result["layers"]]
            assert layers["after"] == pytest.approx([after for *_, after in result["layers"]], rel=1e-3)


def test_cells_that_differ_in_their_windows_alone_are_told_apart(workplace):
    store, cells = ResultStore("store"), expand([SMALL | {"windows": n, "rank": 4} for n in (1, 2, 3)])
    names = [cell["name"] for cell in board(store, cells)["cells"]]
    assert names == ["EoRA", "EoRA (2)", "EoRA (3)"]


def test_a_page_is_one_file_that_nothing_in_a_store_can_break_out_of(workplace):
    store = ResultStore("store")
    cell = expand(SMALL | {"rank": 4})[0]
    store.put(cell.config() | {"source": NASTY}, {}, error=f"no source {NASTY}")
    data = board(store, go_on=[(NASTY, NASTY)])
    text = page(data | {"title": NASTY})
    assert data_in(text)["cells"] == data["cells"] and NASTY in data["failures"][0][0]
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.S)
    assert [kind for kind, _ in scripts] == [' type="application/json" id="data"', ' type="module"']
    assert "<img src=x" not in text and "alert(1)</script>" not in text
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    allowed = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src blob: 'sha256-{allowed}'" in policy
    assert not re.search(r'(src|href)="?https?:', text)


def test_a_page_takes_no_file_that_is_none(tmp_path):
    data = board(ResultStore(tmp_path / "store"))
    write_page(tmp_path / "board.html", data)
    write_page(tmp_path / "board.html", data)
    (tmp_path / "thesis.html").write_text("<h1>years of work</h1>")
    with pytest.raises(EoraLabError, match="holds something else"):
        write_page(tmp_path / "thesis.html", data)


def test_a_server_shows_what_is_new_and_answers_no_other_site(workplace):
    store = ResultStore("store")
    with Server(store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(path: str, **headers: str):
            return urllib.request.urlopen(urllib.request.Request(server.address + path, headers=headers), timeout=60)

        try:
            assert data_in(get("").read().decode())["cells"] == []
            first = get("board.json")
            with pytest.raises(urllib.error.HTTPError, match="304"):
                get("board.json", **{"If-None-Match": first.headers["ETag"]})
            quiet_sweep(SMALL | {"rank": 4}, store)
            fresh = get("board.json", **{"If-None-Match": first.headers["ETag"]})
            assert [cell["status"] for cell in json.loads(fresh.read())["cells"]] == ["done"]
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get("board.json", Host="elsewhere.example")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get("../text.txt")
        finally:
            server.shutdown()


def test_a_page_without_a_kernel_shows_a_board_as_it_stood(workplace):
    store = ResultStore("store")
    cell = expand(SMALL | {"rank": 4})[0]
    store.put(cell.config() | {"model": NASTY}, {}, result={"perplexity": {"text.txt": 7.25}})
    told = still({"m": {"state": {"_model_name": "AnyModel", "choice": {}, "data": board(store)}}}, "IPY_MODEL_m")
    assert "perplexity on text.txt 7.25" in told and "<td>7.25</td>" in told and "<img" not in told


def test_a_sweep_leaves_its_page_however_it_ends(workplace, monkeypatch, capsys):
    Path("grid.yaml").write_text(json.dumps(SMALL | {"method": ["none", "eora"], "rank": [4, 500]}))
    command = ["sweep", "grid.yaml", "--store", "store", "--batch-size", "4"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eora_lab.experiment.job.run_cell", interrupt)
        assert main(command) == 130
    data = data_in(Path("store/board.html").read_text())
    assert [cell["status"] for cell in data["cells"]] == ["waiting"] * 3
    assert data["goOn"][0] == [
        data["goOn"][0][0], "eora-lab sweep grid.yaml --store store --batch-size 4",
    ]  # fmt: skip
    assert data["goOn"][0][0].startswith("Cells that are left: 3, about ")
    assert main(command) == 3
    assert "wrote store/board.html" in capsys.readouterr().out
    data = data_in(Path("store/board.html").read_text())
    assert [command for _, command in data["goOn"]] == [
        "eora-lab sweep grid.yaml --store store --batch-size 4 --retry-failed", "eora-lab board store",
    ]  # fmt: skip
    assert data["figures"] and data["findings"] and data["failures"]
    assert main(["board", "store", "--export", "page.html"]) == 0
    assert [c["name"] for c in data_in(Path("page.html").read_text())["cells"]] == [c["name"] for c in data["cells"]]


def test_a_sweep_that_runs_out_of_time_says_so(workplace, monkeypatch, capsys):
    Path("grid.yaml").write_text(json.dumps(SMALL | {"method": ["none", "eora"], "rank": 4}))
    command = ["sweep", "grid.yaml", "--store", "store"]
    assert main([*command, "--until", "7 o'clock"]) == 1
    assert "--until takes a time of day such as 07:00" in capsys.readouterr().err
    assert not Path("store").exists()
    monkeypatch.setattr("eora_lab.cli.sweep.next_time", lambda text: datetime_of_the_past())
    assert main([*command, "--until", "07:00"]) == 4
    out = capsys.readouterr().out
    assert out.count("2 to run") == 2
    data = data_in(Path("store/board.html").read_text())
    assert data["goOn"][0][1] == "eora-lab sweep grid.yaml --store store"
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert main(command) == 0


def datetime_of_the_past():
    from datetime import datetime, timedelta

    return datetime.now() - timedelta(seconds=1)


def test_the_next_time_is_within_a_day():
    from datetime import datetime, timedelta

    from eora_lab.cli.sweep import next_time

    now = datetime.now()
    for minutes in (-2, 2, 600):
        asked = now + timedelta(minutes=minutes)
        found = next_time(asked.strftime("%H:%M"))
        assert (found.hour, found.minute) == (asked.hour, asked.minute)
        assert now - timedelta(minutes=1) < found <= now + timedelta(days=1, minutes=1)
    assert issubclass(Stopped, KeyboardInterrupt)  # what catches errors lets it pass


def test_a_setting_that_is_empty_has_a_word():
    assert "['tasks', 'none, arc_easy']" in str(board(ResultStore(MEASURED / "paper")))
