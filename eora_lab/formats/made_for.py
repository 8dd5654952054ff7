"""Which compressed weights an adapter belongs to: a low-rank path that mends one W^ harms another.

It stands in the metadata of adapter_model.safetensors, where no other loader looks and no copy loses it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from eora_lab.errors import EoraLabError, one_line
from eora_lab.formats.adapter_config import CONFIG

WEIGHTS = "adapter_model.safetensors"
KEY = "eora_lab"
CARD = "README.md"  # beside an adapter


@dataclass(frozen=True)
class MadeFor:
    """What an adapter that EoRA Lab wrote was made for, and how.

    weights: digest of W^ of all compressed layers.
    base:    digest of the model that was compressed; empty where it is not known.
    work:    digest of the settings: the same work on the same weights gives the same adapter.
    """

    weights: str
    base: str
    work: str

    def metadata(self) -> dict[str, str]:
        """For the safetensors file."""
        return {KEY: json.dumps(asdict(self))}


def read_made_for(folder: Path | str) -> MadeFor | None:
    """What an adapter folder says; None for adapters of other tools. Raises EoraLabError when it cannot be read."""
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(KEY)
        return None if said is None else MadeFor(**{key: str(value) for key, value in json.loads(said).items()})
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise EoraLabError(
            f"{folder}: {WEIGHTS} cannot be read ({one_line(error)}): copy or download it again"
        ) from error


def check_folder(folder: Path, made_for: MadeFor) -> None:
    """Raise EoraLabError unless an adapter may be written there: a new or empty folder, or that of the same adapter."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EoraLabError(f"{folder} is a file: choose another output folder")
    found = {path.name for path in folder.iterdir()}
    if not found or (found <= {CONFIG, WEIGHTS, CARD} and WEIGHTS in found and read_made_for(folder) == made_for):
        return
    what = "another adapter" if CONFIG in found else "a model or a run" if "config.json" in found else "other files"
    raise EoraLabError(f"{folder} holds {what}: choose another output folder")
