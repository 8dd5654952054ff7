"""Several low-rank adapters on one compressed model, switched in place or by text: the packed weights are held once."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from eora_lab.compensate.factors import StoredFactors
from eora_lab.errors import EoraLabError, naming
from eora_lab.files import digest
from eora_lab.formats.adapter_config import names_another
from eora_lab.formats.fused import Fused, fused_linears, whole
from eora_lab.formats.made_for import MadeFor, read_made_for
from eora_lab.formats.names import Factors, match_names
from eora_lab.formats.peft import in_half, read_adapter
from eora_lab.layer.linear import CompensatedLinear, compensated
from eora_lab.layer.row_paths import RowPaths
from eora_lab.model.digest import origin
from eora_lab.model.structure import model_name

OWN, OFF = "own", "off"  # the low-rank path that the model came with, and none at all


class Adapters:
    """The adapters of one compressed model, one of which is in use.

    model:   from `load_run` or `compress_model`.
    folders: name -> PEFT adapter folder. The path that the model came with is called "own".

    Raises EoraLabError when the model is not compressed, a folder cannot be read, belongs to other compressed weights
    or does not fit the model's layers, or a name is taken. Warns of an adapter that names another base model.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, Path | str] | None = None):
        self.model, self._layers = model, compensated_layers(model)
        self._factors: dict[str, dict[str, StoredFactors]] = {}
        if any(layer.rank for layer in self._layers.values()):
            self._factors[OWN] = {name: layer.factors for name, layer in self._layers.items()}
        self.active: str | None = next(iter(self._factors), None)
        for name, folder in (folders or {}).items():
            factors, config = read_adapter(folder, model)
            with naming(str(folder)):
                self._check_base(folder, config)
                self.add(name, factors)

    def _check_base(self, folder: Path | str, config: dict) -> None:
        """Raise EoraLabError when an adapter belongs to other compressed weights. One that does not say may warn."""
        here, made_for = model_name(self.model), read_made_for(folder)
        if made_for is None or not made_for.weights:
            if named := names_another(config, here):
                message = f"{folder} names {named} as its base model, and this is a compression of {here}"
                warnings.warn(message, stacklevel=4)
        elif made_for.weights != self._weights:
            raise EoraLabError(
                f"made for other compressed weights (of {config.get('base_model_name_or_path')}, W^ "
                f"{made_for.weights[:8]}) than these (of {here or 'a model in memory'}, W^ {self._weights[:8]}): "
                "use it with the run that it was made for"
            )

    @cached_property
    def _weights(self) -> str:
        return weights_digest(self.model)

    @cached_property
    def _fused(self) -> list[Fused]:
        return fused_linears(self.model)

    def add(self, name: str, factors: Factors) -> None:
        """One more adapter, such as `solve_adapter` returns. Raises EoraLabError when it or its name does not do."""
        if name in (OWN, OFF, *self._factors):
            raise EoraLabError(f"an adapter cannot be called {name!r}: choose another name")
        self._factors[name] = stored_factors(self._layers, whole(factors, self._fused))

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

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within this context, text i of a batch is computed with the adapter names[i], or with none (None).

        W^ is multiplied once for all texts. Raises EoraLabError for an unknown name, and within the context when a
        batch is of another size, or a layer is handed tokens of several texts in one row (experts).
        """
        for name in names:
            if name is not None:
                self._check(name)
        chosen = [name for name in dict.fromkeys(names) if name is not None]
        ids = [-1 if name is None else chosen.index(name) for name in names]
        before = self.active
        self.use(None)
        try:
            for module, layer in self._layers.items():
                paths = [self._factors[name][module].dense() for name in chosen]
                layer.set_row_paths(RowPaths.of(paths, ids, layer.lora_A))
            yield
        finally:
            for layer in self._layers.values():
                layer.set_row_paths(None)
            self.use(before)


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
    names = match_names(factors, layers)
    if strangers := factors.keys() - names.keys():
        raise EoraLabError(
            f"there is no compressed layer {min(strangers)} here: the adapter was made for another model, or changes a "
            "layer that stays as it is (embeddings, lm_head)"
        )
    given = {name: factors[module] for module, name in names.items()}
    stored = {}
    for name, layer in layers.items():
        A, B = given.get(name) or (torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0))
        if (A.shape[1], len(B)) != (layer.in_features, layer.out_features):
            here = f"{layer.out_features}x{layer.in_features}"
            raise EoraLabError(f"made for another model: {name} is {here} here, {len(B)}x{A.shape[1]} in the adapter")
        if layer.lora_A.dtype == torch.float16:
            A, B = in_half(A, B, name)
        stored[name] = StoredFactors(A, B)
    return stored


def made_for(model: nn.Module, work: object, base: str | None = None) -> MadeFor:
    """What an adapter for a compressed model belongs to.

    work: JSON value that says how the adapter is made.
    base: digest of the model that was compressed; by default of the files that it was loaded from.
    """
    return MadeFor(weights_digest(model), origin(model).files if base is None else base, digest(work))


def weights_digest(model: nn.Module) -> str:
    """A hash of W^ of all compressed layers."""
    return stored_digest((name, layer.stored_weight()) for name, layer in compensated_layers(model).items())


def stored_digest(layers: Iterable[tuple[str, Mapping[str, Tensor]]]) -> str:
    """The same from module names and what files hold of their W^."""
    found = {}
    for name, tensors in layers:
        one = hashlib.sha256()
        for key in sorted(tensors):
            tensor = tensors[key].detach().cpu().contiguous()
            one.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            one.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        found[name] = one.hexdigest()
    return digest(found)
