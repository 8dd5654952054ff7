"""The run folder: what a compression pass leaves behind, and what it resumes from.

config.json                  settings, versions, seed: what the run is
blocks/000.safetensors ...   packed compressed weights of one decoder block, with its part of the report
adapter/                     the low-rank path as a PEFT adapter (while running: a part a block)
report.json                  written last: a folder with a report is complete
"""

import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from eora_lab.errors import EoraLabError
from eora_lab.files import write_json, write_safetensors
from eora_lab.formats import peft
from eora_lab.linear import CompensatedLinear
from eora_lab.models import load_model
from eora_lab.report import LayerReport, Report, layer_report

PACKAGES = ("eora-lab", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


class RunFolder:
    """A folder that belongs to one run. Opening it again with the same settings resumes the run.

    Raises EoraLabError when the folder holds a run with other settings, or something else.
    """

    def __init__(self, path: Path | str, settings: dict):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))  # as it will read back
        if not self.path.exists() or not any(self.path.iterdir()):
            write_json(self.path / "config.json", {"settings": self.settings, "versions": versions()})
        elif not is_run(self.path):
            raise EoraLabError(f"{self.path} is not empty and holds no run: choose another output folder")
        found = read_config(self.path)["settings"]
        for key in sorted(found.keys() | self.settings.keys()):
            if found.get(key) != self.settings.get(key):
                raise EoraLabError(
                    f"{self.path} holds another run ({key} was {found.get(key)!r}, now {self.settings.get(key)!r}): "
                    "choose another output folder or delete this one"
                )

    def _block(self, index: int) -> Path:
        return self.path / "blocks" / f"{index:03d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether block `index` was finished before."""
        return self._block(index).exists()

    def save_block(self, index: int, modules: dict[str, CompensatedLinear], layers: list[LayerReport]) -> None:
        """Store a finished block."""
        tensors = {f"{name}.{key}": t for name, m in modules.items() for key, t in m.stored().items()}
        write_safetensors(self._block(index), tensors, {"layers": json.dumps([asdict(layer) for layer in layers])})

    def load_block(self, index: int, model: nn.Module) -> list[LayerReport]:
        """Put a finished block's modules into the model and return its part of the report."""
        return install_block(model, self._block(index))

    def finish(self, report: Report, model: nn.Module) -> None:
        """Write the adapter and the report."""
        factors = {n: m.factors.dense() for n, m in model.named_modules() if isinstance(m, CompensatedLinear)}
        peft.write_adapter(self.path / "adapter", factors, str(self.settings["model"]))
        write_report(self.path, report)


def read_config(path: Path) -> dict:
    """config.json of a run folder. Raises EoraLabError when there is none."""
    try:
        config = json.loads((path / "config.json").read_text())
        return {"settings": config["settings"], "versions": config["versions"]}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise EoraLabError(f"{path}: not a run folder (no readable config.json of a run)") from error


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    try:
        return bool(read_config(path))
    except EoraLabError:
        return False


def install_block(model: nn.Module, path: Path) -> list[LayerReport]:
    """Replace the linears of one block by what a file holds. Returns the block's part of the report."""
    try:
        with safe_open(path, framework="pt") as file:
            layers = [layer_report(data) for data in json.loads(file.metadata()["layers"])]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for layer in layers:
            prefix = layer.name + "."
            stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            old = model.get_submodule(layer.name)
            model.set_submodule(layer.name, CompensatedLinear.from_stored(stored, old))
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise EoraLabError(f"{path}: incomplete, corrupt, or of another model ({error})") from error
    return layers


def load_run(path: Path | str, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> tuple:
    """(model, tokenizer, report) of a finished run: its base model with the compressed layers and factors in place.

    Raises EoraLabError when the folder is no run, is not finished, or is damaged.
    """
    path = Path(path)
    settings = read_config(path)["settings"]
    if not (path / "report.json").exists():
        raise EoraLabError(f"{path}: this run is not finished; start it again with the same settings to resume it")
    report = Report.from_json((path / "report.json").read_text())
    model, tokenizer = load_model(settings["model"], dtype=dtype, device=device)
    installed = set()
    for block in sorted((path / "blocks").glob("*.safetensors")):
        installed |= {layer.name for layer in install_block(model, block)}
    for layer in report.layers:
        if layer.name not in installed:
            raise EoraLabError(f"{path}: the file in blocks/ that holds {layer.name} is missing")
    return model, tokenizer, report


def load_model_or_run(name: str, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> tuple:
    """(model, tokenizer) of whatever a user names: a run folder, or anything `load_model` takes."""
    if is_run(Path(name)):
        return load_run(name, dtype, device)[:2]
    return load_model(name, dtype, device)


def write_report(path: Path, report: Report) -> None:
    """Write report.json of a run folder; again when perplexities were added to it."""
    write_json(Path(path) / "report.json", json.loads(report.to_json()))
