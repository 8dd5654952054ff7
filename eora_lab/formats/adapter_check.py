"""What other tools would make of a PEFT adapter: the mistakes of each loader, named before it makes them.

The rules were read in the sources of the loaders (peft 0.21, vLLM, SGLang, GPTQModel and llama.cpp of 2025 and 2026);
nothing is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.formats.adapter_config import left_out_by, not_plain
from eora_lab.formats.fused import Fused, Shapes, apart_shapes, fused_linears, whole
from eora_lab.formats.names import Factors, key_of, match_names, pairs
from eora_lab.formats.peft import SERVED_RANKS, adapter_factors, by_pattern, peft_scaling, scaling
from eora_lab.formats.peft_experts import parameter_targets
from eora_lab.formats.renaming import as_loaded, by_own_names, lost

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections that servers join into one
MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # whose out_proj peft does not wrap


@dataclass(frozen=True)
class Finding:
    """One thing that a loader ("any": all of them) refuses, ignores or computes otherwise than meant."""

    loader: str
    problem: str

    def __str__(self) -> str:
        return f"{self.loader}: {self.problem}"


def check_adapter(
    tensors: dict[str, Tensor], config: dict, shapes: Shapes, model: nn.Module | None = None
) -> list[Finding]:
    """Everything that one of peft, vLLM, SGLang, GPTQModel and llama.cpp would get wrong; empty when all load it alike.

    No form of an adapter of fused experts is taken by all of them.

    tensors, config: from `read_files`.
    shapes:          of all linears in the decoder blocks of the base model.
    model:           its modules alone (`load_skeleton`), for what tools make of their names.
    """
    fused: list[Fused] = []
    renamed: list[tuple[str, str]] = []
    if model is not None:
        fused, renamed = fused_linears(model), list(_renamed(tensors, model))
        tensors = by_own_names(tensors, model)
    found, unknown = pairs(tensors)
    try:
        targets, wrong = parameter_targets(list(found), config), []
    except EoraLabError as error:
        targets, wrong = {}, [("any", str(error))]
    together = targets.keys() - match_names(found, shapes).keys()
    found = {module: halves for module, halves in found.items() if module not in together}
    apart = apart_shapes(shapes, fused)
    if match_names(found, apart.keys() - shapes.keys()):
        shapes = apart
    names = match_names(found, shapes)
    known = {module: halves for module, halves in found.items() if names.get(module) == module}
    complete = {module: halves for module, halves in known.items() if len(halves) == 2}
    ranks = {module: len(halves["A"]) for module, halves in complete.items()}
    findings = [
        *wrong,
        *renamed,
        *_damage(found, unknown, names, shapes),
        *_keys(found, tensors),
        *_features(config),
        *_peft(config, ranks, targets),
        *(_peft_on(config, ranks, model) if model is not None else ()),
        *_vllm(config, ranks),
        *_sglang(config, ranks),
        *_gptqmodel(ranks, shapes),
        *_scaling(config, ranks),
        *(_together(tensors, config, min(together), shapes) if together else _one_by_one(ranks, fused)),
    ]
    return [Finding(loader, problem) for loader, problem in findings]


def fix_adapter(tensors: dict[str, Tensor], config: dict, shapes: Shapes, model: nn.Module | None = None) -> Factors:
    """What to write as a universal adapter instead: every linear, the scaling in B, names spelt as the model's.

    Linears without a path get rank 0, which the universal form pads with zeros.
    Raises EoraLabError when a finding cannot be mended: a missing or misshapen half, a layer that the model does not
    have, NaN or Inf, DoRA, saved modules.
    """
    fused = fused_linears(model) if model is not None else []
    if model is not None:
        tensors = by_own_names(tensors, model)
    factors = whole(adapter_factors(tensors, config), fused)
    names = match_names(factors, shapes)
    mended = {}
    for module, (A, B) in factors.items():
        if module not in names:
            raise EoraLabError(f"the model has no linear {module} in its decoder blocks")
        if (len(B), A.shape[1]) != tuple(shapes[names[module]]):
            raise EoraLabError(
                f"{module}: factors of a {len(B)}x{A.shape[1]} layer, {_size(shapes[names[module]])} here"
            )
        mended[names[module]] = A, B
    like = next(iter(tensors.values()))
    empty = {m: (like.new_zeros(0, i), like.new_zeros(o, 0)) for m, (o, i) in shapes.items() if m not in mended}
    return mended | empty


def _damage(found: dict, unknown: list[str], names: dict[str, str], shapes: Shapes):
    if unknown:
        yield "any", f"{_some(unknown)} is no lora_A or lora_B matrix of a layer"
    if strangers := [module for module in found if module not in names]:
        yield "any", f"the model has no linear {_some(strangers)} in its decoder blocks"
    if respelt := [module for module in found if names.get(module, module) != module]:
        yield "any", f"{_some(respelt)} is spelt otherwise in the model ({names[respelt[0]]})"
    if halved := [module for module, halves in found.items() if len(halves) == 1]:
        yield "any", f"one of lora_A and lora_B is missing of {_some(halved)}"
    for module, halves in found.items():
        for half, tensor in halves.items():
            if not tensor.isfinite().all():
                yield "any", f"lora_{half} of {module} has NaN or Inf"
        if module in names:
            out_features, in_features = shapes[names[module]]
            if "A" in halves and halves["A"].shape[1] != in_features:
                yield "any", f"lora_A of {module} is for {halves['A'].shape[1]} inputs, the layer has {in_features}"
            if "B" in halves and len(halves["B"]) != out_features:
                yield "any", f"lora_B of {module} is for {len(halves['B'])} outputs, the layer has {out_features}"
        if len(halves) == 2 and len(halves["A"]) != halves["B"].shape[1]:
            yield "any", f"{module}: lora_A has rank {len(halves['A'])}, lora_B {halves['B'].shape[1]}"


def _keys(found: dict, tensors: dict[str, Tensor]):
    keys = [key_of(module, half) for module, halves in found.items() for half in halves]
    if respelt := [key for key in keys if key not in tensors]:
        yield "any", f"looks for {_some(respelt)}, which has another key here"


def _features(config: dict):
    for problem in not_plain(config):
        yield "any", problem
    if config.get("modules_to_save"):
        yield "vllm", "refuses modules_to_save"
    if config.get("use_dora"):
        yield "vllm", "refuses DoRA"
        yield "sglang", "refuses DoRA"
        yield "gptqmodel", "ignores DoRA's magnitudes"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "vllm", "refuses biases in an adapter"


def _peft(config: dict, ranks: dict[str, int], targets: dict[str, str]):
    left_out = {module: None if module in targets else left_out_by(config, module) for module in ranks}
    for key in dict.fromkeys(filter(None, left_out.values())):
        yield "peft", f"ignores {_some([module for module in ranks if left_out[module] == key])}, left out by {key}"
    wanted = {m: by_pattern(config, "rank_pattern", "r", targets.get(m, m)) for m in ranks if not left_out[m]}
    if other := [module for module, rank in wanted.items() if ranks[module] != rank]:
        in_file, expected = ranks[other[0]], wanted[other[0]]
        yield "peft", f"refuses {_some(other)}: rank {in_file} in the file, {expected} in the configuration"


def _peft_on(config: dict, ranks: dict[str, int], model: nn.Module):
    """What depends on the model beside its linears."""
    target, kind = config.get("target_modules"), getattr(getattr(model, "config", None), "model_type", "")
    if not target:
        return

    def named(module: str) -> bool:
        return left_out_by({"target_modules": target}, module) is None

    if kind in MAMBAS and (refused := [m for m in ranks if m.rpartition(".")[2] == "out_proj" and named(m)]):
        yield (
            "peft",
            f"refuses {_some(refused)}: no out_proj in models of type {kind}; add the path to the weights for it "
            "(eora-lab export --format merged)",
        )
    names = [] if target == "all-linear" else [name for name, _ in model.named_modules()]
    also = [name for name in names if name not in ranks and named(name)]
    if also and not config.get("exclude_modules") and not config.get("layers_to_transform"):
        yield "peft", f"takes {_some(also)} for a target as well, of which the adapter holds nothing: write full names"


def _renamed(tensors: dict[str, Tensor], model: nn.Module):
    """What comes of names that peft changes (see `renaming`)."""
    names = list(pairs(tensors)[0])
    loaded = as_loaded(names, model)
    if dropped := [name for name in lost(names, model) if name not in loaded]:
        yield "peft", f"looks for {_some(dropped)} by another name, which is none of the model, and drops it"
    if other := [name for name in names if loaded.get(name, name) != name]:
        yield "gptqmodel", f"does not know {_some(other)} by its published name ({loaded[other[0]]} in the model)"


def _vllm(config: dict, ranks: dict[str, int]):
    if not config.get("target_modules"):
        yield "vllm", "needs target_modules"
    highest = max([config["r"], *ranks.values()])
    if highest > SERVED_RANKS[-1]:
        yield "vllm", f"refuses rank {highest}: at most {SERVED_RANKS[-1]}"
    elif highest not in SERVED_RANKS:
        known = ", ".join(map(str, SERVED_RANKS))
        yield "vllm", f"rank {highest} is none of the --max-lora-rank it takes ({known}): start it with the next one"
    if max(ranks.values(), default=0) > config["r"]:
        yield "vllm", f"reserves room for rank {config['r']}, a layer has {max(ranks.values())}"


def _sglang(config: dict, ranks: dict[str, int]):
    if other := [module for module, rank in ranks.items() if rank != config["r"]]:
        yield "sglang", f"older versions need rank {config['r']} in every layer; {_some(other)} has {ranks[other[0]]}"
    for group in FUSED:
        parents: dict[str, set[str]] = {}
        for module in ranks:
            parent, _, leaf = module.rpartition(".")
            if leaf in group:
                parents.setdefault(parent, set()).add(leaf)
        if partial := [parent for parent, leaves in parents.items() if len(leaves) < len(group)]:
            lacks = ", ".join(leaf for leaf in group if leaf not in parents[partial[0]])
            yield "sglang", f"joins {', '.join(group)} and needs all of them: {_some(partial)} lacks {lacks}"


def _gptqmodel(ranks: dict[str, int], shapes: Shapes):
    if missing := [module for module in shapes if module not in ranks]:
        yield "gptqmodel", f"needs both halves for every quantised linear; {_some(missing)} has none"
    if upper := [module for module in ranks if module != module.lower()]:
        yield "gptqmodel", f"looks for lower-case names and does not find {_some(upper)}"


def _together(tensors: dict[str, Tensor], config: dict, first: str, shapes: Shapes):
    """Experts that are one entry, `first` and others, as peft takes them."""
    try:
        for module, (A, B) in adapter_factors(tensors, config).items():
            if module not in shapes:
                yield "any", f"the model has no linear {module} in its decoder blocks"
            elif (len(B), A.shape[1]) != tuple(shapes[module]):
                yield "any", f"{module}: factors of a {len(B)}x{A.shape[1]} layer, {_size(shapes[module])} here"
    except EoraLabError as error:
        yield "any", str(error)
    yield "vllm", f"knows {first} only where it keeps experts as one tensor (gpt-oss, Qwen3.5-MoE): else --universal"
    yield "sglang", f"drops {first} without a word: it takes no adapter of experts"
    yield "llama.cpp", f"its converter does not know {first}: --universal"


def _one_by_one(ranks: dict[str, int], fused: Sequence[Fused]):
    """Experts each by itself, as checkpoints were published."""
    for each in fused:
        several = [[name for name, _ in parts] for parts in each.parts]
        alone = [name if name in ranks else None for name in each.names()]
        found = [name for names in several for name in names if name in ranks] or list(filter(None, alone))
        if not found:
            continue
        yield "sglang", f"drops {found[0]}, and all other experts, without a word"
        if not each.parameter:
            yield "peft", f"cannot wrap {each.module}: its experts lie below one another"
            return
        yield (
            "peft",
            f"puts {found[0]} and others together for some families only, and drops what it does not (also dense "
            "linears of such names) without a word: give it the form without --universal",
        )
        yield "vllm", "takes experts one by one only where it does not keep them as one tensor (gpt-oss, Qwen3.5-MoE)"
        yield "vllm", "adds factors to quantised experts in its Marlin and Triton back ends only"
        break
    for each in fused:
        wanted = [name for parts in each.parts for name, _ in parts]
        lacking = [name for name in wanted if name not in ranks]
        if lacking and len(lacking) < len(wanted):
            yield "vllm", f"needs all experts of a layer; {_some(lacking)} has no factors"
            yield "llama.cpp", f"its converter needs all experts of a layer; {_some(lacking)} has no factors"
        if len({ranks[name] for name in wanted if name in ranks}) > 1:
            yield "vllm", f"needs one rank for all experts of {each.module}"


def _scaling(config: dict, ranks: dict[str, int]):
    """Each loader's own idea of a layer's scaling beside what is meant."""
    uniform = config["lora_alpha"] / config["r"]
    served = config["lora_alpha"] / config["r"] ** 0.5 if config.get("use_rslora") else uniform
    loaders = {
        "peft": lambda module: peft_scaling(config, module),
        "vllm": lambda _: served,  # reads neither pattern
        "sglang": lambda _: uniform,  # older versions: nor rsLoRA
        "gptqmodel": lambda _: 1.0,
    }
    for loader, scale in loaders.items():
        if wrong := [m for m in ranks if abs(scale(m) / scaling(config, m) - 1) > 1e-6]:
            is_, meant = scale(wrong[0]), scaling(config, wrong[0])
            yield loader, f"scales {_some(wrong)} by {is_:.4g}, {meant:.4g} is meant (r, lora_alpha and their patterns)"


def _some(names: list[str]) -> str:
    """The first of several, and how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
