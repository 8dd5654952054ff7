"""GGUF files of tiny models, as llama.cpp's converter and quantiser write them, and what the real one computes."""

import copy
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from eora_lab.formats.fused import fused_linears
from eora_lab.formats.gguf_names import GgufNames, of_all_experts
from eora_lab.measure.llama_cpp import LlamaCpp, quantise
from eora_lab.model.expert_kinds import unfold_experts
from eora_lab.model.structure import linear_at
from tests.test_expert_adapters import mixture
from tests.tiny import tiny_model, write_sizes

PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 17, 30)]
MORE = {
    "smollm3": (transformers.SmolLM3Config, {}),
    "granite": (transformers.GraniteConfig, {}),
    "phi3": (transformers.Phi3Config, {}),  # q, k and v in one linear
    "olmo2": (transformers.Olmo2Config, {}),
    "exaone4": (transformers.Exaone4Config, {}),
    "seed_oss": (transformers.SeedOssConfig, {"head_dim": 16}),
}
DENSE = ["llama", "qwen2", "gemma", *MORE]
GRANTED = {"qwen3_moe": {"norm_topk_prob": True}, "olmoe": {"num_key_value_heads": 4}}  # by llama.cpp
ROUTERS = {"mixtral": "block_sparse_moe.gate."}


needs_llamacpp = pytest.mark.skipif(not find_spec("xllamacpp"), reason="xllamacpp is the extra `llamacpp`")


def model_of(kind: str):
    if kind in MORE:
        config_class, more = MORE[kind]
        sizes = tiny_model("llama").config.to_dict()
        kept = {key: value for key, value in sizes.items() if key.endswith(("_size", "_id", "_layers", "_heads"))}
        torch.manual_seed(0)
        config = config_class(**kept, tie_word_embeddings=False, max_position_embeddings=128, **more)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    return tiny_model(kind) if kind in DENSE else mixture(kind, **GRANTED.get(kind, {}))


def unfolded_of(plain):
    model = copy.deepcopy(plain)
    unfold_experts(model)
    return model


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of a type; random bytes where the package gguf can read it only. Scales of these are of moderate size."""
    kind = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quants.quant_shape_to_byte_shape(values.shape, kind)
        return np.random.default_rng(0).integers(0, 48, shape, dtype=np.uint8)


def write_metadata(writer: gguf.GGUFWriter, config) -> None:
    """Sizes and a vocabulary of letters."""
    write_sizes(writer, config)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type in ("phi3", "exaone4"):
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_sliding_window(4096)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{index}>" for index in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))


@torch.no_grad()
def write_gguf(
    path: Path,
    model,
    kind: Callable[[str], str] = lambda name: "F32",
    more: dict | None = None,
    importance: Mapping[str, torch.Tensor | None] | None = None,
) -> None:
    """A plain model as llama.cpp's converter would write it.

    kind: name of a tensor of two or more dimensions, no router -> its type. more: tensors beside it, as float32.
    importance: name of a tensor that llama.cpp itself makes -> E[x²] to make it by, if any.
    """
    config, names = model.config, GgufNames(unfolded := unfolded_of(model))
    writer = gguf.GGUFWriter(path, names.architecture)
    write_metadata(writer, config)

    def add(key: str, values: np.ndarray) -> None:
        own = kind(key) if values.ndim > 1 and "ffn_gate_inp" not in key else "F32"
        plain = own in ("F32", "F16")
        by = importance or {}
        data = quantise(torch.from_numpy(values), own, by[key]).numpy() if key in by else encoded(values, own)
        writer.add_tensor(key, data, raw_dtype=None if plain else gguf.GGMLQuantizationType[own])

    for each in fused_linears(unfolded):
        for place, (part, _) in enumerate(each.parts[0]):
            weights = [linear_at(unfolded, name).weight for name in each.names()]
            stacked = torch.stack([w[parts[place][1]] for w, parts in zip(weights, each.parts, strict=True)])
            add(f"{names.of(of_all_experts(part))}.weight", stacked.numpy())
    for key, tensor in model.state_dict().items():
        module, _, suffix = key.replace("mlp.gate.", ROUTERS.get(config.model_type, "mlp.gate.")).rpartition(".")
        if tensor.ndim == 3 or (key.startswith("lm_head") and config.tie_word_embeddings):
            continue
        if module.endswith("experts"):  # biases of experts, which no test looks at
            continue
        place = names.find(module)
        if place is None:  # a parameter that is no weight of a module
            place, suffix = names.of(key), "weight"
        if names.architecture == "gemma" and "norm" in module:
            tensor = tensor + 1
        add(f"{place}.{suffix}", names.permuted(place, tensor).contiguous().numpy())
    for key, values in (more or {}).items():
        writer.add_tensor(key, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_llamacpp(base: Path, adapter: Path | None) -> torch.Tensor:
    """(prompts, 97) log-probabilities of the next token."""
    with LlamaCpp(base, adapter, window=64, threads=1, exact=True) as llama:
        return torch.stack([llama.logits(prompt)[-1].log_softmax(-1) for prompt in PROMPTS])
