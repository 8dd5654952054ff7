"""The run folder: what a compression pass leaves behind, and what it resumes from.

config.json                  settings, versions, seed: what the run is
ranks.json                   rank of every layer, where a budget was spread over them
blocks/000.safetensors ...   packed compressed weights of one decoder block, with its part of the report and a checksum
distilled.safetensors        low-rank paths in place of those in blocks/, where a step of distillation followed the pass
hidden/                      until the run is finished: the hidden states that it resumes from, if they are on disk
adapter/                     the low-rank path as a PEFT adapter, each layer at its own rank, with a card
report.json                  written last: a folder with a report is complete
.lock                        held by the process that works here
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eora_lab.environment import seconds_by_step, step, versions
from eora_lab.errors import EoraLabError, as_setting
from eora_lab.files import LOCK, PARTIAL, DamagedError, locked, read_json, set_aside, write_json
from eora_lab.formats import peft
from eora_lab.layer.backends import AUTO
from eora_lab.layer.head import quicken_head
from eora_lab.layer.linear import CompensatedLinear, compensated, use_backend
from eora_lab.model.digest import TENSORS, files_digest, tensors_digest, tokenizer_digest
from eora_lab.model.load import as_dtype, load_model, local_path
from eora_lab.model.structure import decoder_blocks
from eora_lab.run.adapters import made_for
from eora_lab.run.blocks import AGAIN, install_block, load_block, write_block
from eora_lab.run.card import write_peft_card
from eora_lab.run.distilled import DISTILLED, install_distilled, load_distilled, write_distilled
from eora_lab.run.recipe import Selection
from eora_lab.run.report import LayerReport, Report

CONFIG = "config.json"
LATER = ("tokenizer",)  # settings that older runs do not have
SINCE = {field.name: field.default for field in fields(Selection)} | {
    "grid": "integer",
    "labels": "model",
    "distil": False,
    "shared_factors": False,
    "preserve": False,
}  # nor these; they did the same
NAMED = 4  # settings that differ
BLOCKS, HIDDEN = "blocks/*.safetensors", "hidden"


@contextmanager
def open_folder(path: Path | str, settings: dict, keeps_hidden: bool = False) -> Iterator["RunFolder"]:
    """The `RunFolder` of a run that nobody else works on meanwhile. Raises EoraLabError as that, and while one does."""
    is_free(Path(path))  # before a lock is put in a stranger's folder
    with locked(Path(path)):
        yield RunFolder(path, settings, keeps_hidden)


class RunFolder:
    """A folder that belongs to one run. Opening it again with the same settings resumes the run.

    The files of finished blocks and of distilled paths are read: one that is damaged is set aside, with a warning, and
    is not there.
    hidden: where the hidden states of its calibration texts are kept until it is finished; None: nowhere.
    Raises EoraLabError when the folder holds a run with other settings, or something else.
    """

    @step("files")
    def __init__(self, path: Path | str, settings: dict, keeps_hidden: bool = False):
        self.path = Path(path)
        self.hidden = self.path / HIDDEN if keeps_hidden else None
        self.settings = claim_folder(self.path, settings)
        for left in (left for pattern in PARTIAL for left in self.path.rglob(pattern)):
            left.unlink(missing_ok=True)
        made: list[tuple[Path, Callable]] = [(block, load_block) for block in sorted(self.path.glob(BLOCKS))]
        for file, load in [*made, *([(self.path / DISTILLED, load_distilled)] if self.is_distilled else [])]:
            try:
                load(file)
            except DamagedError as error:
                set_aside(file, self.path / "aside")
                warnings.warn(f"{error}: it was moved to {self.path / 'aside'}, and is made again", stacklevel=2)

    @property
    def has_plan(self) -> bool:
        """Whether ranks were planned before."""
        return (self.path / "ranks.json").exists()

    def planned(self, plan: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Module name -> rank: as planned before it was interrupted, or by `plan` now."""
        path = self.path / "ranks.json"
        if not self.has_plan:
            write_json(path, plan())
        try:
            return as_setting(dict[str, int], read_json(path), "ranks")
        except EoraLabError as error:
            raise EoraLabError(f"{path} cannot be used: {error}; delete it to have the ranks planned again") from error

    def _block(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:03d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether block `index` was finished before."""
        return self._block(index).exists()

    @step("files")
    def save_block(self, index: int, modules: dict[str, CompensatedLinear], layers: list[LayerReport]) -> None:
        """Store a finished block."""
        write_block(self._block(index), modules, layers)

    def drop_hidden(self) -> None:
        """Hidden states are not needed any more."""
        shutil.rmtree(self.path / HIDDEN, ignore_errors=True)

    @step("files")
    def load_block(self, index: int, model: nn.Module) -> list[LayerReport]:
        """Put a finished block's modules into the model and return its part of the report."""
        return install_block(model, self._block(index))

    def load_blocks(self, model: nn.Module) -> None:
        """Put all blocks' modules into the model; all are finished."""
        for index in range(len(decoder_blocks(model))):
            self.load_block(index, model)

    @property
    def is_distilled(self) -> bool:
        """Whether a step of distillation is done."""
        return (self.path / DISTILLED).exists()

    def distilled(self, model: nn.Module, distil: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Put the paths in place that a step of distillation gave before, or gives now. Returns what came of it."""
        layers = compensated(model)
        if not self.is_distilled:
            found = distil()
            with step("files"):
                write_distilled(self.path / DISTILLED, layers, found)
        with step("files"):
            return install_distilled(self.path / DISTILLED, layers)

    @step("files")
    def finish(self, report: Report, model: nn.Module) -> None:
        """Write the adapter, ragged where ranks differ, and the report. No adapter where every rank is 0."""
        layers = compensated(model)
        if any(module.rank for module in layers.values()):
            factors = {name: module.factors.matrices() for name, module in layers.items()}
            belongs = made_for(model, "run", str(self.settings.get("weights", "")))
            name = str(self.settings["model"])
            peft.write_adapter(self.path / "adapter", factors, name, made_for=belongs, model=model)
            write_peft_card(self.path / "adapter", self.settings, report, belongs, model)
        report.steps = seconds_by_step()
        write_report(self.path, report)


def claim_folder(path: Path | str, settings: dict, file: str = CONFIG) -> dict:
    """Make a folder that of a run with these settings, or find that it is. Returns the settings as they read back.

    file: where they are kept, with the versions. Raises EoraLabError when the folder holds something else.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))
    if is_free(path, file):
        write_json(path / file, {"settings": settings, "versions": versions()})
    found = {key: value for key, value in SINCE.items() if key in settings} | read_config(path, file)["settings"]
    keys = sorted((found.keys() | settings.keys()) - {key for key in LATER if key not in found})
    other = [
        f"{key} was {found.get(key)!r}, now {settings.get(key)!r}"
        for key in keys
        if found.get(key) != settings.get(key)
    ]
    if other:
        more = f"; and {len(other) - NAMED} more" if len(other) > NAMED else ""
        what = "; ".join(other[:NAMED]) + more
        raise EoraLabError(f"{path} holds another run ({what}): choose another output folder or delete this one")
    return settings


