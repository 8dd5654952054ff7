"""The run folder: what a compression pass leaves behind, and what it resumes from.

config.json                  settings, versions, seed: what the run is
blocks/000.safetensors ...   packed compressed weights of one decoder block, with its part of the report
adapter/                     the low-rank path as a PEFT adapter, each layer at its own rank
report.json                  written last: a folder with a report is complete
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from eora_lab.environment import versions
from eora_lab.errors import EoraLabError
from eora_lab.files import write_json, write_safetensors
from eora_lab.formats import peft
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.load import load_model
from eora_lab.model.structure import fingerprint
from eora_lab.run.report import LayerReport, Report, layer_report

CONFIG = "config.json"
PACKAGES = ("eora-lab", "torch", "transformers", "safetensors", "numpy")


class RunFolder:
    """A folder that belongs to one run. Opening it again with the same settings resumes the run.

    Raises EoraLabError when the folder holds a run with other settings, or something else.
    """

    def __init__(self, path: Path | str, settings: dict):
        self.path = Path(path)
        self.settings = claim_folder(self.path, settings)

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
        """Write the adapter, ragged where ranks differ, and the report. No adapter where every rank is 0."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, CompensatedLinear)}
        if any(module.rank for module in layers.values()):
            factors = {name: module.factors.dense() for name, module in layers.items()}
            peft.write_adapter(self.path / "adapter", factors, str(self.settings["model"]))
        write_report(self.path, report)


def claim_folder(path: Path, settings: dict, file: str = CONFIG) -> dict:
    """Make a folder that of a run with these settings, or find that it is. Returns the settings as they read back.

    file: where they are kept, with the versions. Raises EoraLabError when the folder holds something else.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists() or not any(path.iterdir()):
        write_json(path / file, {"settings": settings, "versions": versions()})
    elif not is_run(path, file):
        raise EoraLabError(f"{path} is not empty and holds no run: choose another output folder")
    found = read_config(path, file)["settings"]
    for key in sorted(found.keys() | settings.keys()):
        if found.get(key) != settings.get(key):
            raise EoraLabError(
                f"{path} holds another run ({key} was {found.get(key)!r}, now {settings.get(key)!r}): "
                "choose another output folder or delete this one"
            )
    return settings


def read_config(path: Path, file: str = CONFIG) -> dict:
    """config.json of a run folder. Raises EoraLabError when there is none."""
    try:
        config = json.loads((path / file).read_text())
        return {"settings": config["settings"], "versions": config["versions"]}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise EoraLabError(f"{path}: not a run folder (no readable {file} of a run)") from error


def is_run(path: Path, file: str = CONFIG) -> bool:
    """Whether a folder is a run's, finished or not."""
    try:
        return bool(read_config(path, file))
    except EoraLabError:
        return False


def install_block(model: nn.Module, path: Path, backend: str = "auto") -> list[LayerReport]:
    """Replace the linears of one block by what a file holds. Returns the block's part of the report."""
    try:
        with safe_open(path, framework="pt") as file:
            layers = [layer_report(data) for data in json.loads(file.metadata()["layers"])]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for layer in layers:
            prefix = layer.name + "."
            stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            old = model.get_submodule(layer.name)
            model.set_submodule(layer.name, CompensatedLinear.from_stored(stored, old, backend))
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise EoraLabError(f"{path}: incomplete, corrupt, or of another model ({error})") from error
    return layers


def load_run(
    path: Path | str, dtype: torch.dtype | str = torch.float32, device: str = "cpu", backend: str = "auto"
) -> tuple:
    """(model, tokenizer, report) of a finished run: its base model with the compressed layers and factors in place.

    backend: "auto", "torch" or "triton", see `CompensatedLinear`.
    Raises EoraLabError when the folder is no run, is not finished, or is damaged.
    """
    path = Path(path)
    report = read_report(path)
    settings = read_config(path)["settings"]
    model, tokenizer = load_model(settings["model"], dtype=dtype, device=device)
    installed = set()
    for block in sorted((path / "blocks").glob("*.safetensors")):
        installed |= {layer.name for layer in install_block(model, block, backend)}
    for layer in report.layers:
        if layer.name not in installed:
            raise EoraLabError(f"{path}: the file in blocks/ that holds {layer.name} is missing")
    return model, tokenizer, report


def run_factors(path: Path) -> peft.Factors:
    """The low-rank path of a finished run, a pair for every compressed layer: of rank 0 where there is none.

    Raises EoraLabError when the folder is no run, is not finished, is damaged, or has no low-rank path at all.
    """
    report = read_report(path)
    if not any(layer.rank for layer in report.layers):
        raise EoraLabError(f"{path} has no low-rank path: it was made with --method none or rank 0")
    factors, _ = peft.read_adapter(path / "adapter")
    empty = {
        layer.name: (torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0)) for layer in report.layers
    }
    return empty | factors


def read_report(path: Path) -> Report:
    """report.json of a run folder. Raises EoraLabError when the folder is no run, or is not finished."""
    read_config(path)
    if not (path / "report.json").exists():
        raise EoraLabError(f"{path}: this run is not finished; start it again with the same settings to resume it")
    return Report.from_json((path / "report.json").read_text())


def load_original(path: Path | str, device: str = "cpu") -> nn.Module:
    """The uncompressed model that a run was made from, in the run's dtype.

    Raises EoraLabError when the folder is no run, or when the model cannot be loaded or is not the same any more.
    """
    settings = read_config(Path(path))["settings"]
    model, _ = load_model(settings["model"], settings["dtype"], device)
    if fingerprint(model) != settings["weights"]:
        raise EoraLabError(f"{settings['model']} is no longer the model that {path} was made from: bring that one back")
    return model


def load_model_or_run(name: str, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> tuple:
    """(model, tokenizer) of whatever a user names: a run folder, or anything `load_model` takes."""
    if is_run(Path(name)):
        return load_run(name, dtype, device)[:2]
    return load_model(name, dtype, device)


def write_report(path: Path, report: Report) -> None:
    """Write report.json of a run folder; again when perplexities were added to it."""
    write_json(Path(path) / "report.json", json.loads(report.to_json()))
