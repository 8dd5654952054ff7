"""The board as one HTML file, which works with its own script alone, and asks nobody for anything."""

import base64
import hashlib
import json
from functools import cache, partial
from pathlib import Path

from eora_lab.errors import EoraLabError
from eora_lab.files import write_atomically

VIEW = Path(__file__).parent / "view"
PARTS = ("dom", "scale", "chart", "cells", "parts", "table", "board")  # of the script, one after another
NAME = "board.html"  # in a store
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'"  # texts can start nothing
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="eora-lab board">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>:root {{color-scheme: light dark}} body {{margin: 0 auto; max-width: 90rem; background: light-dark(#fff, #111)}}
{style}</style>
</head>
<body>
<noscript>The board is drawn by its script, which is switched off.</noscript>
<main id="board"></main>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""
START = """
const host = document.getElementById("board"), LIVE = location.protocol.startsWith("http");
const kept = () => { try { return JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { return {}; } };
const keep = choice => history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(choice))}`);
const shown = await mount(host, JSON.parse(document.getElementById("data").textContent), kept(), keep);
let tag = null;
const look = async () => {
  try {
    const answer = await fetch("board.json", tag ? { headers: { "If-None-Match": tag } } : {});
    if (answer.status === 200) { tag = answer.headers.get("ETag"); shown.update(await answer.json()); }
  } catch { /* the server was stopped: what is shown stays */ }
  setTimeout(look, 2000);
};
if (LIVE) look();
"""


def page(data: dict) -> str:
    """A page that shows the values of `board`. Raises EoraLabError when its table library is not installed."""
    script = module() + START
    policy = f"{POLICY}; script-src blob: {_hash(script)}"
    title = data["title"].replace("&", "&amp;").replace("<", "&lt;")
    return PAGE.format(policy=policy, title=f"{title}: EoRA Lab", style=style(), data=in_script(data), script=script)


def write_page(path: Path, data: dict) -> None:
    """Write `page`. Raises EoraLabError when it cannot, or when the file is no such page."""
    if path.exists() and 'content="eora-lab board"' not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise EoraLabError(f"{path} holds something else, which would be lost: choose another name, or delete it")
    write_atomically(path, partial(Path.write_text, data=page(data), encoding="utf-8"))


def in_script(data: object) -> str:
    """JSON that may stand in a script element, whatever its texts are."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


@cache
def module() -> str:
    """The script of the board, with its table library (DataTables, MIT, from itables) as a module of its own in it."""
    try:
        import itables.options
    except ImportError as error:
        raise EoraLabError("a board needs itables, which is not installed: pip install itables") from error
    bundle = Path(itables.options.dt_bundle).read_text(encoding="utf-8")
    table = (
        f"const BUNDLE = {in_script(bundle)};\n"
        'const table_module = () => import(URL.createObjectURL(new Blob([BUNDLE], {type: "text/javascript"})));\n'
    )
    return table + "".join((VIEW / f"{name}.js").read_text(encoding="utf-8") for name in PARTS)


@cache
def style() -> str:
    """The board's own style."""
    return (VIEW / "board.css").read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a Content-Security-Policy knows an inline script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
