"""Names of linears that peft changes while it loads an adapter: it takes all for those of a published checkpoint.

transformers calls some modules otherwise than the checkpoint of a model as it was published, and keeps a table of
renamings for each model type. peft (0.21) puts every key of an adapter through it, so that adapters made for the
published names still load. Most names that a model has now come through unchanged, and are written. Of the others the
published name is written, which the table turns into the model's: for Laguna `...mlp.shared_expert.up_proj` and not
`...mlp.shared_experts.up_proj`, for DeepSeek-OCR-2 `model.layers...` and not `model.language_model.layers...`. Loaders
that go by the published names, such as vLLM, know it too. `adapter_config.json` has the model's names all the same:
peft looks for those as they stand.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.formats.names import KEY
from eora_lab.formats.peft_experts import WRAPPED
from eora_lab.model.experts import mixtures

PREFIX, END = "base_model.model.", ".lora_A.weight"  # of a key; all keys of a name are changed alike


def as_loaded(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Name in an adapter -> module of the model that peft gives its factors to; those that it drops are left out."""
    known, table = _known(model), _renamings(model)
    found = {}
    for name in sorted(names):
        renamed = _renamed(name + END, table)
        own = name if f"{PREFIX}{name}{END}".endswith(renamed) else renamed.removesuffix(END)  # else peft undoes it
        if own.replace(WRAPPED, "") in known:
            found[name] = own
    return found


def as_written(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """The inverse: module of the model -> name in an adapter. Its own where none leads to it; others stay too.

    Raises EoraLabError where peft would give its factors to another module.
    """
    written = {name: name for name in names}
    if todo := lost(written, model):
        back = [one.reverse_transform() for one in reversed(_renamings(model, to_save=True))]
        published = {name: _renamed(name + END, back).removesuffix(END) for name in todo}
        loaded = as_loaded([*published.values(), *todo], model)
        for name, other in published.items():
            if loaded.get(other) == name:
                written[name] = other
            elif name in loaded:
                raise EoraLabError(f"no adapter can hold {name}: peft gives its factors to {loaded[name]}")
    return written


def lost(names: Iterable[str], model: nn.Module) -> list[str]:
    """Of the model's own names those by which peft does not give the module its factors."""
    names = list(names)
    loaded, known = as_loaded(names, model), _known(model)
    return [name for name in names if loaded.get(name) != name and name.replace(WRAPPED, "") in known]


def by_own_names(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of an adapter by keys with the model's names. What peft would drop keeps its key."""
    matches = {key: match for key in tensors if (match := KEY.fullmatch(key))}
    loaded = as_loaded({match[1] for match in matches.values()}, model)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if (match := matches.get(key)) and (own := loaded.get(match[1])):
            key = key[: match.start(1)] + own + key[match.end(1) :]
        if key in found:
            raise EoraLabError(f"the adapter holds {key} twice, by two names: delete one")
        found[key] = tensor
    return found


def _renamings(model: nn.Module, to_save: bool = False) -> list[Any]:
    """The table of a model, in order; none where peft asks for none. to_save: as it is reversed to save the model."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    if not isinstance(model, PreTrainedModel) or get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return []
    table = get_model_conversion_mapping(model, add_legacy=not to_save)
    return [one for one in table if isinstance(one, WeightRenaming) and not (to_save and isinstance(one, PrefixChange))]


def _renamed(key: str, table: list[Any]) -> str:
    for one in table:
        key, _ = one.rename_source_key(key)
    return key


def _known(model: nn.Module) -> set[str]:
    """Modules that the model has as transformers loads it: no linears of experts."""
    experts = tuple(f"{name}." for name in mixtures(model))
    return {name for name, _ in model.named_modules() if not name.startswith(experts)}
