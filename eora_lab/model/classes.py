"""Which class of transformers makes a model: the one that config.json names, with its towers for pictures and sound.

So modules have the names that they have where the model is served.
"""

import inspect
from typing import Any

from eora_lab.errors import as_setting

TWO_WAYS = ("xlnet",)  # listed by transformers as causal alone, and yet not


def class_of(config: Any) -> Any:
    """The class that a configuration names, or else the one that also sees or hears; None: transformers has none.

    Raises EoraLabError where it names them otherwise than by names.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    names = as_setting(tuple[str, ...], config.architectures or (), "architectures in config.json")
    named = [getattr(transformers, name, None) for name in names]
    # a text part alone, such as that of Emu 3, is in no mapping
    listed = {*auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    parts = [one for one in named if getattr(one, "__name__", "") in listed and one.config_class is type(config)]  # type: ignore[union-attr]
    return next(iter([one for one in named if one in known] + parts + known), None)


def own_config(kind: Any, config: Any) -> Any:
    """The configuration that a class takes: of some models that also see, the part for text alone."""
    if kind.config_class is not config.sub_configs.get("text_config"):
        return config
    text = config.get_text_config()
    if hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    return text


def why_not_decoder(config: Any, kind: Any) -> str:
    """Why a model of that configuration and class continues no text by a decoder alone; empty: it does."""
    from transformers.models.auto import modeling_auto as auto

    text = getattr(config, "text_config", None) or config
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        return "this is an encoder-decoder, or the decoder of one"
    if (
        type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING or config.model_type in TWO_WAYS
    ):  # though BERT and its kin are listed as causal too
        return "this is a masked one, which reads both ways"
    if kind is None:
        return "transformers has no class of it that continues text"
    takes = inspect.signature(kind.forward).parameters
    needed = [one.name for one in takes.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if more := [name for name in needed if name not in ("self", "input_ids")]:
        return f"this one does not run without {more[0]}"
    return "" if "input_ids" in takes else "this one does not run on text alone"
