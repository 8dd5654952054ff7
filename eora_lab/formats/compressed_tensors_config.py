"""What a compressed-tensors folder says of its weights: which scheme a linear has, and how numbers are laid down."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.said import NOT_MODELLED, Said

INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
FLOATS8 = ("float-quantized", "naive-quantized")
FLOATS4 = {"nvfp4-pack-quantized": ("tensor_group", 16), "mxfp4-pack-quantized": ("group", 32)}
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
CLASSES = ("linear", "linearbase")  # targets that mean every linear
# of a scheme for weights: how they were found
IN_PLACE = ("weight", "static")  # values of actorder that leave groups as neighbours
ORDERED = ("group", "dynamic", True)  # and those that do not
OBSERVED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
CHANGED = {
    "sparsity_config": "weights with a mask of their own are not read",
    "transform_config": "weights in another basis, such as rotated ones, are not read",
    "moe_sparsity_config": "a model with experts left out is not read",
}
# how activations and the cache are quantised when the model runs, which is not modelled here, and what was done
HARMLESS = ("kv_cache_scheme", "global_compression_ratio", "version", "ignore", "run_compressed", "dequantize")


@dataclass(frozen=True)
class Scheme:
    """How the weights of some linears are stored.

    layout:     the format, such as "pack-quantized".
    bits, floating, symmetric: of the numbers.
    strategy:   what shares a scale: tensor, channel (a row), group, block, tensor_group (groups; they share one more).
    group_size: channels of a group; 0 where there are none.
    block:      rows and columns of a block.
    ordered:    whether groups are no neighbours (actorder "group", of older versions).
    activations: whether they are quantised, too, when the model runs.
    """

    layout: str
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    ordered: bool
    activations: bool
    targets: tuple[str, ...]

    @classmethod
    def read(cls, said: Said, layout: str | None, where: str) -> "Scheme":
        """One of config_groups. Raises EoraLabError on values that are not known or contradict each other."""
        layout = said.get("format", str, layout)
        targets = said.get("targets", list, [])
        activations = any(said.part(key) is not None for key in ("input_activations", "output_activations"))
        weights = said.part("weights")
        said.done(())
        if weights is None or not all(isinstance(one, str) for one in targets):
            raise EoraLabError(f"{where} must have weights, and targets that are text")
        bits, floating = weights.get("num_bits", int), weights.one_of("type", "int", "float", default="int") == "float"
        group_size, block = weights.get("group_size", int), weights.get("block_structure", list)
        inferred = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        strategy = weights.one_of("strategy", *STRATEGIES, default="block" if block else inferred)
        weights.one_of("dynamic", False)
        symmetric = weights.get("symmetric", bool, True)
        ordered = weights.one_of("actorder", False, *IN_PLACE, *ORDERED, default=False) in ORDERED
        weights.done(OBSERVED)
        if floating and layout in FLOATS4 and bits == 4:
            good = (strategy, group_size) == FLOATS4[layout] and symmetric
        elif floating:
            good = layout in FLOATS8 and bits == 8 and strategy != "tensor_group" and symmetric
        else:
            good = layout in INTEGERS and strategy in ("tensor", "channel", "group") and type(bits) is int
            good = good and 1 <= bits <= 8 and (layout == "pack-quantized" or bits >= 2)
        grouped = strategy in ("group", "tensor_group")
        good = good and (not grouped or (group_size or 0) > 0) and (strategy == "block") == bool(block)
        good = good and (block is None or (len(block) == 2 and all(type(one) is int and one > 0 for one in block)))
        if not good or layout is None:
            raise EoraLabError(
                f"{where}: {bits} bits of {'float' if floating else 'int'}, strategy {strategy}, group_size "
                f"{group_size}, block_structure {block}, symmetric {symmetric} in format {layout} are not read"
            )
        size, rows = group_size if grouped else 0, tuple(block or (0, 0))
        return cls(layout, bits, floating, symmetric, strategy, size, rows, ordered, activations, tuple(targets))

    def __str__(self) -> str:
        kind = {"nvfp4-pack-quantized": "NVFP4", "mxfp4-pack-quantized": "MXFP4"}.get(self.layout)
        kind = kind or (f"FP{self.bits}" if self.floating else f"{self.bits}-bit")
        if self.strategy == "group" and not self.floating:
            kind += f" g{self.group_size}"
        elif kind not in ("NVFP4", "MXFP4"):
            kind += f" {self.strategy}"
        return f"compressed-tensors {kind}" + (NOT_MODELLED if self.activations else "")


def read_schemes(data: dict) -> list[Scheme]:
    """All of quantization_config. Raises EoraLabError on what is not known or changes what the weights mean."""
    said = Said(data)
    said.one_of("quant_method", "compressed-tensors")
    said.one_of("quantization_status", "compressed")
    for key, why in CHANGED.items():
        part = said.part(key)
        made_so = part and part.get("format", str)
        if made_so not in (None, "dense"):
            raise EoraLabError(f"{key}.format is {made_so}: {why}")
        if part and not made_so:
            with naming(why):
                part.done(())
    layout = said.get("format", str)
    groups = said.get("config_groups", dict, {})
    said.done(HARMLESS)
    found = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        found.append(Scheme.read(Said(group, f"{where}."), None if layout == "mixed-precision" else layout, where))
    if not found:
        raise EoraLabError("config_groups names no scheme of weights")
    return found


def scheme_of(name: str, schemes: Iterable[Scheme], ignore: Iterable[Any]) -> Scheme:
    """That of a linear whose weight is quantised: one that names it, else one for all linears.

    Raises EoraLabError where it is ignored, has none, or has several that say different things.
    """
    if any(matches(name, str(one)) for one in ignore):
        raise EoraLabError(f"{name} is quantised, though `ignore` in config.json names it: correct the wrong one")
    named = [one for one in schemes if any(matches(name, target) for target in one.targets)]
    others = [one for one in schemes if any(target.lower() in CLASSES for target in one.targets)]
    kinds = {
        (one.layout, one.bits, one.floating, one.symmetric, one.strategy, one.group_size, one.block): one
        for one in named or others
    }
    if len(kinds) != 1:
        raise EoraLabError(
            f"{name} is quantised, and {len(kinds) or 'none'} of config_groups say how: there must be one"
        )
    return next(iter(kinds.values()))


def matches(name: str, target: str) -> bool:
    """Whether a target names that linear: by a regular expression from its beginning, or in full."""
    if not target.startswith("re:"):
        return target == name
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise EoraLabError(f"{target} is no regular expression: {error}") from error
