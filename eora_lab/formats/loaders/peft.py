"""What peft 0.21 makes of an adapter (peft/tuners/tuners_utils.py, utils/transformers_weight_conversion.py)."""

from collections.abc import Iterator

from torch import nn

from eora_lab.formats.adapter_config import left_out_by
from eora_lab.formats.loaders.given import Given, some
from eora_lab.formats.peft import by_pattern
from eora_lab.formats.renaming import as_loaded, lost

SERVE = """from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "ADAPTER")"""
MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # whose out_proj peft does not wrap


def problems(given: Given) -> Iterator[str]:
    """What it refuses, ignores or looks for elsewhere."""
    config, ranks, targets = given.config, given.ranks, given.targets
    left_out = {module: None if module in targets else left_out_by(config, module) for module in ranks}
    for key in dict.fromkeys(filter(None, left_out.values())):
        yield f"ignores {some([module for module in ranks if left_out[module] == key])}, left out by {key}"
    wanted = {m: by_pattern(config, "rank_pattern", "r", targets.get(m, m)) for m in ranks if not left_out[m]}
    if other := [module for module, rank in wanted.items() if ranks[module] != rank]:
        in_file, expected = ranks[other[0]], wanted[other[0]]
        yield f"refuses {some(other)}: rank {in_file} in the file, {expected} in the configuration"
    if given.model is not None:
        loaded = as_loaded(given.written, given.model)
        if dropped := [name for name in lost(given.written, given.model) if name not in loaded]:
            yield f"looks for {some(dropped)} by another name, which is none of the model, and drops it"
    if given.model is not None and config.get("target_modules"):
        yield from _on_model(config, ranks, given.model)
    if (first := given.apart()) and not given.together:
        yield from _one_by_one(given, first)


def _on_model(config: dict, ranks: dict[str, int], model: nn.Module) -> Iterator[str]:
    """What depends on the model beside its linears."""
    target, kind = config["target_modules"], getattr(getattr(model, "config", None), "model_type", "")

    def named(module: str) -> bool:
        return left_out_by({"target_modules": target}, module) is None

    if kind in MAMBAS and (refused := [m for m in ranks if m.rpartition(".")[2] == "out_proj" and named(m)]):
        yield (
            f"refuses {some(refused)}: no out_proj in models of type {kind}; add the path to the weights for it "
            "(eora-lab export --format merged)"
        )
    names = [] if target == "all-linear" else [name for name, _ in model.named_modules()]
    also = [name for name in names if name not in ranks and named(name)]
    if also and not config.get("exclude_modules") and not config.get("layers_to_transform"):
        yield f"takes {some(also)} for a target as well, of which the adapter holds nothing: write full names"


def _one_by_one(given: Given, first: str) -> Iterator[str]:
    """Experts each by itself, as checkpoints were published."""
    if unwrapped := [each.module for each in given.fused if not each.parameter]:
        yield f"cannot wrap {unwrapped[0]}: its experts lie below one another"
        return
    yield (
        f"puts {first} and others together for some families only, and drops what it does not (also dense linears of "
        "such names) without a word: give it the form without --universal"
    )
