"""The result store: a folder with one JSON file a cell, named by a hash of the cell's configuration.

<hash>.json     configuration, identity, result or error, environment (versions, commit, machine) and cost of one cell
aside/          files that could not be trusted, moved there with a warning
running/        what cells are doing now (`eora_lab.experiment.running`)
cache/          what cells share (`eora_lab.experiment.cache`); may be deleted at any time

A cell is written once, in one step, so a killed sweep leaves whole cells and no others.
"""

import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eora_lab.environment import environment
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import DENSE, LATER
from eora_lab.files import check_place, check_table, digest, set_aside, write_atomically, write_json
from eora_lab.run.intervals import Outcomes

if TYPE_CHECKING:
    import pandas

OLDER, FORMAT = "eora-lab cell 1", "eora-lab cell 2"
CELL = f"{'[0-9a-f]' * 24}.json"  # the name of a cell's file
FOREIGN = ("config.json", "adapter_config.json", "finetune.json", "*.safetensors", "*.gguf")  # no store has these
MARGIN = " margin"  # ends the name of a task's margins among scores
SUFFIXES = (".parquet", ".csv", ".md", ".tex")


class ResultStore:
    """Finished cells, by configuration.

    A configuration is a flat dict of JSON values, the settings that a result depends on by name; an identity says what
    models, texts and code these names stood for (`eora_lab.experiment.identity`).
    Raises EoraLabError when the folder cannot be made, or is that of a model, an adapter or a run.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        check_place(self.folder)
        if other := next((path.name for name in FOREIGN for path in self.folder.glob(name)), None):
            raise EoraLabError(f"{folder} is no result store (it holds {other}): choose another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EoraLabError(f"cannot use {folder} as a result store: {error.strerror}") from error
        self._older = 0  # cells that were met

    def path(self, config: dict) -> Path:
        """The file of a cell, there or not."""
        return self.folder / f"{digest(config)[:24]}.json"

    def get(self, config: dict) -> dict | None:
        """A finished cell, or None. A file that cannot be trusted is set aside first."""
        path = self.path(config)
        return self._read(path) if path.exists() else None

    def put(
        self, config: dict, identity: dict, *, result: dict | None = None, error: str = "", cost: dict | None = None
    ) -> None:
        """Keep what a cell gave: a result, or the error that stopped it. A result in its place is set aside."""
        content: dict[str, Any] = {"config": config, "identity": identity, "status": "failed" if error else "done"}
        content |= {"result": result, "error": error}
        cell = {"format": FORMAT, **content, "environment": environment(), "cost": cost or {}}
        path, before = self.path(config), self.get(config)
        if path.exists() and (before is None or before["status"] == "done"):
            set_aside(path, self.folder / "aside")
        write_json(path, cell | {"sha256": digest(content)})

    def cells(self) -> Iterator[dict]:
        """Every cell that can be trusted, by file name."""
        self._older = 0
        for path in sorted(self.folder.glob(CELL)):
            if cell := self._read(path):
                yield cell
        if self._older:
            warnings.warn(
                f"{self.folder} holds {self._older} cells of an older version, which are left as they are and not "
                "read: measure them again, or use the version that wrote them",
                stacklevel=2,
            )

    def frame(self) -> "pandas.DataFrame":
        """One row a cell: configuration, status, measures (nested names joined by a dot), error, cost."""
        import pandas

        return pandas.DataFrame([row(cell) for cell in self.cells()])

    def export(self, path: Path | str) -> None:
        """Write the frame as .parquet, .csv, .md or .tex. Raises EoraLabError as `check_export`."""
        check_export(path)
        path, frame = Path(path), self.frame()
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
            if str(cell["format"]).startswith(OLDER):
                self._older += 1
                return None
            content = {key: cell[key] for key in ("config", "identity", "status", "result", "error")}
            trusted = cell["format"] == FORMAT and cell["sha256"] == digest(content)
            trusted &= isinstance(cell["cost"], dict) and isinstance(cell["environment"], dict)
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


def check_export(path: Path | str) -> None:
    """Raise EoraLabError for a name that a store's table cannot have, or that another file has."""
    check_place(Path(path), SUFFIXES)
    check_table(Path(path), ("model", "dtype", "status", "error"))


def row(cell: dict) -> dict:
    """A cell as one flat row. Lists in the result (layers, questions, outcomes) stay in the JSON file.

    Losses of windows give `loss_stderr.<text>`, the standard error of the mean loss (nats a token).
    """
    config = cell["config"] if cell["config"].get("compressor") == DENSE else LATER | cell["config"]
    flat = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in config.items()}
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


def scores(cell: dict) -> dict[str, Outcomes]:
    """What a cell measured item by item, for paired intervals: log loss of a text's windows, of a task the score of
    each question and, of multiple choice, its margin (nats; cells of before have none)."""
    result = cell["result"] or {}
    tokens = dict(result.get("window_tokens", []))
    found = {f"log perplexity {text}": Outcomes(tokens.get(text), of) for text, of in result.get("window_losses", [])}
    for task, kept in result.get("tasks", {}).items():
        of = [kept.get("num_fewshot"), kept.get("questions")]
        found[f"{task} {kept['metric']}"] = Outcomes(of, kept["outcomes"])
        if kept.get("margins"):
            found[f"{task}{MARGIN}"] = Outcomes(of, kept["margins"])
    return found
