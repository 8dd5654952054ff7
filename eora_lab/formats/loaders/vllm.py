"""What vLLM 0.33 makes of an adapter (vllm/lora/peft_helper.py, lora_model.py, config/lora.py).

It reads rank_pattern, alpha_pattern and use_rslora as peft does. Modules that it does not know are left out with a
warning, kv_b_proj of multi-head latent attention without one (vllm-project/vllm#48974).
"""

from collections.abc import Iterator

from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.peft import SERVED_RANKS

SERVE = """vllm serve BASE --enable-lora --max-lora-rank SERVED --lora-modules mended=ADAPTER
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "mended", "prompt": "The capital of France is", "max_tokens": 16}'"""
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases in an adapter (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QA-LoRA (use_qalora)",
}
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights that it takes
HEADS = ("classifier", "score")  # of modules_to_save that it takes


def problems(given: Given) -> Iterator[str]:
    """What it refuses."""
    config, ranks = given.config, given.ranks
    if not config.get("target_modules"):
        yield "needs target_modules"
    named = config.get("modules_to_save") or ()
    if saved := [name for name in ([named] if isinstance(named, str) else named) if name not in HEADS]:
        yield f"refuses modules_to_save ({some(saved)})"
    yield from (f"refuses {what}" for key, what in REFUSED.items() if config.get(key))
    if config.get("bias", "none") != "none":
        yield "refuses biases in an adapter (bias)"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in STARTS:
        yield f"refuses init_lora_weights {start!r}"
    reserved = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if max(reserved, *ranks.values(), 0) > SERVED_RANKS[-1]:
        yield f"refuses rank {max(reserved, *ranks.values(), 0)}: at most {SERVED_RANKS[-1]}"
    if max(ranks.values(), default=0) > reserved:
        yield f"reserves room for rank {reserved}, a layer has {max(ranks.values())}"
    if absorbed := [module for module in ranks if module.endswith(".kv_b_proj")]:
        yield f"loads {some(absorbed)} and does not apply it: latent attention reads the weight itself"
    yield from _experts(given)


def _experts(given: Given) -> Iterator[str]:
    """What depends on the form of a mixture's experts."""
    ranks = given.ranks
    if given.together:
        yield (
            f"knows {given.together} only where it keeps experts as one tensor (gpt-oss, Qwen3.5-MoE): else --universal"
        )
    elif given.apart():
        yield "takes experts one by one only where it does not keep them as one tensor (gpt-oss, Qwen3.5-MoE)"
        yield "adds factors to quantised experts in its Marlin and Triton back ends only"
        for each in given.fused:
            wanted = [name for parts in each.parts for name, _ in parts]
            lacking = [name for name in wanted if name not in ranks]
            if lacking and len(lacking) < len(wanted):
                yield f"needs all experts of a layer; {some(lacking)} has no factors"
            if len({ranks[name] for name in wanted if name in ranks}) > 1:
                yield f"needs one rank for all experts of {each.module}"
