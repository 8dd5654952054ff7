"""What cells share, kept by content: input statistics, compressed weights, low-rank answers.

An entry's key is made of all that it depends on, so it never has to be invalidated. It is a safetensors file with its
SHA-256 beside it; one that does not agree is set aside and made again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import filelock
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate import LowRank
from eora_lab.compress import Compressed, weight_from_state_dict
from eora_lab.errors import EoraLabError
from eora_lab.files import digest, file_digest, read_tensors, set_aside, write_atomically, write_json, write_safetensors
from eora_lab.run.recipe import Recipe

T = TypeVar("T")

KEPT = 2  # statistics in memory: of the compressor's text and of the solver's


class ContentCache:
    """A folder of entries. Safe to use from several processes, and to kill at any time."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._statistics: dict[str, dict[str, InputStatistics]] = {}  # those of the last cell stay in memory

    def entry(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """The entry of that name: read if it is there and whole, else made and written. One process makes it."""
        path = self.folder / f"{name}.safetensors"
        with self.lock(name):
            if path.exists():
                try:
                    if path.with_suffix(".sha256").read_text() == file_digest(path):
                        return load(path)
                    reason = "its checksum does not agree"
                except (OSError, KeyError, EoraLabError, SafetensorError) as error:
                    reason = str(error)
                set_aside(path, self.folder / "aside", reason)
            made = make()
            save(made, path)
            sha256 = file_digest(path)
            write_atomically(path.with_suffix(".sha256"), lambda partial: partial.write_text(sha256))
            return made

    def lock(self, name: str) -> filelock.FileLock:
        """Held by the process that makes an entry; others wait for it."""
        path = self.folder / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(path)

    def statistics(
        self, model: nn.Module, batches: Int[Tensor, "nsamples seqlen"], held_out: float, key: str
    ) -> dict[str, InputStatistics]:
        """`collect_statistics`, measured once for all cells with the same key. Shared inputs share one object."""
        if key in self._statistics:
            return self._statistics[key]
        folder = f"statistics/{key}"
        found: dict[str, InputStatistics] = {}

        def measured() -> dict[str, InputStatistics]:
            if not found:
                found.update(collect_statistics(model, batches, held_out))
            return found

        with self.lock(folder):
            names = read_index(self.folder / folder / "index.json")  # module name -> the first that shares its input
            if not names:
                first: dict[int, str] = {}
                names = {name: first.setdefault(id(statistics), name) for name, statistics in measured().items()}
                write_json(self.folder / folder / "index.json", names)
            entries = {
                name: self.entry(
                    f"{folder}/{name}",
                    lambda name=name: measured()[name],
                    lambda statistics, path: statistics.save(path),
                    lambda path: load_statistics(path, next(model.parameters()).device),
                )
                for name in dict.fromkeys(names.values())
            }
        while len(self._statistics) >= KEPT:
            self._statistics.pop(next(iter(self._statistics)))
        self._statistics[key] = {name: entries[shared] for name, shared in names.items()}
        return self._statistics[key]


def read_index(path: Path) -> dict[str, str]:
    """A JSON object of texts; empty when there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if all(isinstance(value, str) for value in found.values()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def load_statistics(path: Path, device: torch.device) -> InputStatistics:
    """Statistics from a file, on the device of the model."""
    statistics = InputStatistics.load(path)
    for part in filter(None, (statistics, statistics.held_out)):
        part.second_moment, part.mean_abs = part.second_moment.to(device), part.mean_abs.to(device)
    return statistics


COMPENSATION = (
    "method",
    "rank",
    "factor_bits",
    "refit",
)  # what a recipe does after a weight is compressed


@dataclass(frozen=True)
class SharedRecipe(Recipe):
    """A recipe for one layer whose compressed weight and low-rank answer come from the cache.

    layer:     its module name.
    key:       of the statistics that the answer rests on, the same for all layers.
    base:      what the weight is compressed with, in place of those; base_key: of these.
    highest:   the answer is solved at this rank and cut to the rank asked for: a rank sweep is one solve.
    """

    cache: ContentCache | None = None
    layer: str = ""
    key: str = ""
    base: InputStatistics | None = None
    base_key: str = ""
    highest: int = 0

    def compress(self, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Compressed:
        return self.cache.entry(
            f"weights/{self._base()}/{self.layer}",
            lambda: super(SharedRecipe, self).compress(weight, self.base),
            lambda compressed, path: write_safetensors(path, compressed.state_dict(), {}),
            lambda path: weight_from_state_dict(read_tensors(path, weight.device)),
        )

    def compensate(
        self, residual: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        if not rank or self.method == "none" or self.shrink:  # shrinkage depends on the rank
            return super().compensate(residual, statistics, rank)
        highest = max(rank, min(self.highest, *residual.shape))
        answer = self.cache.entry(
            f"solves/{self._base()}-{self.key}-{self.method}-{highest}/{self.layer}",
            lambda: super(SharedRecipe, self).compensate(residual, statistics, highest)[0],
            lambda made, path: write_safetensors(path, {"A": made.A, "B": made.B, "spectrum": made.spectrum}, {}),
            lambda path: LowRank(**read_tensors(path, residual.device)),
        )
        return answer.truncate(rank), 0.0

    def _base(self) -> str:
        """A hash of all that the compressed weight depends on. Fields that are added to Recipe count, to be safe."""
        settings = {f.name: getattr(self, f.name) for f in fields(Recipe) if f.name not in COMPENSATION}
        return digest([self.base_key, settings])[:24]
