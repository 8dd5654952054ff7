"""Small random models of any family of transformers, which have every kind of layer that the family has."""

import re
import zlib
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import nn

from docs.shrink_rules import (
    AT_MOST,
    EXCEPTIONS,
    FIRST,
    LAYERS,
    RULES,
    SPECIAL,
    TEXT,
    TOKEN,
    TOWER,
    TOWERS,
    VOCABULARY,
    WIDE_TOWER,
    Derived,
    Scale,
)

MOST_LAYERS = 6
MOST_WEIGHTS = 30_000_000  # above that a size was missed
OF_THE_CLASS = re.compile(  # fields that say nothing about the model, or that the class sets itself
    r"_.*|id2label|label2id|transformers_version|architectures|model_type|(torch_)?dtype|name_or_path|attribute_map"
    r"|sub_configs|num_labels|problem_type|output_(hidden_states|attentions)|return_dict|quantization_config"
    r"|ignore_keys_at_rope_validation|per_layer_config"
)
KINDS_OF_LAYER = 4  # a list with more values than that does not tell kinds apart


def default_config(name: str) -> Any:
    """The configuration that a model type has by default."""
    return transformers.CONFIG_MAPPING[name](**FIRST.get(name, {}))


def small_model(config: transformers.PreTrainedConfig, auto: Any, seed: int = 0) -> Any:
    """A model of that configuration's class with random weights, in float32 and evaluation mode, without gradients.

    Raises what transformers raises where the configuration cannot be made small, and ValueError where it stays large.
    """
    first: Exception | None = None
    for derive in (False, True):  # lists of layer kinds may contradict other fields: then the class makes them again
        try:
            shrunk = shrink(config, derive=derive)
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(deepcopy(shrunk)).parameters())
            if size > MOST_WEIGHTS:
                raise ValueError(f"its small configuration still has {size / 1e6:.0f} M weights")
            torch.manual_seed(seed)
            return enliven(auto.from_config(shrunk, dtype=torch.float32).eval().requires_grad_(False))
        except Exception as error:
            first = first or error
    assert first
    raise first


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 1) -> nn.Module:
    """Draw weights so that every layer matters: initialisations leave zeros, ones and numbers near zero. In place."""
    random = torch.Generator().manual_seed(seed)
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape, generator=random)
        if id(parameter) in embeddings:
            parameter.copy_(0.5 * noise)
        elif parameter.ndim >= 2 and "conv" not in name:
            inputs = parameter.shape[-1] if parameter.ndim == 2 else max(parameter.shape[-2:])
            parameter.copy_(noise / inputs**0.5)
        elif not parameter.isfinite().all() or (name.endswith("bias") and not parameter.any()):
            parameter.copy_(0.02 * noise)
    return model


def shrink(config: transformers.PreTrainedConfig, derive: bool = False, scale: Scale = TEXT) -> Any:
    """A configuration of the same class for a small model.

    derive: leave lists of kinds of layers to the class.
    scale:  sizes, those of the decoder or of what sees or hears.
    """
    tower = WIDE_TOWER.get(config.model_type, TOWER) if scale is TEXT else scale
    fields = {name: value for name, value in vars(config).items() if not OF_THE_CLASS.fullmatch(name)}
    own = EXCEPTIONS.get(config.model_type, {})
    layers, kept = shown_layers(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = shrink(value, derive, tower if re.fullmatch(TOWERS, name) else scale)
        elif isinstance(value, list | tuple) and len(value) == layers and kept:
            if not (derive and name.endswith("layer_types")):
                one = name.removesuffix("_per_layer")
                small[name] = [_number(one, value[index], scale) for index in kept]
        elif re.fullmatch(LAYERS, name) and value == layers and kept:
            small[name] = len(kept)
        elif name.startswith("rope_"):
            head = own.get("head_dim")
            small[name] = rotary(value, head if isinstance(head, int) else scale.head)
        else:
            small[name] = _number(name, value, scale)
    _agree(small, scale)
    small |= own
    return type(config)(**{name: value for name, value in small.items() if value is not Derived})


def shown_layers(fields: dict[str, Any]) -> tuple[int, list[int]]:
    """(number of layers, indices of the first layer of every kind and at least two); no indices when there are two."""
    layers = next((v for k, v in fields.items() if re.fullmatch(LAYERS, k) and isinstance(v, int)), 0)
    if layers <= 2:
        return layers, []
    lists = [list(map(str, v)) for v in fields.values() if isinstance(v, list | tuple) and len(v) == layers]
    lists = [one for one in lists if len(set(one)) <= KINDS_OF_LAYER]
    first: dict[tuple, int] = {}
    for index in range(layers):
        first.setdefault(tuple(one[index] for one in lists), index)
    shown = list(first.values())[:MOST_LAYERS]
    more = [index for index in range(layers) if index not in shown]
    return layers, sorted(shown + more[: max(0, 2 - len(shown))])


def rotary(value: Any, head: int) -> Any:
    """Settings of rotary embeddings for that many channels a head."""
    if not isinstance(value, dict):
        return value
    half = int(head * value.get("partial_rotary_factor", 1.0)) // 2
    small: dict[str, Any] = {}
    for name, one in value.items():
        if name == "mrope_section" and one:
            part = max(half // 4, 1)
            one = [half - 2 * part, part, part][: len(one)]
        elif name in ("short_factor", "long_factor") and one:
            one = [1.0] * half
        elif name == "original_max_position_embeddings":
            one = 256
        small[name] = rotary(one, head)
    return small


def _agree(small: dict[str, Any], scale: Scale) -> None:
    """Set what follows from other fields."""
    latent = "kv_lora_rank" in small  # multi-head latent attention: a key a head
    if latent and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_nope_head_dim" in small and "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small.get("qk_rope_head_dim", 0)
    if not latent and scale is TEXT:
        for name, value in (("head_dim", scale.head), ("num_key_value_heads", scale.groups)):
            if name in small and small[name] is None:
                small[name] = value


def _number(name: str, value: Any, scale: Scale) -> Any:
    """What a field becomes, by its name."""
    if name in SPECIAL and value is not None:
        return SPECIAL[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return deepcopy(value)
    if re.fullmatch(TOKEN, name):
        return 100 + zlib.crc32(name.encode()) % (VOCABULARY - 100)
    for wanted, most in ((RULES, False), (AT_MOST, True)):
        for pattern, size in wanted:
            if re.fullmatch(pattern, name):
                number = TEXT.width if size == "text" else size if isinstance(size, int) else getattr(scale, size)
                return min(number, value) if most or value <= 0 else number
    return value
