"""What a GPTQ checkpoint says of itself, in quantize_config.json and in config.json's quantization_config."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from eora_lab.errors import WORDS, EoraLabError

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
# what the values mean -> its spellings, the newest first, and their type
SPELLINGS: dict[str, tuple[tuple[str, ...], type]] = {
    "method": (("quant_method", "method"), str),
    "checkpoint_format": (("checkpoint_format", "format"), str),
    "bits": (("bits", "wbits", "w_bit"), int),
    "group_size": (("group_size", "groupsize", "q_group_size"), int),
    "sym": (("sym",), bool),
    "desc_act": (("desc_act", "act_order"), bool),
    "is_marlin_format": (("is_marlin_format",), bool),
    "pack_dtype": (("pack_dtype",), str),
    "dynamic": (("dynamic",), dict),
}
# how it was made, or is to be run: the stored values mean the same whatever these are
HARMLESS = {
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "hyb_act"),
    *("model_name_or_path", "model_file_base_name", "meta", "lm_head", "version", "provider", "autoround_version"),
    *("dataset", "tokenizer", "nsamples", "seqlen", "model_seqlen", "batch_size", "pad_token_id", "seed", "iters"),
    *("cache_block_outputs", "cache_examples_on_gpu", "modules_in_block_to_quantize", "block_name_to_quantize"),
    *("module_name_preceding_first_block", "modules_to_not_convert", "use_cuda_fp16", "use_exllama", "exllama_config"),
    *("disable_exllama", "max_input_length", "backend", "parallel_packing", "lr", "minmax_lr", "amp", "scale_dtype"),
    *("enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage", "gradient_accumulate_steps"),
    *("to_quant_block_names", "offload_to_disk", "offload_to_disk_path"),
}


@dataclass(frozen=True)
class GptqConfig:
    """How all quantised linears of a checkpoint are stored."""

    bits: int
    group_size: int  # input channels; -1: all
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"

    @classmethod
    def from_dict(cls, data: dict) -> "GptqConfig":
        """Read today's keys or older spellings.

        Raises EoraLabError on a method or format that is not GPTQ's, on a value of another type, and on keys that
        contradict each other or may change what the values mean.
        """
        said = stated(data)
        bits, group_size = said.get("bits"), said.get("group_size")
        if bits not in BITS:
            raise EoraLabError(f"bits must be one of 2, 3, 4 and 8, not {bits}")
        if group_size is None or (group_size < 1 and group_size != -1):
            raise EoraLabError(f"group_size must be a positive number or -1, not {group_size}")
        return cls(**{key: said[key] for key in said if key in FIELDS})

    def to_dict(self) -> dict:
        """For both JSON files. Older loaders know checkpoint_format and quant_method, newer ones format and method."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": False,
            "quant_method": "gptq",
            "method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"eora_lab:{metadata.version('eora-lab')}"]},
        }

    def __str__(self) -> str:
        kind = f"{self.checkpoint_format}, {self.bits} bits, groups of {self.group_size}"
        refused = not self.sym and self.checkpoint_format == "gptq"
        hint = " (GPTQModel takes asymmetric grids in format gptq_v2 only)" if refused else ""
        return f"{kind}, sym={self.sym}, desc_act={self.desc_act}{hint}"


def unquantised(left: Iterable[str], quantised: Collection[str]) -> dict:
    """The keys that say which linears stayed dense; none where all are quantised.

    dynamic, which GPTQModel, vLLM and SGLang read, matches names from their beginning. It names the whole module where
    nothing below is quantised, as vLLM has other names there: its qkv_proj is q_proj, k_proj and v_proj.
    modules_in_block_to_quantize is for optimum, by which transformers loads; it takes names by their end.
    """
    parents = {name[:dot] for name in quantised for dot in range(len(name)) if name[dot] == "."}
    patterns: dict[str, dict] = {}
    for name in left:
        above = [name[:dot] for dot in range(len(name)) if name[dot] == "." and name[:dot] not in parents]
        patterns[f"-:{re.escape(above[0])}[.]" if above else f"-:{re.escape(name)}$"] = {}
    return {"dynamic": patterns, "modules_in_block_to_quantize": [sorted(quantised)]} if patterns else {}


FIELDS = tuple(GptqConfig.__dataclass_fields__)


def stated(data: dict) -> dict[str, Any]:
    """What one file says, by the names of `SPELLINGS`; what it leaves out is missing. Raises EoraLabError."""
    found: dict[str, Any] = {}
    for name, (spellings, kind) in SPELLINGS.items():
        for key in spellings:
            if data.get(key) is None:
                continue
            value = data[key]
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise EoraLabError(f"{key} must be {WORDS.get(kind, 'an object')}, not {value!r}")
            value = value.lower() if isinstance(value, str) else value
            if found.setdefault(name, value) != value:
                raise EoraLabError(f"{key} is {value!r}, but {spellings[0]} {found[name]!r}: correct the wrong one")
    method, stored_as = found.get("method", "gptq"), found.get("checkpoint_format", "gptq")
    stored_as = "marlin" if found.get("is_marlin_format") else stored_as
    if method != "gptq":
        raise EoraLabError(f"quant_method {method!r} is not read, only gptq")
    if stored_as not in FORMATS:
        raise EoraLabError(f"checkpoint_format {stored_as!r} is not read, only gptq and gptq_v2")
    if found.get("pack_dtype", "int32") != "int32":
        raise EoraLabError(f"pack_dtype {found['pack_dtype']!r} is not read, only int32")
    if any(settings and not key.startswith("-:") for key, settings in found.get("dynamic", {}).items()):
        raise EoraLabError("layers with settings of their own (dynamic) are not read")
    known = HARMLESS.union(*(spellings for spellings, _ in SPELLINGS.values()))
    for key, value in data.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise EoraLabError(
                f"{key} ({value!r}) is not known here, and may change what the values mean: delete it if it does not"
            )
    return found