def is_free(path: Path, file: str = CONFIG) -> bool:
    """Whether a folder is empty or not there. Raises EoraLabError when it holds anything but a run."""
    try:
        if not path.exists() or all(entry.name == LOCK or any(map(entry.match, PARTIAL)) for entry in path.iterdir()):
            return True
    except OSError as error:
        raise EoraLabError(f"cannot use {path}: {error.strerror}; choose another output folder") from error
    if not is_run(path, file):
        raise EoraLabError(f"{path} is not empty and holds no run: choose another output folder")
    return False


def read_config(path: Path | str, file: str = CONFIG) -> dict:
    """config.json of a run folder. Raises EoraLabError when there is none."""
    try:
        config = read_json(Path(path) / file)
        return {key: as_setting(dict, config[key], key) for key in ("settings", "versions")}
    except (EoraLabError, KeyError) as error:
        raise EoraLabError(f"{path}: not a run folder (no readable {file} of a run)") from error


def run_settings(path: Path | str) -> dict:
    """The settings of a run. Raises EoraLabError when the folder is no run, or does not say of which model."""
    settings = read_config(path)["settings"]
    for key in ("model", "dtype", "weights"):
        if not isinstance(settings.get(key), str):
            raise EoraLabError(f"{Path(path) / CONFIG} does not name the {key} of the run: it is damaged or too old")
    return settings


