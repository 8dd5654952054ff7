"""Outputs of cells as a page without a kernel can show them: widgets as they stood, bars gone, pictures small."""

import base64
import html
import io
import re

from PIL import Image

from eora_lab.plots.explorable import FIELDS, as_page
from eora_lab.plots.output import LAB

VIEW = "application/vnd.jupyter.widget-view+json"
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
BAR = re.compile(r"\d+%\|")  # of tqdm
COLOURS = 128  # of a picture: enough for lines, maps and letters


def kept(outputs: list, state: dict) -> list[dict]:
    """The outputs of a cell, without what only a kernel can move. state: of the notebook's widgets."""
    found = []
    for output in outputs:
        if output["output_type"] == "stream":
            lines = [line for line in output["text"].splitlines(keepends=True) if not BAR.search(line)]
            if "".join(lines).strip():
                found.append({"output_type": "stream", "name": output["name"], "text": "".join(lines)})
        elif shown := _shown(dict(output["data"]), state):
            found.append({"output_type": "display_data", "metadata": {}, "data": shown})
    return found


def _shown(data: dict, state: dict) -> dict:
    """The forms of an output that a page needs."""
    if VIEW in data:
        page = smaller(still(state, data[VIEW]["model_id"]))
        return {"text/html": page} if page.strip() else {}
    if set(data) == {"text/plain"} and (BAR.search(data["text/plain"]) or not data["text/plain"].strip()):
        return {}  # a bar of ours
    if 'class="eora-figure"' in data.get("text/html", ""):
        return {"text/html": data["text/html"].removeprefix(LAB)}  # the figure has a style of its own, which stays
    if "image/png" in data:
        data["image/png"] = base64.b64encode(_less(base64.b64decode(data["image/png"]))).decode()
    return data


def still(state: dict, model: str) -> str:
    """A widget as it stands, as HTML: pictures and texts, and what its controls are set to."""
    one = state.get(model.removeprefix("IPY_MODEL_"), {}).get("state", {})
    kind = one.get("_model_name", "")
    if all(name in one for name in FIELDS):
        return as_page(one)  # the explorable needs no kernel
    children = [state.get(child.removeprefix("IPY_MODEL_"), {}) for child in one.get("children", [])]
    if any("Progress" in child.get("state", {}).get("_model_name", "") for child in children):
        return ""  # a bar of tqdm
    if kind in ("HTMLModel", "HTMLMathModel", "LabelModel"):
        return f"<div>{one['value']}</div>"
    if "children" in one:
        inner = "".join(still(state, child) for child in one["children"])
        return f'<div class="{kind.removesuffix("Model").lower()}">{inner}</div>'
    if kind == "OutputModel":
        texts = [html.escape(each.get("text", "")) for each in one.get("outputs", [])]
        return "".join(f"<pre>{text}</pre>" for text in texts if text and not BAR.search(text))
    if "choice" in one and "cells" in one.get("data", {}):
        return _board(one["data"])
    value = one["value"] if "value" in one else one.get("index")
    if "_options_labels" in one and isinstance(one.get("index"), int):
        value = one["_options_labels"][one["index"]]
    if one.get("description") and value not in (None, "", ()) and kind != "ButtonModel":
        return f"<div><em>{html.escape(str(one['description']))}:</em> {html.escape(str(value))}</div>"
    return ""


def _board(data: dict) -> str:
    """What was found on a board, and its table."""
    columns = [one for one in data["columns"] if not one.get("hidden")]

    def row(tag: str, texts: list) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(text))}</{tag}>' for text in texts)}</tr>"

    def shown(value: object) -> object:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value

    rows = [row("th", ["state", *(one["name"] for one in columns)])]
    for cell in data["cells"]:
        rows.append(row("td", [cell["status"], *(shown(cell["values"].get(one["key"])) for one in columns)]))
    return "".join(f"<p>{html.escape(text)}</p>" for text in data["findings"]) + f"<table>{''.join(rows)}</table>"


def smaller(page: str) -> str:
    """A page with its pictures in fewer colours."""
    return PNG.sub(
        lambda found: "data:image/png;base64," + base64.b64encode(_less(base64.b64decode(found[1]))).decode(), page
    )


def _less(png: bytes) -> bytes:
    picture, out = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(COLOURS).save(out, format="png", optimize=True)
    return min(png, out.getvalue(), key=len)
