"""The page of a board in a real browser: mouse, keyboard, reload; no complaint, and no request to anybody."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from eora_lab.board import board, write_page
from eora_lab.board.serve import Server
from eora_lab.experiment import ResultStore, expand, plan, run_plan
from eora_lab.experiment.running import noted
from eora_lab.progress import at
from tests.test_board import NASTY
from tests.test_sweep import SMALL

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
BASE, OTHER = "no compensation, rtn, 4-bit, groups of 16, nvfp4", "EoRA, rtn, 4-bit, groups of 16, rank 64, nvfp4"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(page, its data) of a recorded store, and a cell that failed with a text that no page should obey."""
    folder = tmp_path_factory.mktemp("board")
    store = ResultStore(shutil.copytree(ROOT / "data" / "measured" / "formats", folder / "store"))
    config = next(cell["config"] for cell in store.cells() if cell["config"].get("method") == "eora")
    store.put(config | {"rank": 500}, {}, error=f"no source {NASTY}")
    data = board(store, figure=True, go_on=[("Cells that are left: 1", "eora-lab sweep formats --store store")])
    write_page(folder / "board.html", data)
    return folder / "board.html", data


@pytest.fixture
def tab(browser):
    """A tab that is no worse for what it showed: no complaint, and no request to another machine."""
    one = browser.new_page(viewport={"width": 1300, "height": 1000})
    complaints: list[str] = []
    one.on("console", lambda message: complaints.append(message.text))
    one.on("pageerror", lambda error: complaints.append(str(error)))
    one.on("dialog", lambda dialog: complaints.append(dialog.message))
    one.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(LOCAL) else None)
    one.set_default_timeout(60_000)
    yield one
    one.close()
    assert complaints == []


@pytest.fixture
def page(tab, recorded):
    """The page of the recorded store, opened."""
    tab.goto(recorded[0].as_uri())
    tab.wait_for_selector(".eora-board tbody tr")
    return tab


LOCAL = ("file:", "blob:", "data:", "http://127.0.0.1:")


def column(page, title: str) -> list[str]:
    """What a column of the table shows, from top to bottom."""
    titles = page.locator(".cells thead th").all_inner_texts()
    place = next(i for i, text in enumerate(titles) if text.strip().startswith(title)) + 1
    return page.locator(f".cells tbody td:nth-child({place})").all_inner_texts()


def verdict(data: dict, name: str) -> str:
    """What the board should say of a baseline."""
    i = next(i for i, one in enumerate(data["cells"]) if one["name"] == name)
    gaps = [
        (low, high) if a == i else (-high, -low) for a, b, _, low, high in data["intervals"][0]["pairs"] if i in (a, b)
    ]
    better, worse = sum(high < 0 for _, high in gaps), sum(low > 0 for low, _ in gaps)
    return f"against {name}: {better} better, {worse} worse and {len(gaps) - better - worse} undecided"


def test_the_table_sorts_and_filters_by_mouse_and_keyboard(page, recorded):
    heading = page.locator(".cells thead th", has_text="perplexity on wikitext2:test")
    values = [one["values"]["perplexity.wikitext2:test"] for one in recorded[1]["cells"] if one["status"] == "done"]
    heading.click()
    page.locator("th[aria-sort='ascending']", has_text="perplexity").wait_for()
    shown = [float(text) for text in column(page, "perplexity") if text]
    assert shown == [float(f"{x:.2f}") for x in sorted(values)]
    heading.locator("[tabindex='0']").or_(heading.and_(page.locator("[tabindex='0']"))).first.focus()
    page.keyboard.press("Enter")
    page.locator("th[aria-sort='descending']", has_text="perplexity").wait_for()
    page.get_by_label("Filter").fill("EoRA nvfp4")
    page.get_by_text("4 cells of 38").wait_for()
    assert set(column(page, "compensation")) == {"EoRA"} and set(column(page, "grid")) == {"nvfp4"}
    page.get_by_label("Filter").fill("failed")
    page.get_by_text("1 cell of 38").wait_for()
    assert column(page, "reason") == [f"no source {NASTY}"]


