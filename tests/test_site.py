"""The site (`make site`): whole, readable, in words too, and without a network; and the records that it shows."""

import importlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import eora_lab
from docs.notebooks import NOTEBOOKS, RECORDED, ROOT, Record, digest, record_of
from docs.pages import LINK, linked, page
from docs.stills import kept
from eora_lab.plots.looks import DARK_PAPER
from tests.test_plots import contrast

pytest.importorskip("sphinx", reason="sphinx is the extra `docs`")

from docs.build import build
from docs.docstrings import PUBLIC, as_rst, targets
from docs.explorable import FILE, state
from docs.mathml import mathml

TEXTS = [*(ROOT / "docs" / "site").rglob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
OWN = ("sphinx-", "pst-")  # places that scripts of the theme make


class Page(HTMLParser):
    """What a page has: links, anchors, pictures with their texts, what it loads, and its words."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.anchors, self.pictures, self.loads, self.words = [], set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.pictures.append((found.get("src"), found.get("alt")))
        loaded = found.get("src") if tag in ("script", "img", "iframe") else None
        if tag == "link" and found.get("rel") != "canonical":
            loaded = found.get("href")
        self.loads += [loaded] if loaded and not loaded.startswith("data:") else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    return build(folder / "html", folder / "work").parent


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_there_is_a_page_of_everything(site):
    first = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{door}.html"' in first for door in ("understand", "teach", "my-model", "my-method"))
    assert all((site / "notebooks" / f"{path.stem}.html").exists() for path in NOTEBOOKS)
    assert all((site / "docs" / "guides" / f"{path.stem}.html").exists() for path in ROOT.glob("docs/guides/*.md"))


def test_no_link_leads_nowhere(site, pages):
    for path, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("https", "mailto"), (path, link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists() and target.is_relative_to(site), (path.name, link)
            anchor = unquote(parts.fragment)
            if anchor and target in pages:
                assert anchor in pages[target].anchors or anchor.startswith(OWN), (path.name, link)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, found in pages.items():
        for place in found.loads:
            assert not urlsplit(place).scheme and not place.startswith("//"), (path.name, place)
            assert (path.parent / urlsplit(place).path).exists(), (path.name, place)
    for style in site.rglob("*.css"):
        places = re.findall(r"url\(\s*[\"']?([^)\"']+)|@import\s+[\"']([^\"']+)", style.read_text(encoding="utf-8"))
        assert not [one for pair in places for one in pair if one.startswith(("http:", "https:", "//"))], style.name


def test_every_picture_says_what_it_shows(site, pages):
    for path, found in pages.items():
        for place, alt in found.pictures:
            assert alt and len(alt) > 10, (path.name, place[:80])
    ours = dict(pages[site / "index.html"].pictures)
    assert any("EoRA, rank 64 17.85" in alt for alt in ours.values())


def test_recorded_figures_have_an_ink_for_light_and_for_dark_pages(pages):
    figures = [place for found in pages.values() for place, _ in found.pictures if place.startswith("data:image/svg")]
    assert len(figures) > 9
    assert all("svg {color: %231f2328}" in one and "prefers-color-scheme: dark" in one for one in figures)


def test_formulas_need_no_script(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert text.count("<math") > 5 and "MathJax" not in text
    assert mathml(r"\hat W x", "inline").startswith("<math")
    with pytest.raises(Exception, match="no MathML"):
        mathml(r"\nosuchcommand{x}", "inline")


@pytest.mark.parametrize("name", PUBLIC)
def test_all_that_is_public_is_in_the_reference(pages, site, name):
    described = set().union(*(pages[path].anchors for path in (site / "reference").glob("*.html")))
    wanted = [one for one in importlib.import_module(name).__all__ if not one.startswith("__")]
    assert not [one for one in wanted if not {f"{name}.{one}", targets()[one]} & described]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_the_page(site, theme):
    sheets = ("styles/pydata-sphinx-theme.css", "lab.css")
    style = "".join((site / "_static" / sheet).read_text(encoding="utf-8") for sheet in sheets)
    blocks = re.findall(rf"html\[data-theme={theme}\]\{{([^}}]*)\}}", style)
    colours = dict(re.findall(r"--(pst-[\w-]+):\s*([^;]+)", ";".join(blocks)))

    def colour(name: str) -> str:
        value = colours[name].strip()
        return colour(value.removeprefix("var(--").removesuffix(")")) if value.startswith("var(") else value

    for words in ("text-base", "text-muted", "link", "link-hover", "inline-code"):
        for behind in ("background", "surface"):
            assert contrast(colour(f"pst-color-{words}"), colour(f"pst-color-{behind}")) >= 4.5, (words, behind)
    assert theme == "light" or contrast(DARK_PAPER, colour("pst-color-background")) < 1.2  # figures melt into the page


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_the_examples_run(path):
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        if "load_model(" not in block:  # a language model
            exec(compile(block, path.name, "exec"), {})


def test_a_docstring_keeps_its_formulas_and_its_columns():
    lines = ["Minimise |x|² over `rank` by `solve`.", "", "weight:   (out, in), kept_", "    as it is.", "bits: 2 * 2"]
    assert as_rst([*lines, "", "    a * b"]) == [
        "Minimise \\|x\\|² over ``rank`` by :py:obj:`solve <eora_lab.compensate.solve>`.", "", "",
        "*weight*", "    (out, in), kept\\_", "    as it is.", "*bits*", "    2 \\* 2",
        "", "", "::", "", "        a * b",
    ]  # fmt: skip


def test_a_link_to_a_file_that_the_site_has_not_is_its_name():
    text = "see [it](../eora_lab/errors.py), [this](00_quickstart.ipynb#a) and [that](https://x.org)"
    out = linked(text, Path("notebooks/x.md"), {Path("notebooks/00_quickstart.ipynb")})
    assert out == "see it (`eora_lab/errors.py`), [this](00_quickstart.ipynb#a) and [that](https://x.org)"
    assert LINK.search("![a](b.png)") is None


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_opens_the_pages_from_their_files(site, browser, theme, tmp_path):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=theme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    shots = Path(os.environ.get("EORA_LAB_SCREENSHOTS", tmp_path))
    for place in ("index", "notebooks/02_svd_vs_eora_error_analysis", "docs/guides/results", "reference/compensate"):
        page.goto((site / f"{place}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{place} is too wide"
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        page.screenshot(path=shots / f"site-{theme}-{place.rpartition('/')[2]}.png")
    page.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))] and complaints == []


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_explorable_follows_keys_and_mouse_without_a_kernel(site, browser, theme, tmp_path):
    from tests.explorable import Explorable

    known = state()
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=theme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto((site / "see.html").as_uri())
    shown, prompt = Explorable(page), known["prompt"]
    assert shown.rank == str(known["rank"])
    shown.drive(known["ranks"])
    for i in (0, known["ranks"].index(32), -1):
        shown.slider.fill(str(i % len(known["ranks"])))
        wrote = [known["texts"][prompt][method][i] for method in ("svd", "eora")]
        assert [one.split() for one in shown.texts] == [
            one.split() for one in (*wrote, known["texts"][prompt]["original"])
        ]
    left = known["views"][layer := list(known["views"])[-1]]["left"]["eora"]
    page.get_by_label("Layer").select_option(layer)
    shown.slider.fill("3")
    assert f"EoRA {100 * left[3]:.0f} %" in shown.shown(f"At rank {known['ranks'][3]} ")
    page.get_by_label("Prompt").select_option(other := list(known["texts"])[-1])
    assert shown.texts[2].split() == known["texts"][other]["original"].split()
    print(f"\n{theme}: {shown.step()}")
    page.reload()
    assert Explorable(page).rank == str(known["rank"])
    shots = Path(os.environ.get("EORA_LAB_SCREENSHOTS", tmp_path))
    for name, width in (("phone", 390), ("wide", 1280)):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"too wide at {width}"
        page.locator(".eora-explorable").screenshot(path=shots / f"explorable-{theme}-{name}.png")
    page.close()
    assert complaints == [] and not [url for url in asked if not url.startswith(("file:", "data:"))]


def test_the_explorable_says_its_numbers_without_javascript(site):
    text, known = (site / "see.html").read_text(encoding="utf-8"), state()
    left = known["views"][known["layer"]]["left"]
    place = known["ranks"].index(64)
    assert f"<li>rank 64: SVD leaves {100 * left['svd'][place]:.1f} %" in text
    assert FILE.stat().st_size < 1e6 and FILE.read_text(encoding="utf-8").count("python -m docs.explored") == 1


# --- records -------------------------------------------------------------------------------------------------------


def test_a_page_says_which_command_makes_its_outputs_and_whether_they_are_old():
    path = NOTEBOOKS[0]
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    shown = {cell.id: [{"output_type": "stream", "name": "stdout", "text": "seen"}]}
    for record, words in (
        (None, "not recorded yet: `make record"),
        (Record(digest(notebook), 60.0, {"torch": "2"}, shown), 'as recorded by `make record ARGS="00"` (1.0 minutes'),
        (Record("of older code", 60.0, {}, shown), "made by **older code**"),
    ):
        made = page(path, record, set())
        assert words in made.cells[1].source
        outputs = [one for cell in made.cells if cell.cell_type == "code" for one in cell.outputs]
        assert len(outputs) == (record is not None)
        assert [cell.source for cell in made.cells if cell.cell_type == "code"] == [
            cell.source for cell in notebook.cells if cell.cell_type == "code"
        ]


def test_other_code_makes_another_digest_and_other_words_do_not():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    before = digest(notebook)
    notebook.cells[0].source += " and more"
    assert digest(notebook) == before
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n1"
    assert digest(notebook) != before


def test_records_are_small_and_written_alike(tmp_path):
    record = Record("d", 1.0, {}, {"a": [{"output_type": "stream", "name": "stdout", "text": "é" * 99}]})
    for name in ("a", "b"):
        record.write(tmp_path / f"{name}.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert record_of(Path("a.ipynb"), tmp_path) == record
    assert sum(path.stat().st_size for path in RECORDED.glob("*")) < 10e6
    assert {path.name.partition(".")[0] for path in RECORDED.glob("*.gz")} <= {path.stem for path in NOTEBOOKS}


def test_a_run_is_kept_without_its_bars_and_with_its_widgets_as_they_stood(tmp_path):
    pytest.importorskip("ipywidgets", reason="ipywidgets is the extra `lab`")
    from docs.record import record

    code = [
        "from tqdm.auto import tqdm\nimport ipywidgets\nfor _ in tqdm(range(3)): pass\nprint('seen')\n"
        "from eora_lab.progress import tqdm\nfor leave in (True, False):\n for _ in tqdm(range(3), leave=leave): pass",
        "import matplotlib.pyplot as plt\nfrom eora_lab.plots import tell, use_style\nuse_style()\n"
        "figure, axes = plt.subplots()\ntell(figure, 'It is 7', 'A line.')\nplt.show()",
        "ipywidgets.VBox([ipywidgets.IntSlider(3, description='Rank'), ipywidgets.HTML('<b>told</b>')])",
        "from IPython.display import Image\nplt.figure().savefig('p.png')\nplt.close()\nImage('p.png')",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(code)]
    )
    nbformat.write(notebook, tmp_path / "x.ipynb")
    found = record(tmp_path / "x.ipynb", tmp_path / "work")
    assert found.digest == digest(notebook) and found.seconds > 0 and "torch" in found.versions
    assert found.outputs["c0"] == [{"output_type": "stream", "name": "stdout", "text": "seen\n"}]
    (figure,) = found.outputs["c1"]
    shown = figure["data"]["text/html"]
    assert (
        list(figure["data"]) == ["text/html"] and 'alt="It is 7. A line."' in shown and "prefers-color-scheme" in shown
    )
    (widget,) = found.outputs["c2"]
    assert "<em>Rank:</em> 3" in widget["data"]["text/html"] and "<b>told</b>" in widget["data"]["text/html"]
    (picture,) = found.outputs["c3"]
    assert "image/png" in picture["data"]


def test_what_a_cell_said_besides_its_bars_is_kept():
    output = {"output_type": "stream", "name": "stderr", "text": "  5%|#   | 1/20\nWarning: this matters\n"}
    assert kept([output], {}) == [{**output, "text": "Warning: this matters\n"}]
    assert eora_lab.__version__
