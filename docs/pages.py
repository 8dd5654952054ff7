"""The pages of the site, laid out as the repository is, so that its links hold: texts, figures, run notebooks."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import nbformat

from docs import checklist
from docs.notebooks import NOTEBOOKS, RECORDED, ROOT, SOLUTIONS, Record, digest, record_of

TEXTS = ("CONTRIBUTING.md", "docs/families.md", "kernels/README.md")
PICTURES = ("figures/*.svg", "kernels/*.svg")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+\.svg)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def lay_out(folder: Path, recorded: Path = RECORDED) -> None:
    """Write all that Sphinx reads below a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "site", folder)
    doors = {path.relative_to(folder): path for path in folder.rglob("*.md")}
    guides = sorted((ROOT / "docs" / "guides").glob("*.md"))
    pictures = [path for pattern in PICTURES for path in ROOT.glob(pattern)]
    notebooks = {path.relative_to(ROOT): path for path in (*NOTEBOOKS, *SOLUTIONS)}
    texts = doors | {path.relative_to(ROOT): path for path in (*(ROOT / name for name in TEXTS), *guides)}
    there = {Path("paper.md"), *notebooks, *texts, *(path.relative_to(ROOT) for path in pictures)}
    (folder / "paper.md").write_text(checklist.page(), encoding="utf-8")
    for path in pictures:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    for place, path in texts.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(linked(path.read_text(encoding="utf-8"), place, there), encoding="utf-8")
    for place, path in notebooks.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page(path, record_of(path, recorded), there), folder / place)


def linked(text: str, place: Path, there: set[Path]) -> str:
    """A text for the site: pictures say their numbers, and links to files that it does not have are names of places."""

    def settle(found: re.Match) -> str:
        target = Path(*_resolved(place.parent / found[2]))
        return found[0] if target in there else f"{found[1]} (`{target}`)"

    def said(found: re.Match) -> str:
        picture = ROOT / Path(*_resolved(place.parent / found[2]))
        words = ElementTree.parse(picture).find("{*}desc")
        alt = found[1] if words is None else re.sub(r"([][])", r"\\\1", words.text)
        return f"![{alt}]({found[2]})"

    return PICTURE.sub(said, LINK.sub(settle, text))


def _resolved(path: Path) -> list[str]:
    """Parts of a relative path without `..`."""
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return parts


def page(path: Path, record: Record | None, there: set[Path]) -> nbformat.NotebookNode:
    """A notebook with its recorded outputs, and a line that says when and from what they were made."""
    notebook = nbformat.read(path, as_version=4)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, path.relative_to(ROOT), there)
        else:
            number += 1
            cell.execution_count = number
            cell.outputs = [nbformat.from_dict(one) for one in record.outputs.get(cell.id, [])] if record else []
    kind, words = about(path, record, digest(notebook))
    note = nbformat.v4.new_markdown_cell(f":::{{{kind}}}\n{words}\n:::", id="recorded-note")
    notebook.cells.insert(1, note)
    return notebook


def about(path: Path, record: Record | None, now: str) -> tuple[str, str]:
    """(kind of a note, what it says) of a notebook's outputs."""
    if path in SOLUTIONS:
        return "note", "Open this notebook with `make lab` to see what its cells say."
    command = f'`make record ARGS="{path.stem[:2]}"`'
    if record is None:
        return "warning", f"The outputs of this notebook are not recorded yet: {command} runs it and keeps them."
    made = f"{record.seconds / 60:.1f} minutes, torch {record.versions.get('torch', '?')}"
    if record.digest != now:
        return (
            "warning",
            f"These outputs were made by **older code** than what stands here: {command} makes them again.",
        )
    return "note", f"Outputs as recorded by {command} ({made}). Open the notebook with `make lab` to change it."
