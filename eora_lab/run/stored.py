"""What a finished run holds, without its model: its low-rank path, its sizes, and which adapters are its own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from eora_lab.compensate.factors import FACTORS, StoredFactors
from eora_lab.errors import EoraLabError
from eora_lab.files import digest, file_digest
from eora_lab.formats.fused import Shapes
from eora_lab.formats.made_for import MadeFor, check_folder
from eora_lab.formats.names import Factors
from eora_lab.model.digest import TENSORS, files_digest
from eora_lab.model.load import load_skeleton, local_path
from eora_lab.model.structure import block_linears
from eora_lab.run.adapters import stored_digest
from eora_lab.run.blocks import read_block
from eora_lab.run.distilled import DISTILLED, distilled_factors
from eora_lab.run.folder import is_run, read_config, read_report

OWN = ("adapter", "blocks")  # folders of a run
EXPERT = re.compile(r"\.\d+\..*\.\d+\.")  # a linear in a list within a block


def run_factors(path: Path | str) -> Factors:
    """The low-rank path of a finished run, a pair for every compressed layer: of rank 0 where there is none.

    Raises EoraLabError when the folder is no run, is not finished, is damaged, or has no low-rank path at all.
    """
    report = read_report(path)
    if not any(layer.rank for layer in report.layers):
        raise EoraLabError(f"{path} has no low-rank path: it was made with --method none or rank 0")
    if report.distilled:
        found = distilled_factors(Path(path) / DISTILLED, [layer.name for layer in report.layers])[1]
        return {name: factors.dense() for name, factors in found.items()}
    try:
        return {name: StoredFactors.from_state_dict(tensors).dense() for name, tensors in _layers(path, factors=True)}
    except KeyError as error:
        raise EoraLabError(f"{path}: a file in blocks/ is damaged, it lacks {error} of a low-rank path") from error


def run_made_for(path: Path | str, work: object) -> MadeFor:
    """What an adapter for the compressed weights of a finished run belongs to; see `made_for`. Raises as above."""
    base = read_config(path)["settings"]["weights"]
    return MadeFor(stored_digest(_layers(path, factors=False)), base, digest(work))


def mended_file(path: Path | str) -> Path:
    """The file that a run mended. Raises EoraLabError when the run mended none, or when it is no longer what it was."""
    settings = read_config(path)["settings"]
    file = Path(settings.get("checkpoint", ""))
    if not file.suffix:
        raise EoraLabError(f"{path} did not mend a file: name one of the same model (--like)")
    if not file.is_file() or file_digest(file) != settings["checkpoint_sha256"]:
        raise EoraLabError(f"{file}, which {path} mended, is no longer what it was: say where it is (--like)")
    return file


def check_output(folder: Path, made_for: MadeFor) -> None:
    """Raise EoraLabError unless an adapter may be written there: see `check_folder`, and no folder of a run's own."""
    place = folder.resolve()
    if is_run(place) or (is_run(place.parent) and place.name in OWN):
        raise EoraLabError(f"{folder} belongs to a run: choose another output folder")
    check_folder(folder, made_for)


def shapes_of(name: str) -> Shapes:
    """Module name -> (out_features, in_features) of a run's compressed layers, or of the linears in a model's blocks.

    name: run folder, or a model, which may be a GPTQ checkpoint. Raises EoraLabError when it is neither.
    """
    if is_run(Path(name)):
        return {layer.name: (layer.out_features, layer.in_features) for layer in read_report(name).layers}
    linears = block_linears(load_skeleton(name, quantised=True))
    return {module: (linear.out_features, linear.in_features) for module, linear in linears.items()}


def modules_of(name: str | Path) -> nn.Module | None:
    """The modules of a run's base model, or of a model, for what its linears are called in adapters.

    None where it is no longer there, or is a GGUF file, and without experts nothing is lost. Raises EoraLabError where
    there are any.
    """
    base = read_config(name)["settings"]["model"] if is_run(Path(name)) else str(name)
    if any(EXPERT.search(module) for module in shapes_of(str(name))):
        return load_skeleton(base, quantised=True)
    try:
        return None if local_path(base, fetch=False, weights=False).is_file() else load_skeleton(base, quantised=True)
    except EoraLabError:
        return None


def belongs_elsewhere(made_for: MadeFor, name: str) -> str | None:
    """Why an adapter does not belong to a run, or to no compression of a model; None: it does, or nothing is known."""
    if is_run(Path(name)) and made_for.weights:
        here = run_made_for(name, None).weights
        other = (
            f"was made for other compressed weights (W^ {made_for.weights[:8]}) than those of {name} (W^ {here[:8]})"
        )
        return None if here == made_for.weights else other
    if not made_for.base or made_for.base.startswith(TENSORS):
        return None
    try:
        place = local_path(name, fetch=False)
    except EoraLabError:
        return None  # not on this machine
    if place.is_dir() and (is_quantised(place) or not any(place.glob("*.safetensors"))):
        return None
    if files_digest(place) == made_for.base:
        return None
    return f"was made for a compression of another model than {name}: the weights differ"


def is_quantised(folder: Path) -> bool:
    """Whether a model's folder holds a quantised one, such as a GPTQ checkpoint."""
    return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"))


def _layers(path: Path | str, factors: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Module name and stored tensors of every compressed layer, of its low-rank path or of W^."""
    files = sorted((Path(path) / "blocks").glob("*.safetensors"))
    left = {layer.name for layer in read_report(path).layers}
    for block in files:
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_block(block)[1].items():
            name = next((name for name in left if key.startswith(f"{name}.")), None)
            if name is None:
                raise EoraLabError(f"{block}: of another run, the report knows no {key}")
            local = key.removeprefix(f"{name}.")
            if local.startswith(FACTORS) == factors:
                found.setdefault(name, {})[local] = tensor
        left -= found.keys()
        yield from found.items()
    if left:
        raise EoraLabError(f"{path}: the file in blocks/ that holds {min(left)} is missing")
