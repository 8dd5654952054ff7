"""Silent no-ops of llama.cpp: tensors whose adapter it loads, and then multiplies by the weight alone.

As the graphs of its models were in October 2026 (src/models), where a plain product stands for one that asks for
adapters.
"""

import re
from collections.abc import Iterable

LATENT = r"attn_(q|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)|indexer\.\w+"  # of multi-head latent attention
DELTA = r"ssm_(beta|f_a|f_b|g|g_a|g_b)"  # of linear attention
PLAIN = {  # general.architecture -> tensors that its graph multiplies without asking for adapters
    **dict.fromkeys(("deepseek2", "deepseek32", "dots3note", "glm-dsa", "minicpm3", "mistral4", "plm"), LATENT),
    "deepseek4": r"attn_output_a",
    "hy_v4": rf"{LATENT}|attn_gate",
    "glm5-next": rf"{LATENT}|{DELTA}|attn_output",
    "bailingmoe3": rf"{DELTA}|attn_\w+",
    "kimi-linear": rf"{DELTA}|attn_\w+",
    "kimi-k3": rf"{DELTA}|attn_\w+|ffn_(up|gate|down)(_shexp)?|ffn_routed_(up|down)",
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), r"ffn_latent_(up|down)"),
    **dict.fromkeys(("rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"), r"time_mix_(decay_)?[agvw][12]"),
    "granite-switch": r"attn_qkv",
}
TYPES = {  # model_type of transformers -> general.architecture
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k25", "glm4_moe_lite"), "deepseek2"),
    "deepseek_v32": "deepseek32",
    "deepseek_v4": "deepseek4",
    "dots3_note": "dots3note",
    "glm_moe_dsa": "glm-dsa",
    "glm5_next": "glm5-next",
    "bailing_hybrid": "bailingmoe3",
    "kimi_linear": "kimi-linear",
    "nemotron_h": "nemotron_h_moe",
    **{name: name for name in ("hy_v4", "minicpm3", "mistral4", "plm")},
}
LIKE = "glm-dsa"  # has latent attention and an indexer: names for those that the package gguf does not know yet


def is_idle(architecture: str, tensor: str) -> bool:
    """Whether the graph of an architecture leaves out the adapter of a tensor."""
    return bool(re.fullmatch(rf"blk\.\d+\.({PLAIN.get(architecture, '')})\.weight", tensor))


def idle_modules(model_type: str, blocks: int, modules: Iterable[str]) -> list[str]:
    """Those modules of a transformers model whose adapter is left out."""
    if (architecture := TYPES.get(model_type)) is None:
        return []
    import gguf

    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known.get(architecture, known[LIKE]), blocks)
    return [module for module in modules if is_idle(architecture, f"{names.get_name(module)}.weight")]
