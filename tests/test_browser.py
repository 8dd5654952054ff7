"""Real JupyterLab in a real browser: notebooks run, widgets answer to the keyboard, nothing complains."""

import json
import os
import re
import secrets
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from docs.lab import FIRST, command, surroundings
from docs.notebooks import ROOT, environment
from docs.strip import stripped
from tests.notebooks import as_clone, smoke_copy

pytest.importorskip("playwright", reason="playwright is the extra `dev`")

from tests.explorable import Explorable

pytestmark = pytest.mark.browser

MINUTE = 60_000  # milliseconds, as playwright counts; all waits are long, for a busy machine
LONG = 10 * MINUTE
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
CELLS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
    .filter(cell => cell.cell_type === 'code')"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, token) of a JupyterLab whose root holds the notebooks at their smoke size."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is the extra `lab`")
    folder = tmp_path_factory.mktemp("lab")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        copy = smoke_copy(path, folder)
        copy.write_text(stripped(copy.read_text(encoding="utf-8")), encoding="utf-8")
    as_clone(folder)
    env = environment(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    started = command([*options, "--LabApp.expose_app_in_browser=True"], root=os.geteuid() == 0)
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(started, env=surroundings(env), cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address, token, folder
        stop = urllib.request.Request(
            f"{address}/api/shutdown", method="POST", headers={"Authorization": f"token {token}"}
        )
        urllib.request.urlopen(stop, timeout=60)
        process.wait(120)
    finally:
        if process.poll() is None:
            process.terminate()


class Lab:
    """One notebook in one tab."""

    def __init__(self, page, shots: Path, name: str):
        self.page, self.shots, self.name = page, shots, name
        self.complaints: list[str] = []
        page.on(
            "console", lambda message: self._hear(message.type, f"{message.text} {message.location.get('url', '')}")
        )
        page.on("pageerror", lambda error: self._hear("error", str(error)))

    def _hear(self, kind: str, text: str) -> None:
        if kind == "error":
            self.complaints.append(text)

    def open(self, address: str, token: str) -> None:
        self.page.goto(f"{address}/lab/tree/notebooks/{self.name}?token={token}&reset", timeout=LONG)
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=LONG)
        self.page.wait_for_function(KERNEL, timeout=LONG)

    def run_all(self) -> None:
        """Run all cells; fail on the first error output."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(
            f"({CELLS})().every(cell => cell.execution_count) || ({CELLS})().some(cell => "
            "cell.outputs.some(output => output.output_type === 'error'))",
            timeout=LONG,
        )
        self.page.wait_for_function(KERNEL, timeout=LONG)
        outputs = [output for cell in self.page.evaluate(CELLS) for output in cell["outputs"]]
        assert [output for output in outputs if output["output_type"] == "error"] == []
        assert [output for output in outputs if "Warning" in str(output.get("text", ""))] == []

    def picture(self, what: str, selector: str) -> None:
        """Screenshots of an element in the light and the dark theme."""
        for theme in ("Light", "Dark"):
            self.page.evaluate(
                f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})"
            )
            shown = f"document.body.dataset.jpThemeLight === '{str(theme == 'Light').lower()}'"
            self.page.wait_for_function(shown, timeout=MINUTE)
            self.page.wait_for_timeout(300)
            file = self.shots / f"{self.name[:2]}-{what}-{theme.lower()}.png"
            self.page.locator(selector).first.screenshot(path=file, timeout=MINUTE)

    def changes(self, read: str, act) -> None:
        """Act, and wait until what `read` (JavaScript) gives is another."""
        before = self.page.evaluate(read)
        act()
        self.page.wait_for_function(f"before => ({read})() !== before", arg=before, timeout=MINUTE)


@pytest.fixture
def lab(server, browser, tmp_path):
    address, token, _ = server
    shots = Path(os.environ.get("EORA_LAB_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(MINUTE)

    def start(name: str) -> Lab:
        opened = Lab(page, shots, name)
        opened.open(address, token)
        return opened

    yield start
    page.close()


def text_of(selector: str) -> str:
    return f"() => document.querySelector({json.dumps(selector)})?.textContent"


def image_in(selector: str, index: int) -> str:
    """The source of a figure in the output that holds `selector`, which is a picture that the page could draw."""
    holder = json.dumps(f".jp-OutputArea-output:has({selector}) img")
    return f"() => (image => image?.naturalWidth ? image.src : undefined)(document.querySelectorAll({holder})[{index}])"


def test_it_opens_at_the_first_notebook_and_asks_nothing(lab, server):
    folder = server[2]
    (opened,) = set(re.findall(r"http://127.0.0.1:\d+(/lab\S*)\?token", (folder / "server.log").read_text()))
    assert opened == f"/lab/tree/{FIRST}"
    page = lab(Path(FIRST).name)
    page.page.wait_for_selector(f".jp-DirListing-item[title*='{Path(FIRST).name}']")
    names = page.page.eval_on_selector_all(
        ".jp-DirListing-item .jp-DirListing-itemText",
        "all => all.map(one => [one.textContent, one.clientWidth / one.scrollWidth])",
    )
    assert Path(FIRST).name in dict(names) and min(dict(names).values()) > 0.8  # of a name is to be read
    page.page.wait_for_timeout(3000)  # the bubble came after a moment
    assert page.page.locator(".jp-toast-message, .Toastify__toast").count() == 0
    page.picture("welcome", "#main")
    assert page.complaints == []


def test_the_quickstart_shows_before_and_after(lab, server):
    page = lab("00_quickstart.ipynb")
    page.run_all()
    printed = page.page.locator(".jp-OutputArea-output", has_text="=== compressed + EoRA: perplexity")
    assert re.search(r"=== original: perplexity \d+\.\d\d\n.+=== compressed: perplexity", printed.text_content(), re.S)
    page.picture("before-after", ".jp-OutputArea-output:has-text('=== compressed + EoRA')")
    button = page.page.get_by_role("button", name="Write")
    button.scroll_into_view_if_needed()
    page.page.get_by_label("Prompt").fill("The sea is")
    tokens = page.page.get_by_role("slider", name="Tokens")
    before = int(tokens.input_value())
    tokens.press("ArrowRight")  # which JupyterLab leaves to it
    assert int(tokens.input_value()) == before + 1
    for control in (tokens, button, page.page.get_by_label("Prompt")):
        control.focus()
        assert control.evaluate("one => getComputedStyle(one).outline").endswith("solid 2px"), "where are the keys?"
    button.focus()
    page.changes(
        "() => document.querySelectorAll('.jp-OutputArea-output section').length",
        lambda: page.page.keyboard.press("Enter"),
    )
    page.page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output section').length === 3", timeout=LONG)
    page.page.wait_for_function(KERNEL, timeout=LONG)
    page.picture("generator", ".jp-OutputArea-output:has(section)")
    page.picture("summary", ".jp-OutputArea-output:has(table):has-text('bits per weight')")
    page.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.page.wait_for_function("window.jupyterapp.shell.currentWidget.context.model.dirty === false", timeout=MINUTE)
    page.page.reload()
    page.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=LONG)
    page.page.get_by_role("button", name="Write").wait_for(timeout=LONG)
    page.page.wait_for_function(KERNEL, timeout=LONG)
    assert page.page.get_by_text("Error displaying widget").count() == 0
    saved = (server[2] / "notebooks" / page.name).read_text(encoding="utf-8")
    assert "text/plain" in saved and "text/plain" not in stripped(saved)
    changed = ["git", "-C", str(server[2]), "status", "--porcelain", f"notebooks/{page.name}"]
    assert subprocess.run(changed, check=True, capture_output=True, text=True).stdout == ""
    assert page.complaints == []


def test_the_rank_explorer_follows_the_arrow_keys(lab):
    page = lab("02_svd_vs_eora_error_analysis.ipynb")
    page.run_all()
    shown = Explorable(page.page)
    shown.slider.scroll_into_view_if_needed()
    before = shown.maps
    shown.slider.press("ArrowRight")
    shown.shown("At rank 48 ")
    assert shown.maps != before
    for index, what in enumerate(("spectra", "two-spectra", "losses", "maps")):
        page.picture(what, f":nth-match(img.eora-figure, {index + 1})")
    assert page.complaints == []


EXPLORED = """
from eora_lab import Exploration, Recipe, calibration_batches, collect_statistics
from eora_lab.widgets import RankExplorer
from tests.tiny import TEXT, tiny_model, tiny_tokenizer
open("text.txt", "w").write(TEXT)
model, tokenizer = tiny_model("llama"), tiny_tokenizer()
statistics = collect_statistics(model, calibration_batches(tokenizer, "text.txt", 4, 32), progress=False)
exploration = Exploration(model, statistics, Recipe("rtn", bits=2, group_size=32))
explorer = RankExplorer(exploration, model, tokenizer, rank=8, tokens=12, prompt="Fox")
explorer
"""


def test_the_rank_explorer_solves_and_writes_what_is_asked_for(lab, server):
    name = "explorer.ipynb"
    cells = [nbformat.v4.new_code_cell(EXPLORED.strip())]
    about = nbformat.read(ROOT / "notebooks" / "00_quickstart.ipynb", as_version=4).metadata
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=about), server[2] / "notebooks" / name)
    page = lab(name)
    asked = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.run_all()
    shown = Explorable(page.page)
    first = shown.texts
    assert shown.rank == "8" and "writing ..." not in first
    shown.drive([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    shown.slider.press("End")
    shown.shown("At rank 64 ")
    shown.written()
    assert shown.texts[0] == shown.texts[1] == first[2]  # nothing is left of the error
    page.page.get_by_label("Prompt").fill("The dog")
    page.page.get_by_label("Prompt").press("Enter")
    page.page.wait_for_function(
        "first => document.querySelectorAll('.eora-explorable .written')[2].innerText !== first", arg=first[2]
    )
    shown.written()
    layers = page.page.get_by_label("Layer")
    layers.select_option("model.layers.1.mlp.down_proj")
    shown.shown("At rank 64 ")
    page.picture("explorer", ".eora-explorable")
    print(f"\n{shown.step()}")
    page.page.get_by_label("Prompt").fill("")
    page.page.get_by_label("Prompt").press("Enter")
    page.page.get_by_role("alert").filter(has_text="the prompt is empty").wait_for()
    page.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")
    page.page.reload()
    again = Explorable(page.page)
    assert page.page.get_by_label("Layer").input_value() == "model.layers.1.mlp.down_proj"
    again.slider.press("Home")
    again.shown("At rank 0 ")
    assert not [url for url in asked if not re.match(rf"{server[0]}|ws://127.0.0.1|data:|blob:", url)]
    assert page.complaints == []


def test_the_ablation_form_stops_within_a_cell_and_its_board_follows(lab, server):
    store = server[2] / "notebooks" / "runs" / "ablation"
    page = lab("08_ablation_lab.ipynb")
    page.run_all()
    assert len(list(store.glob("*.json"))) == 1  # the cell that runs by itself
    run, stop = page.page.locator("button.eora-run"), page.page.locator("button.eora-stop")
    run.scroll_into_view_if_needed()
    page.picture("form-before", ".jp-OutputArea-output:has(.eora-run)")
    form = page.page.locator(".jp-OutputArea-output:has(.eora-run)")
    form.get_by_text("4 cells: 1 done, 3 waiting", exact=True).wait_for()
    run.focus()
    page.page.keyboard.press("Enter")
    form.get_by_text(re.compile(r"^running cell 1 of 3: .*(statistics|compress|perplexity), ")).wait_for(timeout=LONG)
    form.locator(".now progress").wait_for()
    stop.focus()
    page.page.keyboard.press("Enter")
    form.get_by_text("stopped: 0 cells run, 0 failed, 3 left").wait_for(timeout=LONG)
    assert len(list(store.glob("*.json"))) == 1
    page.picture("form-stopped", ".jp-OutputArea-output:has(.eora-run)")
    run.focus()
    page.page.keyboard.press("Enter")
    form.get_by_text(re.compile(r"finished: 3 cells run, 0 failed, 0 left")).wait_for(timeout=LONG)
    assert len(list(store.glob("*.json"))) == 4
    form.get_by_text("4 cells: 4 done", exact=True).wait_for()
    holder = ".jp-OutputArea-output:has(.eora-board):not(:has(.eora-run))"
    board = page.page.locator(holder)
    board.get_by_role("button", name="Read the store again").click()
    board.get_by_text("4 cells: 4 done", exact=True).wait_for()
    pin = board.get_by_role("button", name="baseline: dense", exact=True)
    pin.focus()
    page.page.keyboard.press("Enter")
    board.get_by_text(re.compile(r"Of 3 cells against dense: \d better")).wait_for()
    board.locator(".picture .point[tabindex='0']").focus()
    page.page.keyboard.press("ArrowRight")
    board.locator(".picture .tip").wait_for()
    page.page.keyboard.press("Enter")
    board.get_by_label("Filter").fill("rtn")
    board.get_by_text("3 cells of 4").wait_for()
    page.picture("board", holder)
    assert page.complaints == []
