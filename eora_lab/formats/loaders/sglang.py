"""What SGLang 0.5.23 makes of an adapter (python/sglang/srt/lora: lora_config.py, lora.py, mem_pool.py, utils.py).

One rank and one scaling, lora_alpha / r, for all layers: a pair of another rank stops it ("LoRA buffer shape ... does
not match"), and patterns and rsLoRA are not read. Projections that it joins are stacked: k may be missing, and up, but
not q or v beside another, nor gate beside up. Experts come one by one.
"""

from collections.abc import Iterator

from eora_lab.formats.loaders.given import Given, some

SERVE = """python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank RANK \\
    --lora-paths mended=ADAPTER --lora-strict-loading
curl localhost:30000/generate -H 'Content-Type: application/json' \\
    -d '{"text": "The capital of France is", "lora_path": "mended"}'"""
JOINED = ((("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")), (("gate_proj", "up_proj"), ("gate_proj",)))
SHORT = ("w1", "w2", "w3")  # names of experts that it renames, but does not look for by itself


def scaling(config: dict, _module: str) -> float:
    """What it multiplies B A by, in every layer."""
    return config["lora_alpha"] / config["r"]


def problems(given: Given) -> Iterator[str]:
    """What it refuses or drops."""
    config, ranks = given.config, given.ranks
    if config.get("use_dora"):
        yield "refuses DoRA"
    target = config.get("target_modules")
    if not isinstance(target, list) and target not in ("all", "all-linear"):
        yield f"refuses target_modules {target!r}: a list of names, or all-linear"
    if other := [module for module, rank in ranks.items() if rank != config["r"]]:
        yield f"needs rank {config['r']} in every layer; {some(other)} has {ranks[other[0]]}"
    for group, needed in JOINED:
        parents: dict[str, set[str]] = {}
        for module in ranks:
            parent, _, leaf = module.rpartition(".")
            if leaf in group:
                parents.setdefault(parent, set()).add(leaf)
        if partial := [parent for parent, leaves in parents.items() if not leaves.issuperset(needed)]:
            lacks = ", ".join(leaf for leaf in needed if leaf not in parents[partial[0]])
            yield f"joins {', '.join(group)} and needs {' and '.join(needed)}: {some(partial)} lacks {lacks}"
    if given.together:
        yield f"does not know {given.together}, and takes experts one by one: --universal"
    elif (first := given.apart()) and first.rpartition(".")[2] in SHORT:
        yield f"finds {first} only where it is started with --lora-target-modules all"
