"""What llama.cpp of October 2026 makes of a PEFT adapter, through its convert_lora_to_gguf.py.

It writes lora_alpha alone, and llama.cpp divides that by the rank of each pair: rank_pattern is harmless, alpha_pattern
and use_rslora are not read. What is in a GGUF file is checked by `eora_lab.formats.gguf_adapter_check`.
"""

from collections.abc import Iterator

from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.peft import by_pattern

SERVE = """python convert_lora_to_gguf.py --base ORIGINAL ADAPTER --outfile ADAPTER.gguf
llama-server -m BASE.gguf --lora ADAPTER.gguf"""


def scaling(config: dict, module: str) -> float:
    """What it multiplies B A by."""
    return config["lora_alpha"] / by_pattern(config, "rank_pattern", "r", module)


def problems(given: Given) -> Iterator[str]:
    """What its converter does not take."""
    if given.together:
        yield f"its converter does not know {given.together}: --universal"
    elif given.apart():
        for each in given.fused:
            wanted = [name for parts in each.parts for name, _ in parts]
            lacking = [name for name in wanted if name not in given.ranks]
            if lacking and len(lacking) < len(wanted):
                yield f"its converter needs all experts of a layer; {some(lacking)} has no factors"
