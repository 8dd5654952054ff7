"""What cells share, kept by content: input statistics, compressed weights, low-rank answers.

An entry's key is made of all that it depends on, so it never has to be invalidated. It is a safetensors file with its
SHA-256 beside it; one that does not agree is set aside and made again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import filelock
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from eora_lab.calibrate.moments import Moments
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.outputs import collect_output_statistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate import LowRank
from eora_lab.compress import Compressed, tagged_state_dict, weight_from_state_dict
from eora_lab.errors import EoraLabError, one_line
from eora_lab.experiment.code import plugin_digest
from eora_lab.files import (
    digest,
    file_digest,
    read_json,
    read_tensors,
    set_aside,
    write_atomically,
    write_json,
    write_safetensors,
)
from eora_lab.run.fit import Steps
from eora_lab.run.groups import Group
from eora_lab.run.recipe import Recipe

T = TypeVar("T")

M = TypeVar("M", bound=Moments)

KEPT = 2  # statistics in memory: of the compressor's text and of the solver's


class ContentCache:
    """A folder of entries. Safe to use from several processes, and to kill at any time."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        # those of the last cell stay in memory
        self._statistics: dict[str, dict[str, InputStatistics]] = {}
        self._outputs: dict[str, dict[str, OutputStatistics]] = {}

    def entry(self, name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T]) -> T:
        """The entry of that name: read if it is there and whole, else made and written. One process makes it."""
        path = self.folder / f"{name}.safetensors"
        with self.lock(name):
            if path.exists():
                try:
                    if path.with_suffix(".sha256").read_text() == file_digest(path):
                        return load(path)
                    reason = "its checksum does not agree"
                except (OSError, ValueError, KeyError, TypeError, EoraLabError, SafetensorError) as error:
                    reason = one_line(error)
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
        self,
        model: nn.Module,
        batches: Int[Tensor, "nsamples seqlen"],
        held_out: float,
        key: str,
        progress: bool = False,
    ) -> dict[str, InputStatistics]:
        """`collect_statistics`, measured once for all cells with the same key. Shared inputs share one object."""
        if key not in self._statistics:
            while len(self._statistics) >= KEPT:
                self._statistics.pop(next(iter(self._statistics)))
            measure = partial(collect_statistics, model, batches, held_out, progress)
            self._statistics[key] = self._measured(f"statistics/{key}", measure, InputStatistics, model)
        return self._statistics[key]

    def outputs(
        self,
        model: nn.Module,
        batches: Int[Tensor, "nsamples seqlen"],
        held_out: float,
        labels: str,
        key: str,
        progress: bool = False,
    ) -> dict[str, OutputStatistics]:
        """`collect_output_statistics`, measured once for all cells with the same key."""
        if key not in self._outputs:
            self._outputs.clear()
            measure = partial(collect_output_statistics, model, batches, held_out, labels, progress=progress)
            self._outputs[key] = self._measured(f"outputs/{key}", measure, OutputStatistics, model)
        return self._outputs[key]

    def _measured(
        self, folder: str, measure: Callable[[], dict[str, M]], kind: type[M], model: nn.Module
    ) -> dict[str, M]:
        """Statistics of the layers of a model from a folder of the cache, where what is missing is measured."""
        found: dict[str, M] = {}

        def measured() -> dict[str, M]:
            if not found:
                found.update(measure())
            return found

        with self.lock(folder):
            names = read_index(self.folder / folder / "index.json")  # module name -> the first that shares its object
            if not names:
                first: dict[int, str] = {}
                names = {name: first.setdefault(id(statistics), name) for name, statistics in measured().items()}
                write_json(self.folder / folder / "index.json", {"names": names, "sha256": digest(names)})
            device = next(model.parameters()).device
            entries = {
                name: self.entry(
                    f"{folder}/{name}",
                    partial(lambda one: measured()[one], name),
                    lambda statistics, path: statistics.save(path),
                    lambda path: kind.load(path).to(device),
                )
                for name in dict.fromkeys(names.values())
            }
        return {name: entries[shared] for name, shared in names.items()}


def read_index(path: Path) -> dict[str, str]:
    """Which layers share whose statistics; empty when there is no such file or it is damaged."""
    try:
        found = read_json(path)
        return found["names"] if found["sha256"] == digest(found["names"]) else {}
    except (EoraLabError, KeyError):
        return {}


class SharedSteps(Steps):
    """Steps whose compressed weights and low-rank answers come from the cache, where other cells may have left them.

    key:     of the statistics that answers rest on, with gradients where there are any.
    base:    statistics that weights are compressed with, and base_key: their key. They may be of another text.
    highest: answers are solved at this rank and cut to the rank asked for: a rank sweep is one solve.
    data_free: after a pass, the layers that were compressed without data.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: ContentCache,
        key: str,
        base: Mapping[str, InputStatistics],
        base_key: str,
        highest: int,
        outputs: Mapping[str, OutputStatistics] | None = None,
    ):
        super().__init__(recipe, outputs=outputs)
        self._cache, self._base, self._highest = cache, base, highest
        compressor = [plugin_digest(registry, recipe.compressor) for registry in ("QUANTISERS", "PRUNERS")]
        self._base_key = digest([base_key, recipe.base_settings(), compressor])[:24]
        solver = plugin_digest("SOLVERS", recipe.method)
        self._solve_key = f"{self._base_key}-{key}-{recipe.method}{f'-{solver[:12]}' if solver else ''}"
        self.data_free: set[str] = set()

    def compress(self, name: str, weight: Float[Tensor, "out in"], statistics: InputStatistics) -> Compressed:
        usable = self._base[name].or_identity(self.recipe.held_out > 0)
        if usable is not self._base[name]:
            self.data_free.add(name)
        return self._cache.entry(
            f"weights/{self._base_key}/{name}",
            lambda: super(SharedSteps, self).compress(name, weight, usable),
            lambda compressed, path: write_safetensors(path, tagged_state_dict(compressed), {}),
            lambda path: weight_from_state_dict(read_tensors(path, weight.device)),
        )

    def compensate(
        self, group: Group, error: Float[Tensor, "out in"], statistics: InputStatistics, rank: int
    ) -> tuple[LowRank, float]:
        recipe = self.recipe
        if not rank or recipe.method == "none" or recipe.shrink:  # shrinkage depends on the rank
            return super().compensate(group, error, statistics, rank)
        highest = max(rank, min(self._highest, *error.shape))
        answer = self._cache.entry(
            f"solves/{self._solve_key}-{highest}/{group.key}",
            lambda: super(SharedSteps, self).compensate(group, error, statistics, highest)[0],
            lambda made, path: write_safetensors(path, {"A": made.A, "B": made.B, "spectrum": made.spectrum}, {}),
            lambda path: LowRank(**read_tensors(path, error.device)),
        )
        return answer.truncate(rank), 0.0
