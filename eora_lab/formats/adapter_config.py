"""adapter_config.json: what a LoRA adapter says of itself, and what in it means more than W + scaling B A.

The keys are peft's (0.21). One that is not in these tables is refused unless it is empty: new kinds of LoRA come with
keys of their own, and their files look like plain ones.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from eora_lab.errors import EoraLabError

CONFIG = "adapter_config.json"
# read here, or of no matter to what the factors mean (some say which layers have any, which the tensors say too)
PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
    "target_parameters",
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "merge_weights"),
}
PLAIN_STARTS = (True, "gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: W stays as it is
MORE = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "a bias of lora_B",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which begins at certain tokens",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA, which changes W",
    "monteclora_config": "MonteCLoRA's sampling",
    "megatron_config": "Megatron's parallel layers",
    "enable_lora": "merged linears",
}
EMPTY: tuple[object, ...] = (None, False, "", [], {})
FLAGS = ("use_rslora", "use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "inference_mode")
NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


def read_config(folder: Path) -> dict:
    """adapter_config.json of a folder. Raises EoraLabError when it is missing, damaged, or has wrong types."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = f": give {folder / 'adapter'}" if (folder / "adapter" / CONFIG).exists() else ""
        raise EoraLabError(f"{folder}: no adapter, {CONFIG} is missing{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EoraLabError(f"{folder}: {CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise EoraLabError(f"{folder}: {CONFIG} is not that of a LoRA adapter (peft_type LORA)")
    for problem in wrong_types(config):
        raise EoraLabError(f"{folder}: {problem}")
    return config


def wrong_types(config: dict) -> Iterator[str]:
    """Values of the keys that are read here which are not what they should be."""
    for key, kind, word in (("r", int, "a whole number"), ("lora_alpha", int | float, "a number")):
        if not positive(config.get(key), kind):
            yield f"{key} in {CONFIG} must be {word} above 0, not {config.get(key)!r}"
    for key, kind, word in (("rank_pattern", int, "whole numbers"), ("alpha_pattern", int | float, "numbers")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(positive(value, kind) for value in pattern.values()):
            yield f"{key} in {CONFIG} must name {word} above 0"
            continue
        for name in pattern:
            yield from no_pattern(key, f"({name})")
    wrong = [key for key in FLAGS if not isinstance(config.get(key), bool | None)]
    yield from (f"{key} in {CONFIG} must be true or false, not {config[key]!r}" for key in wrong)
    for key in NAMES:
        names = config.get(key)
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not listed and not isinstance(names, str | None):
            yield f"{key} in {CONFIG} must be a list of names, not {names!r}"
            continue
        patterns = [names] if isinstance(names, str) else names if key == "layers_pattern" else None
        for name in patterns or ():
            yield from no_pattern(key, name)
    if not all(isinstance(index, int) for index in listed_layers(config) or ()):
        yield f"layers_to_transform in {CONFIG} must be numbers of layers, not {config['layers_to_transform']!r}"
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        yield f"base_model_name_or_path in {CONFIG} must be text, not {config['base_model_name_or_path']!r}"


def no_pattern(key: str, pattern: str) -> Iterator[str]:
    """What is wrong with a regular expression of a key."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"{key} in {CONFIG} has a name that is no pattern ({error})"


def listed_layers(config: dict) -> list | None:
    """The layers that have factors, of which peft knows one or several; None: no layer is left out."""
    listed = config.get("layers_to_transform")
    return None if listed in (None, []) else listed if isinstance(listed, list) else [listed]


def left_out_by(config: dict, module: str) -> str | None:
    """The key by which peft gives a linear no factors, whatever the tensors hold; None: it has them.

    As peft's check_target_module_exists, but that case does not count: GPTQModel's tensors have lower-case names. A
    configuration without target_modules leaves none out: peft then has a table a model type.
    """

    def named(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module, re.IGNORECASE) is not None
        return any(f".{module}".lower().endswith(f".{name}".lower()) for name in names)

    target, listed = config.get("target_modules"), listed_layers(config)
    if config.get("exclude_modules") and named(config["exclude_modules"]):
        return "exclude_modules"
    if target is None or target == "all-linear":
        return None
    if not named(target):
        return "target_modules"
    if listed is not None and not isinstance(target, str) and module not in target:
        patterns = config.get("layers_pattern") or []
        starts = [rf"(?:^|.*?\.){name}" for name in ([patterns] if isinstance(patterns, str) else patterns)]
        for start in starts or [r".*?\.[^.]*"]:
            if index := re.match(rf"{start}\.(\d+)\.", module):
                return None if int(index[1]) in listed else "layers_to_transform"
        return "layers_to_transform"
    return None


def positive(value, kind) -> bool:
    """A finite number above 0 of that type; true is none."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def not_plain(config: dict) -> Iterator[str]:
    """Everything in a configuration by which the factors mean something else than W + scaling B A, or may."""
    for key, value in config.items():
        if key in PLAIN or value in EMPTY:
            continue
        if key in MORE:
            yield f"the adapter uses {MORE[key]} ({key}), which is no low-rank product beside a weight"
        elif key != "init_lora_weights":
            yield (
                f"{key} ({value!r}) in {CONFIG} is not known here, and may change what the factors mean: delete it if "
                "it does not"
            )
        elif value == "loftq":
            yield "init_lora_weights 'loftq' goes with weights that LoftQ changed, and fits no others"
        elif value not in PLAIN_STARTS:
            yield (
                f"init_lora_weights {value!r} may change the weights beside the factors too: convert the adapter in "
                "peft (save_pretrained with path_initial_model_for_weight_conversion)"
            )


def names_another(config: dict, model: str) -> str | None:
    """The base model that an adapter names, unless it may be that one: the same path, or the same last part."""
    named = (config.get("base_model_name_or_path") or "").rstrip("/")
    if not named or not model or named == model:
        return None
    one, other = (Path(name).expanduser().resolve() for name in (named, model))
    return None if one == other or one.name.lower() == other.name.lower() else named
