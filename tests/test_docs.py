"""Docstrings say what they must, no link of a text leads nowhere, and numbers are those recorded."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args, get_origin
from urllib.parse import unquote

import pytest
from torch import Tensor

import eora_lab
from docs.numbers import check, command, unclaimed, written
from docs.records import PRINTED
from eora_lab.cli import main

ROOT = Path(__file__).parent.parent
MODULES = ["eora_lab", *(m.name for m in pkgutil.walk_packages(eora_lab.__path__, "eora_lab.") if ".cli" not in m.name)]
BY_NAME = (dict, Mapping, Callable)  # tensors in these have no one shape
SHAPE = re.compile(r"\([\w.* ]+,[\w.*, ]*\)")  # (out, in), (..., in), (tokens,)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")  # of Markdown and HTML
NAMED = re.compile(r"`((?:eora_lab|kernels|tests|notebooks|figures|data)/[\w./-]*)`")  # places of the repository


def public(owner: object, module: str) -> Iterator[tuple[str, object]]:
    """Public functions, classes, methods and properties that a module or class defines itself."""
    for name, member in vars(owner).items():
        member = getattr(member, "__func__", member)  # of a classmethod or staticmethod
        if name.startswith("_") or getattr(member, "__module__", module) != module:
            continue
        if inspect.isclass(member) or inspect.isfunction(member) or isinstance(member, property):
            yield f"{owner.__name__}.{name}", member
        if inspect.isclass(member):
            yield from public(member, module)


def bare(annotation: object) -> bool:
    """Whether an annotation has a tensor without a shape."""
    if annotation is Tensor:
        return True
    return get_origin(annotation) not in BY_NAME and any(map(bare, get_args(annotation)))


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented_with_its_shapes(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for path, member in public(module, name):
        doc = inspect.getdoc(member)
        assert doc, f"{path} has no docstring"
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function):
            shapeless = [key for key, annotation in inspect.get_annotations(function).items() if bare(annotation)]
            assert not shapeless or SHAPE.search(doc), f"{path} does not say the shape of: {', '.join(shapeless)}"


def test_the_check_finds_what_it_is_for():
    def shapeless(x: Tensor) -> list[Tensor]: ...

    assert all(map(bare, inspect.get_annotations(shapeless).values()))
    assert not bare(eora_lab.solve.__annotations__["residual"])


def pages() -> Iterator[tuple[Path, str]]:
    """What people read in the repository."""
    for folder in (".", "kernels", "docs", "docs/guides", "data/**"):
        yield from ((path, path.read_text(encoding="utf-8")) for path in ROOT.glob(f"{folder}/*.md"))
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path, "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("path, text", list(pages()), ids=lambda value: value.name if isinstance(value, Path) else "")
def test_links_to_files_lead_somewhere(path, text):
    links = [unquote(a or b).partition("#")[0] for a, b in LINK.findall(text)]
    for link in links:
        assert not link or "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"
    for place in NAMED.findall(text):
        later = place.startswith("kernels/results") or "NAME" in place  # made by the bench on a GPU, or by the reader
        assert later or (ROOT / place).exists(), f"{path.name}: {place}"


def test_the_numbers_of_the_texts_are_those_recorded():
    texts = written()
    assert [str(result) for result in check(texts) if result.wrong] == []
    assert unclaimed(texts) == []


@pytest.mark.parametrize(
    ("said", "changed", "wrong"),
    [
        ("17.85", "17.58", "demo gives 17.85"),  # a frame
        ("-0.676 [-0.720", "-0.676 [-0.702", "T2 gives 93.02 41.0 3.5 -0.676 -0.720"),  # an interval of recorded cells
        ("27.67 | 43.03 | 49.0 ± 2.2", "27.67 | 43.03 | 49.0 ± 2.0", "task-mix gives"),
        ("and T10 27.", "and T10 26.", "T10 gives 27"),
        ("| 47.03 |  | 6.47 |", "| 47.03 |  | 6.57 |", "arithmetic gives 47.03 6.47"),
        ("15.98 s | 22 |", "15.98 s | 23 |", "arithmetic gives 0.74 15.98 22"),
        ("| Wanda 2:4 |", "| Wanda |", "no text says: | Wanda 2:4 |"),
    ],
)
def test_a_changed_number_is_found(said, changed, wrong):
    texts = written()
    assert said in texts
    found = [str(result) for result in check(texts.replace(said, changed)) if result.wrong]
    assert found and any(wrong in line for line in found)


def test_a_number_without_a_command_is_found():
    texts = written()
    (found,) = unclaimed(texts + "\nThe best reaches 36.66 in the end.")
    assert found.endswith("reaches 36.66")


def test_what_a_command_printed_is_a_record(tmp_path):
    texts = written()
    printed = "35.1 s, peak memory 1.65 GB\nperplexity on wikitext2:test: dense 36.02, compressed 37.72"
    (tmp_path / "gptq-8.txt").write_text(printed)
    (result,) = (one for one in check(texts, tmp_path) if one.claim.record == "gptq-8")
    assert result.wrong and "gptq-8 gives 37.72 1.047" in str(result)


@pytest.mark.parametrize("name", PRINTED)
def test_the_texts_have_the_command_of_every_record(name, capsys):
    arguments = command(written(), name)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0 and arguments[0] in ("compare", "compress", "bench")
