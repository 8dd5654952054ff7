"""Several low-rank adapters on one compressed model, switched in place: the packed weights are held once."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.errors import EoraLabError
from eora_lab.formats.peft import Factors, read_adapter
from eora_lab.layer.linear import CompensatedLinear, compensated

OWN, OFF = "own", "off"  # the low-rank path that the model came with, and none at all


class Adapters:
    """The adapters of one compressed model, one of which is in use.

    model:   from `load_run` or `compress_model`.
    folders: name -> PEFT adapter folder. The path that the model came with is called "own".

    Raises EoraLabError when the model is not compressed, a folder cannot be read or does not fit the model's layers,
    or a name is taken.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, Path | str] | None = None):
        self.model, self._layers = model, compensated_layers(model)
        self._factors: dict[str, dict[str, StoredFactors]] = {}
        if any(layer.rank for layer in self._layers.values()):
            self._factors[OWN] = {name: layer.factors for name, layer in self._layers.items()}
        self.active: str | None = next(iter(self._factors), None)
        for name, folder in (folders or {}).items():
            factors = read_adapter(folder)[0]
            try:
                self.add(name, factors)
            except EoraLabError as error:
                raise EoraLabError(f"{folder}: {error}") from error

    def add(self, name: str, factors: Factors) -> None:
        """One more adapter, such as `solve_adapter` returns. Raises EoraLabError when it or its name does not do."""
        if name in (OWN, OFF, *self._factors):
            raise EoraLabError(f"an adapter cannot be called {name!r}: choose another name")
        self._factors[name] = stored_factors(self._layers, factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that `use` takes."""
        return tuple(self._factors)

    @property
    def nbytes(self) -> int:
        """Bytes of the path in use, as stored."""
        return sum(layer.factors.nbytes for layer in self._layers.values())

    def factors(self, name: str = OWN) -> Factors:
        """Module name -> (A, B) of an adapter, of rank 0 where a layer has no path. Raises EoraLabError as `use`."""
        self._check(name)
        return {module: stored.dense() for module, stored in self._factors[name].items()}

    def _check(self, name: str) -> None:
        if name not in self._factors:
            raise EoraLabError(f"no adapter {name!r}; there are {', '.join((*self._factors, OFF))}")

    def use(self, name: str | None) -> None:
        """Switch to an adapter, or to the bare compressed weights (None). Raises EoraLabError for an unknown name."""
        if name is not None:
            self._check(name)
        chosen = self._factors[name] if name else stored_factors(self._layers, {})
        for module, layer in self._layers.items():
            layer.set_factors(chosen[module])
        self.active = name


def use_only(model: nn.Module, folder: Path | str) -> None:
    """Put one adapter in place of the model's own; "off": none. Raises EoraLabError as `Adapters` does."""
    adapters = Adapters(model, {} if folder == OFF else {"given": folder})
    adapters.use(None if folder == OFF else "given")


def compensated_layers(model: nn.Module) -> dict[str, CompensatedLinear]:
    """Module name -> compensated layer. Raises EoraLabError when the model has none."""
    layers = compensated(model)
    if not layers:
        raise EoraLabError("adapters need a compressed model: give a run folder (eora-lab compress makes one)")
    return layers


def stored_factors(layers: Mapping[str, CompensatedLinear], factors: Factors) -> dict[str, StoredFactors]:
    """A path for every layer, of rank 0 where `factors` has none. Raises EoraLabError where a pair does not fit."""
    if strangers := factors.keys() - layers.keys():
        raise EoraLabError(f"made for another model: there is no compressed layer {min(strangers)} here")
    stored = {}
    for name, layer in layers.items():
        A, B = factors.get(name) or (torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0))
        if (A.shape[1], len(B)) != (layer.in_features, layer.out_features):
            here = f"{layer.out_features}x{layer.in_features}"
            raise EoraLabError(f"made for another model: {name} is {here} here, {len(B)}x{A.shape[1]} in the adapter")
        stored[name] = StoredFactors(A, B)
    return stored
