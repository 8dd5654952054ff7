"""Was a GGUF file read whole? The reader of transformers passes over tensors and keys that it does not know.

What a key says is held against what the loaded model computes; one that neither knows is refused.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from eora_lab.errors import EoraLabError

# Keys that may be passed over, for the shapes of tensors prove them or nothing depends on them
HARMLESS = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "tensor_data_layout"),
    *("expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count"),
    *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"),
    *("attention.head_count_kv", "shortconv.l_cache", "nextn_predict_layers"),
    # of a scaling whose factor, below, is 1
    *("rope.scaling.type", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# Keys that must say what the model computes
COMPARED: dict[str, Callable[[Any], Any]] = {
    "attention.head_count": lambda c: getattr(c, "num_attention_heads", 0),
    "attention.key_length": lambda c: _head_dim(c),
    "attention.value_length": lambda c: _head_dim(c),
    "attention.layer_norm_epsilon": lambda c: _epsilon(c),
    "attention.layer_norm_rms_epsilon": lambda c: _epsilon(c),
    "attention.scale": lambda c: (getattr(c, "query_pre_attn_scalar", None) or _head_dim(c)) ** -0.5,
    "attention.causal": lambda _: True,
    "attention.sliding_window": lambda c: getattr(c, "sliding_window", None) or 0,
    "rope.dimension_count": lambda c: int(_head_dim(c) * _rope(c).get("partial_rotary_factor", 1.0)),
    "rope.dimension_sections": lambda c: _rope(c).get("mrope_section"),
    "rope.freq_base": lambda c: _rope(c).get("rope_theta"),
    "rope.freq_base_swa": lambda c: _rope(c, "sliding_attention").get("rope_theta"),
    "rope.scale_linear": lambda c: _rope(c).get("factor", 1.0),
    "rope.scaling.factor": lambda c: _rope(c).get("factor", 1.0),
    "rope.scaling.attn_factor": lambda c: _rope(c).get("attention_factor", 1.0),
    "attn_logit_softcapping": lambda c: getattr(c, "attn_logit_softcapping", None) or 0,
    "final_logit_softcapping": lambda c: getattr(c, "final_logit_softcapping", None) or 0,
    "logit_scale": lambda c: getattr(c, "logit_scale", 1.0),
    "residual_scale": lambda c: getattr(c, "residual_multiplier", 1.0),
    "embedding_scale": lambda c: getattr(c, "embedding_multiplier", 1.0),
    "use_parallel_residual": lambda c: getattr(c, "use_parallel_residual", False),
    "full_attention_interval": lambda c: getattr(c, "full_attention_interval", 0),
    "expert_count": lambda c: _first(c, ("num_experts", "num_local_experts"), 0),
    "expert_used_count": lambda c: getattr(c, "num_experts_per_tok", 0),
    "expert_weights_norm": lambda c: getattr(c, "norm_topk_prob", False),
    "expert_weights_scale": lambda c: getattr(c, "routed_scaling_factor", 1.0),
}


def check_gguf(path: Path, model: nn.Module, unexpected: set[str]) -> None:
    """Raise EoraLabError when the file holds tensors or says things that the model read from it does without.

    unexpected: the tensors that transformers itself reports.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    surplus = sorted(unexpected) or _passed_over(reader, architecture, model)
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise EoraLabError(
            f"{path} holds {', '.join(surplus[:3])}{more}, for which {type(model).__name__} has no place: transformers "
            "cannot read this file whole; use the model's safetensors"
        )
    config, read = model.config.get_text_config(), _read_keys(architecture)  # type: ignore[operator, union-attr]
    for field, about in reader.fields.items():
        owner, _, key = field.partition(".")
        if owner != architecture or key in HARMLESS or key in read:
            continue
        said = about.contents()
        ours = COMPARED[key](config) if key in COMPARED else 0  # 0: without it
        if not (_same(said, ours) or (key == "attention.sliding_window" and said >= config.max_position_embeddings)):
            computes = f"and computes with {ours}" if key in COMPARED else "and it may change what the model computes"
            raise EoraLabError(
                f"{path} says {field} = {said}, which transformers passes over, {computes}: use the model's safetensors"
            )


def _passed_over(reader, architecture: str, model: nn.Module) -> list[str]:
    """The tensors that the older reader of transformers, which most architectures have, drops without a word."""
    from transformers import modeling_gguf_pytorch_utils as legacy

    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:  # before there was another reader
        is_newer = False
    else:
        is_newer = is_gguf_arch_supported(architecture)
    if is_newer:
        return []
    processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config=model.config.to_dict())  # type: ignore[operator, union-attr]
    places = legacy.get_gguf_hf_weights_map(model, processor)
    return [
        tensor.name
        for tensor in reader.tensors
        if tensor.name not in places and not (tensor.name.startswith("rope_f") and (tensor.data == 1).all())
    ]


def _read_keys(architecture: str) -> set[str]:
    """The keys that transformers makes a setting of."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    names = (architecture, architecture.replace("moe", "_moe"), architecture.replace("-", "_"))
    known: Any = next((GGUF_CONFIG_MAPPING[name] for name in names if name in GGUF_CONFIG_MAPPING), {})
    return {key for key, setting in known.items() if setting}


def _same(said: Any, ours: Any) -> bool:
    """Equal, but for the rounding of GGUF's 32-bit floats; None says nothing."""
    if isinstance(said, list) or isinstance(ours, list):
        return [part for part in said if part] == ours
    if isinstance(said, str) or ours is None:
        return said == ours
    return math.isclose(said, ours, rel_tol=1e-5)


def _first(config, names: tuple[str, ...], default: Any = None) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _epsilon(config) -> float | None:
    return _first(config, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"))


def _rope(config, layers: str = "full_attention") -> dict:
    """The settings of rotary positions, of one kind of layers where there are several."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(layers, found)