def test_a_baseline_is_pinned_and_stays_when_the_page_is_loaded_again(page, recorded):
    data = recorded[1]
    assert (
        verdict(data, next(one["name"] for one in data["cells"] if one["id"] == data["baseline"]))
        in page.locator(".paired").inner_text()
    )
    pin = page.get_by_role("button", name=f"baseline: {BASE}", exact=True)
    pin.focus()
    page.keyboard.press("Enter")
    assert pin.get_attribute("aria-pressed") == "true"
    assert verdict(data, BASE) in page.locator(".paired").inner_text()
    assert page.locator(".paired .point").count() == 36
    page.get_by_label("Filter").fill("nvfp4")
    page.reload()
    page.wait_for_selector(".eora-board tbody tr")
    assert verdict(data, BASE) in page.locator(".paired").inner_text()
    page.get_by_text("6 cells of 38").wait_for()


def test_points_are_walked_through_and_chosen_and_axes_are_changed(page, recorded):
    data = recorded[1]
    page.get_by_label("across").select_option("cost.total")
    page.get_by_label("up", exact=True).select_option("output_error.after")
    points = page.locator(".picture .point")
    assert points.count() == 36  # the dense model has no such error
    drawn = [one for one in data["cells"] if one["values"].get("output_error.after") is not None]
    order = sorted(drawn, key=lambda one: one["values"]["cost.total"])
    page.locator(".picture .point[tabindex='0']").focus()
    for _ in order:
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert "seconds" in page.locator(".picture .tip").inner_text()
    page.keyboard.press("Enter")
    chosen = page.locator(".compare select")
    assert chosen.input_value() == order[1]["id"]
    assert page.evaluate("document.activeElement.dataset.id") == order[1]["id"]  # not lost when drawn again
    other = next(one for one in data["cells"] if one["name"] == OTHER)
    page.locator(f".paired .point[data-id='{other['id']}']").click()
    assert chosen.input_value() == other["id"]
    text = page.locator(".compare").inner_text()
    assert OTHER in text and f"{other['values']['perplexity.wikitext2:test']:.2f}" in text
    assert page.locator(".layers .point").count() == 420
    page.locator(f".cells tr[data-id='{order[0]['id']}']").click()
    assert chosen.input_value() == order[0]["id"]


def test_the_page_says_what_a_reader_in_the_morning_asks(page, recorded):
    data = recorded[1]
    text = page.locator(".head").inner_text()
    for said in (data["question"]["sentence"], "38 cells: 37 done, 1 failed", data["findings"][0], data["cost"][0]):
        assert said in text
    base = next(one["name"] for one in data["cells"] if one["id"] == data["baseline"])
    measure = data["intervals"][0]["name"]
    assert f"{measure}: {verdict(data, base).partition(': ')[2]} (" in text
    assert f"1 cell: no source {NASTY}" in text
    assert page.locator(".head pre").inner_text() == "eora-lab sweep formats --store store"
    picture = page.locator(".head img")
    assert picture.evaluate("image => image.naturalWidth") > 100
    assert picture.get_attribute("alt") == data["figures"][0]["alt"]
    assert json.loads(page.locator("#data").text_content()) == json.loads(json.dumps(data))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.set_viewport_size({"width": 390, "height": 800})  # of a phone
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_page_that_is_served_follows_a_sweep(tab, workplace):
    store, grid = ResultStore("store"), SMALL | {"method": ["none", "eora"], "rank": 4}
    with Server(store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            tab.goto(server.address)
            tab.get_by_role("heading", name="The store has no cells yet").wait_for()
            cells = expand(grid)
            steps = run_plan(plan(cells, store), cells, store)
            next(steps)
            tab.get_by_text("1 cell: 1 done").wait_for()
            with noted(store, cells[1].config()):
                at("compress", 3, 30, "block")
                bar = tab.get_by_role("progressbar")
                bar.wait_for()
                assert bar.get_attribute("value") == "0.1"
                assert "compress, block 4 of 30" in tab.locator(".now").inner_text()
            next(steps)
            tab.get_by_text("2 cells: 2 done").wait_for()
            assert tab.locator(".picture .point").count() == 2 and bar.count() == 0
        finally:
            server.shutdown()
