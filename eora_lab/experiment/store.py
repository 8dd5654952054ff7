"""The result store: a folder with one JSON file a cell, named by a hash of the cell's configuration.

<hash>.json     configuration, result or error, environment (versions, commit, machine) and cost of one cell
aside/          files that could not be trusted, moved there with a warning
cache/          what cells share (`eora_lab.experiment.cache`); may be deleted at any time

A cell is written once, in one step, so a killed sweep leaves whole cells and no others.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eora_lab.errors import EoraLabError
from eora_lab.files import write_atomically, write_json
from eora_lab.environment import versions

if TYPE_CHECKING:
    import pandas

FORMAT = "eora-lab cell 1"
SUFFIXES = (".parquet", ".csv", ".md", ".tex")


def digest(data: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ResultStore:
    """Finished cells, by configuration.

    A configuration is a flat dict of JSON values that says all a result depends on. Raises EoraLabError when the folder
    cannot be made.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EoraLabError(f"cannot use {folder} as a result store: {error.strerror}") from error

    def path(self, config: dict) -> Path:
        """The file of a cell, there or not."""
        return self.folder / f"{digest(config)[:24]}.json"

    def get(self, config: dict) -> dict | None:
        """A finished cell, or None. A file that cannot be trusted is set aside first."""
        path = self.path(config)
        return self._read(path) if path.exists() else None

    def put(self, config: dict, *, result: dict | None = None, error: str = "", cost: dict | None = None) -> None:
        """Keep what a cell gave: a result, or the error that stopped it."""
        content = {"config": config, "status": "failed" if error else "done", "result": result, "error": error}
        cell = {"format": FORMAT, **content, "environment": environment(), "cost": cost or {}}
        write_json(self.path(config), cell | {"sha256": digest(content)})

    def cells(self) -> Iterator[dict]:
        """Every cell that can be trusted, by file name."""
        for path in sorted(self.folder.glob("*.json")):
            if cell := self._read(path):
                yield cell

    def frame(self) -> "pandas.DataFrame":
        """One row a cell: configuration, status, measures (nested names joined by a dot), error, cost."""
        import pandas

        return pandas.DataFrame([row(cell) for cell in self.cells()])

    def export(self, path: Path | str) -> None:
        """Write the frame as .parquet, .csv, .md or .tex. Raises EoraLabError for any other name."""
        path, frame = Path(path), self.frame()
        if path.suffix not in SUFFIXES:
            raise EoraLabError(f"cannot export to {path.name}: the name must end in {', '.join(SUFFIXES)}")
        writers = {
            ".parquet": lambda to: frame.to_parquet(to, index=False),
            ".csv": lambda to: frame.to_csv(to, index=False),
            ".md": lambda to: to.write_text(frame.to_markdown(index=False) + "\n", encoding="utf-8"),
            ".tex": lambda to: to.write_text(frame.to_latex(index=False, escape=True), encoding="utf-8"),
        }
        write_atomically(path, writers[path.suffix])

    def _read(self, path: Path) -> dict | None:
        """A cell whose format, name and checksum agree; anything else is set aside."""
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            content = {key: cell[key] for key in ("config", "status", "result", "error")}
            trusted = cell["format"] == FORMAT and cell["sha256"] == digest(content)
            reason = "" if trusted else "its content was changed, or it is no cell"
            if trusted and path != self.path(cell["config"]):
                reason = "its name does not belong to its configuration"
        except FileNotFoundError:
            return None  # set aside by another process meanwhile
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            return cell
        set_aside(path, self.folder / "aside", reason)
        return None


def set_aside(path: Path, folder: Path, reason: str) -> None:
    """Move a file that cannot be trusted out of the way, under a name that is free, and warn."""
    folder.mkdir(parents=True, exist_ok=True)
    target, count = folder / path.name, 1
    while target.exists():
        target, count = folder / f"{path.name}.{count}", count + 1
    try:
        os.replace(path, target)
    except FileNotFoundError:
        return
    warnings.warn(f"{path} cannot be used ({reason}); it was moved to {target}", stacklevel=3)


def row(cell: dict) -> dict:
    """A cell as one flat row. Lists in the result (layers, questions, outcomes) stay in the JSON file.

    Losses of windows give `loss_stderr.<text>`, the standard error of the mean loss (nats a token).
    """
    flat = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in cell["config"].items()}
    flat["status"] = cell["status"]

    def flatten(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else key, inner)
        elif not isinstance(value, list):
            flat[prefix] = value

    result = cell["result"] or {}
    flatten("", result)
    for text, losses in result.get("window_losses", []):
        if len(losses) > 1:
            flat[f"loss_stderr.{text}"] = statistics.stdev(losses) / len(losses) ** 0.5
    flatten("cost", cell["cost"])
    return flat | {"error": cell["error"]}


def scores(cell: dict) -> dict[str, list[float]]:
    """What a cell measured item by item, for paired intervals: log loss of a text's windows, scores of questions."""
    result = cell["result"] or {}
    found = {f"log perplexity {text}": losses for text, losses in result.get("window_losses", [])}
    return found | {f"{task} {kept['metric']}": kept["outcomes"] for task, kept in result.get("tasks", {}).items()}


def environment() -> dict:
    """What the numbers were made with: versions, the commit of this package's repository, and the kind of machine."""
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    machine["threads"] = torch.get_num_threads()
    machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"versions": versions(), "commit": commit(), "machine": machine}


@lru_cache(maxsize=1)
def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit that this package is at, with "+" where tracked files differ from it; empty outside a repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
