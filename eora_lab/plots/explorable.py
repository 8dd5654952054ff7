"""The front-end of the explorable "Seeing EoRA": one JavaScript module, which pages and the notebook's widget share."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eora_lab.files import digest
from eora_lab.plots.looks import looks, method_name
from eora_lab.plots.words import listed

HERE = Path(__file__).parent
MODULE = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in ("explorable_charts", "explorable"))
SHEET = (HERE / "explorable.css").read_text(encoding="utf-8")
DASHES = {"-": "", "--": "7 4", "-.": "7 3 2 3", ":": "2 3"}
FIELDS = ("methods", "colours", "ranks", "rank", "layer", "views", "prompt", "texts", "perplexity", "path_bits")
UNIT = 2  # pixels of a step in matplotlib's own dashes


def drawn(methods: Sequence[str]) -> list[dict[str, str]]:
    """How the front-end draws methods: as all figures do."""
    found = looks(list(methods))
    return [
        {"key": one, "name": method_name(one), "colour": found[one].colour, "dash": _dash(found[one].line)}
        for one in methods
    ]


def _dash(line: str | tuple) -> str:
    """A line style of matplotlib as SVG has it."""
    return DASHES[line] if isinstance(line, str) else " ".join(str(UNIT * step) for step in line[1])


def colours(steps: int = 33) -> list[str]:
    """The colour scale of error maps, from little to much."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](k / (steps - 1))) for k in range(steps)]


def as_page(state: Mapping) -> str:
    """The explorable as HTML that needs no kernel and loads nothing; without JavaScript, what it shows in words.

    state: what the module asks its model for, see `RankExplorer`.
    """
    kept = {name: state[name] for name in FIELDS}
    data = json.dumps(kept, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    place = f"explorable-{digest(kept)[:12]}"
    start = f"render({{model: still({data}), el: document.getElementById('{place}')}});"
    return (
        f'<div id="{place}">{_in_words(state)}</div>\n<style>\n{SHEET}</style>\n'
        f'<script type="module">\n{MODULE}\n{start}\n</script>\n'
    )


def _in_words(state: Mapping) -> str:
    """What every rank leaves of the layer that is shown first, and what the models write there."""
    methods, view, texts = state["methods"], state["views"][state["layer"]], state["texts"].get(state["prompt"], {})
    rows = [f"<p>What is left of the output error of <code>{html.escape(state['layer'])}</code>:</p>\n<ul>"]
    for i, rank in enumerate(state["ranks"]):
        said = listed(f"{one['name']} leaves {100 * view['left'][one['key']][i]:.1f} %" for one in methods)
        rows.append(f"<li>rank {rank}: {said}</li>")
    rows.append("</ul>")
    i = state["ranks"].index(state["rank"])
    wrote = [("The original", texts.get("original"))]
    wrote += [(f"{one['name']} at rank {state['rank']}", (texts.get(one["key"]) or {i: None})[i]) for one in methods]
    rows += [
        f"<p>{html.escape(who)} goes on from “{html.escape(state['prompt'])}” with: {html.escape(text)}</p>"
        for who, text in wrote
        if text
    ]
    return "\n".join(rows)
