"""Which code is it? Digests of the package's own code and of plugins, so that changed code measures again."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from eora_lab.files import file_digest
from eora_lab.run.plugins import plugin_of

PACKAGE = Path(__file__).parents[1]
# the rooms and files that numbers depend on
NUMERIC = (
    *("model", "text", "calibrate", "compress", "compensate", "layer", "run", "measure"),
    *("experiment/cells.py", "experiment/cache.py"),
)


@cache
def code_digest() -> str:
    """A hash of the package's code that numbers rest on, whatever its comments, docstrings and layout."""
    found = hashlib.sha256()
    for place in NUMERIC:
        files = sorted((PACKAGE / place).rglob("*.py")) if (PACKAGE / place).is_dir() else [PACKAGE / place]
        for path in files:
            tree = without_texts(ast.parse(path.read_text(encoding="utf-8")))
            found.update(f"{path.relative_to(PACKAGE).as_posix()} {ast.dump(tree)}".encode())
    return found.hexdigest()


def without_texts(tree: ast.Module) -> ast.Module:
    """A syntax tree without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def plugin_digest(registry: str, name: str) -> str:
    """A hash of the plugin file that a name comes from; empty where it is the package's own."""
    file = plugin_of(registry, name)
    return file_digest(file) if file else ""
