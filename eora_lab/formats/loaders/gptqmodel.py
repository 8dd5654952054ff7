"""What GPTQModel 7.7 makes of an adapter (gptqmodel/adapter/adapter.py): no scaling is read, names in lower case."""

from collections.abc import Iterator

from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.renaming import as_loaded

SERVE = """from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
model = GPTQModel.load("BASE", adapter=Lora(path="ADAPTER", rank=RANK))
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))"""


def scaling(_config: dict, _module: str) -> float:
    """What it multiplies B A by: nothing."""
    return 1.0


def problems(given: Given) -> Iterator[str]:
    """What it does not find or ignores."""
    if given.config.get("use_dora"):
        yield "ignores DoRA's magnitudes"
    if missing := [module for module in given.shapes if module not in given.ranks]:
        yield f"needs both halves for every quantised linear; {some(missing)} has none"
    if upper := [module for module in given.ranks if module != module.lower()]:
        yield f"looks for lower-case names and does not find {some(upper)}"
    if given.model is not None:
        loaded = as_loaded(given.written, given.model)
        if other := [name for name in given.written if loaded.get(name, name) != name]:
            yield f"does not know {some(other)} by its published name ({loaded[other[0]]} in the model)"