def is_run(path: Path | str, file: str = CONFIG) -> bool:
    """Whether a folder is a run's, finished or not."""
    try:
        return bool(read_config(path, file))
    except EoraLabError:
        return False


def load_run(
    path: Path | str,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    backend: str = AUTO,
    model: Path | str | None = None,
) -> tuple[nn.Module, Any, Report]:
    """(model, tokenizer, report) of a finished run: its base model with the compressed layers and factors in place.

    backend: who multiplies, see `CompensatedLinear`.
    model:   the base model, where it is no longer in its place.
    Raises EoraLabError when the folder is no run, is not finished, or is damaged, and when the base model is no longer
    the one that it was made from.
    """
    path = Path(path)
    report = read_report(path)
    base, tokenizer = _load_base(path, dtype, device, model)
    installed = set()
    for block in sorted(path.glob(BLOCKS)):
        installed |= {layer.name for layer in install_block(base, block)}
    for layer in report.layers:
        if layer.name not in installed:
            raise EoraLabError(f"{path}: the file in blocks/ that holds {layer.name} is missing")
    if report.distilled:
        install_distilled(path / DISTILLED, compensated(base))
    use_backend(base, backend)
    quicken_head(base)
    return base, tokenizer, report


def load_original(path: Path | str, device: str = "cpu", model: Path | str | None = None) -> nn.Module:
    """The uncompressed model that a run was made from, in the run's dtype.

    Raises EoraLabError when the folder is no run, or when the model cannot be loaded or is not the same any more.
    """
    return _load_base(Path(path), run_settings(path)["dtype"], device, model)[0]


def _load_base(path: Path, dtype: torch.dtype | str, device: str, model: Path | str | None) -> tuple[nn.Module, Any]:
    """The base model of a run, and its tokenizer. Raises EoraLabError unless the run was made from it."""
    settings = run_settings(path)
    name, wanted = str(model or settings["model"]), settings["weights"]
    hint = "bring that one back, or say where it is (--base, in Python model=)"
    try:
        place = local_path(name)
    except EoraLabError as error:
        raise EoraLabError(f"the base model of {path} cannot be loaded: {error}; {hint}") from error
    by_tensors = wanted.startswith(TENSORS)  # made from a model that was changed after it was loaded
    if not by_tensors and files_digest(place) != wanted:
        raise EoraLabError(f"{name} is no longer the model that {path} was made from: {hint}")
    if settings.get("tokenizer") and tokenizer_digest(place) != settings["tokenizer"]:  # older runs do not say
        raise EoraLabError(f"the tokenizer of {name} is no longer the one that {path} was made with: {hint}")
    base, tokenizer = load_model(name, settings["dtype"] if by_tensors else dtype, device)
    if by_tensors and TENSORS + tensors_digest(base) != wanted:
        raise EoraLabError(
            f"{path} was made from a model in memory, which {name} is not: save that model, and load it from there "
            f"({hint})"
        )
    if base.dtype != as_dtype(dtype):  # read again, for .to() would round what models keep in float32 as well
        base, tokenizer = load_model(name, dtype, device)
    return base, tokenizer


def read_report(path: Path | str) -> Report:
    """report.json of a run folder. Raises EoraLabError when the folder is no run, is not finished, or is damaged."""
    run_settings(path)
    if not (file := Path(path) / "report.json").exists():
        raise EoraLabError(f"{path}: this run is not finished; start it again with the same settings to resume it")
    try:
        return Report.from_data(read_json(file))
    except EoraLabError as error:
        raise EoraLabError(f"{file} cannot be used: {error}; {AGAIN}") from error


def load_model_or_run(
    name: str,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    backend: str = AUTO,
    base: Path | str | None = None,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of whatever a user names: a run folder, or anything `load_model` takes.

    backend, base: of a run folder, see `load_run`. Raises EoraLabError where they are given for anything else.
    """
    if is_run(Path(name)):
        return load_run(name, dtype, device, backend, base)[:2]
    if base is not None:
        raise EoraLabError(f"{name} is no run folder: it has no base model to look for elsewhere")
    model, tokenizer = load_model(name, dtype, device)
    use_backend(model, backend)
    return model, tokenizer


def write_report(path: Path | str, report: Report) -> None:
    """Write report.json of a run folder; again when perplexities were added to it."""
    write_json(Path(path) / "report.json", json.loads(report.to_json()))
