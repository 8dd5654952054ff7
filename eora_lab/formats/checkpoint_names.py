"""What a checkpoint folder calls the tensors of a model: as they were published, or as modules are named here."""

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from eora_lab.formats.fused import fused_linears
from eora_lab.formats.names import plain
from eora_lab.model.experts import Experts, Leaf, mixtures
from eora_lab.model.structure import block_linears

Part = tuple[str, slice]  # name of a linear in the files, and the rows of the model's linear that it has


class PublishedNames:
    """Names in the files for all of a model.

    held:    what the files hold: keys, and names of quantised linears.
    linears: of the decoder blocks -> what they are in the files. Experts are there one by one, with gate and up apart,
             unless the files know them by the names that they have here.
    tensors: name in the files -> the model's tensor, made when it is asked for. Fused experts, if the files hold them
             fused, else the experts' own.
    tied:    name in the files -> those of other names under which the model has the same tensor.
    """

    def __init__(self, model: nn.Module, held: Collection[str]):
        self._held, self._spelt = held, {plain(name): name for name in held}
        self._ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        experts = mixtures(model)
        inside = tuple(f"{name}.{index}." for name, one in experts.items() for index in range(one.count))
        own = {key: tensor for key, tensor in _stored(model) if not key.startswith(inside)}
        published = _published(model, own)
        names = {key: self._find(published.get(key, key), key) for key in own}
        self.tensors: dict[str, Callable[[], Tensor]] = {names[key]: partial(_same, one) for key, one in own.items()}
        by_place: dict[int, list[str]] = {}
        for key, tensor in own.items():
            by_place.setdefault(tensor.data_ptr(), []).append(names[key])
        self.tied = {name: several for several in by_place.values() for name in several}
        self.linears: dict[str, list[Part]] = {}
        for module in block_linears(model):
            if not f"{module}.".startswith(inside):
                key = published.get(f"{module}.weight", module).removesuffix(".weight")
                self.linears[module] = [(self._find(key, module), slice(None))]
        for each in fused_linears(model):
            mixture = experts[each.module]
            leaf = next(leaf for leaf in mixture.leaves if leaf.name == each.leaf)
            together = {local: self._find(f"{each.module}.{local}") for local in (leaf.weight, leaf.bias) if local}
            for local, name in together.items():
                if name in held:
                    self.tensors[name] = partial(_fused, mixture, leaf, local)
            for index, (module, parts) in enumerate(zip(each.names(), each.parts, strict=True)):
                whole, linear = self._find(module), mixture.linears(index)[each.leaf]
                apart = [(self._find(name), rows) for name, rows in parts]
                self.linears[module] = [(whole, slice(None))] if whole in held else apart
                for local, name in zip(("weight", "bias"), together.values(), strict=False):
                    for part, rows in apart if name not in held and whole not in held else ():
                        self.tensors[f"{part}.{local}"] = partial(_rows, linear, local, rows)

    def ignored(self, key: str) -> bool:
        """Whether transformers leaves that tensor of the files out, such as those of layers that predict further."""
        return any(re.search(pattern, key) for pattern in self._ignored)

    def _find(self, *names: str) -> str:
        """The first of these that the files hold, or hold but for `language_model`; else the first."""
        found = [name for name in names if name in self._held]
        found += [self._spelt[plain(name)] for name in names if plain(name) in self._spelt]
        return (found or list(names))[0]


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict` holds, without fusing experts."""
    yield from ((key, one.detach()) for key, one in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        for local, buffer in module.named_buffers(recurse=False):
            if local not in module._non_persistent_buffers_set:
                yield f"{name}.{local}".lstrip("."), buffer


def _published(model: nn.Module, own: dict[str, Tensor]) -> dict[str, str]:
    """Name here -> name in the checkpoint that transformers would write, for tensors that it only renames."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return {}
    given = {key: one.detach() for key, one in own.items()}  # tied ones too are objects of their own
    try:
        written = revert_weight_conversion(model, dict(given))
    except Exception:  # code of any model
        return {}
    key_of = {id(one): key for key, one in given.items()}
    return {key_of[id(one)]: name for name, one in written.items() if id(one) in key_of}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _fused(mixture: Experts, leaf: Leaf, local: str) -> Tensor:
    if local == leaf.weight:
        return mixture.state_dict()[local]
    return torch.stack(
        [mixture.linears(index)[leaf.name].get_parameter("bias").detach() for index in range(mixture.count)]
    )


def _rows(linear: nn.Module, local: str, rows: slice) -> Tensor:
    return linear.get_parameter(local).detach()[rows]
