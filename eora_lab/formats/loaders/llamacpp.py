"""What llama.cpp of October 2026 makes of a PEFT adapter, through its convert_lora_to_gguf.py.

It writes lora_alpha alone, and llama.cpp divides that by the rank of each pair: rank_pattern is harmless, alpha_pattern
and use_rslora are not read. What is in a GGUF file is checked by `eora_lab.formats.gguf_adapter_check`.
"""

from collections.abc import Iterator

from eora_lab.formats.gguf_idle import idle_modules
from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.peft import by_pattern

SERVE = """python convert_lora_to_gguf.py --base ORIGINAL ADAPTER --outfile ADAPTER.gguf
llama-server -m BASE.gguf --lora ADAPTER.gguf"""


def scaling(config: dict, module: str) -> float:
    """What it multiplies B A by."""
    return config["lora_alpha"] / by_pattern(config, "rank_pattern", "r", module)


def problems(given: Given) -> Iterator[str]:
    """What its converter does not take, and what is loaded and then left out."""
    config = getattr(given.model, "config", None)
    blocks = getattr(config, "num_hidden_layers", 0)
    if idle := idle_modules(getattr(config, "model_type", ""), blocks, given.ranks):
        yield f"loads {some(idle)} and does not apply it: its graph multiplies that weight without adapters"
    if given.together:
        yield f"its converter does not know {given.together}: --universal"
    elif given.apart():
        layers: dict[str, list[str]] = {}
        for each in given.fused:
            layers.setdefault(each.module, []).extend(name for parts in each.parts for name, _ in parts)
        for wanted in layers.values():
            lacking = [name for name in wanted if name not in given.ranks]
            if lacking and len(lacking) < len(wanted):
                yield f"its converter needs all linears of all experts of a layer; {some(lacking)} has no factors"
