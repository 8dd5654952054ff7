"""Were the files of a model read whole? transformers passes over tensors that an architecture has no place for, and
says so in a log only: a wrong config.json, or weights without their scales, would give wrong numbers without a word.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from eora_lab.environment import free_memory, step
from eora_lab.errors import EoraLabError, one_line

Headers = dict[str, tuple[str, tuple[int, ...]]]  # name -> type and shape, as safetensors files tell them

# What may be left unread, beside what the class in transformers lists itself: matched against "name (shape)"
HARMLESS = {
    r"\.inv_freq \(": "frequencies of rotary positions: they follow from config.json",
    r"\.(attn|attention|self_attn)\.(masked_bias|causal_mask) \(": "the causal mask, once stored as a tensor",
    r"\.(attn|attention|self_attn)\.bias \(1, 1, \d+, \d+\)": "the same",
    r"(^|\.)position_ids \(": "0, 1, 2, ...",
    r"(^|\.)(mtp|nextn)(_\w+)?\.": "heads that guess several tokens ahead: the next token does not depend on them",
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|embed_vision|embed_audio)\.":
        "towers for pictures and sound, where the class reads text only",
}  # fmt: skip
WHOLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = re.compile(r"(scales?|scale_inv|zeros?|zero_point|qweight|g_idx|absmax|quant_map|SCB|weight_packed)(\.|$)")


def read_headers(files: Iterable[Path]) -> Headers:
    """Names, types and shapes of all tensors; no weight is read. Raises what safetensors raises on a damaged file."""
    import safetensors

    found: Headers = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                found[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def check_files(folder: Path, name: str) -> Headers:
    """The headers of the files that transformers reads.

    Every weight file must be there, be safetensors, and have a sound header. Nothing is unpickled to find out.
    """
    if not any(folder.glob("*.safetensors*")):
        pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
        found = f"only {', '.join(pickles[:3])}" if pickles else "none"
        raise EoraLabError(
            f"{name} has no safetensors weights (found {found}). Pickle weights (.bin, .pt) are refused, for they can "
            "run code when read. To convert them, in a sandbox and only if you trust them: AutoModelForCausalLM."
            "from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True), and copy the tokenizer files"
        )
    listed = _listed(folder, name)
    headers: dict[str, Headers] = {}
    for file in sorted(listed | {path.name for path in folder.glob("*.safetensors")}):
        if not file.endswith(".safetensors"):
            raise EoraLabError(f"{name} lists {file} among its weights: only safetensors files are read")
        if not (folder / file).is_file():
            raise EoraLabError(f"{name} lacks the weight file {file}: copy or download it again")
        try:
            headers[file] = read_headers([folder / file])
        except Exception as error:
            raise EoraLabError(
                f"{name} has a damaged weight file {file} ({one_line(error)}): copy or download it again"
            ) from error
    merged: Headers = {}
    for file in [WHOLE_FILE] if WHOLE_FILE in headers else sorted(listed):
        if twice := merged.keys() & headers[file].keys():
            raise EoraLabError(f"{name} holds {_first(twice)} in two of its weight files: copy or download it again")
        merged |= headers[file]
    return merged


def check_fits(name: str, headers: Headers, dtype: torch.dtype) -> None:
    """Raise EoraLabError when weights that are not in this dtype, and so are copied, take more memory than is free.

    Those that are stay in their files, mapped into memory, and the system can take their pages back.
    """
    copied: Counter[str] = Counter()
    for kind, shape in headers.values():
        if kind in FLOATS and FLOATS[kind] != dtype:
            copied[kind] += math.prod(shape) * dtype.itemsize
    needs, free = copied.total(), free_memory()
    if free is not None and needs > free:
        own = str(FLOATS[copied.most_common(1)[0][0]]).removeprefix("torch.")
        asked = str(dtype).removeprefix("torch.")
        raise EoraLabError(
            f"{name} takes {needs / 1e9:.1f} GB in {asked}, and {free / 1e9:.1f} GB are free: load it in {own} "
            f"(--dtype {own}, in Python dtype=), as its files are, so that it is read from them as it is needed"
        )


def _listed(folder: Path, name: str) -> set[str]:
    """The weight files that an index names."""
    files = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files |= set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EoraLabError(f"{name} has a damaged {index.name}: copy or download it again") from error
    return files


def quantised(headers: Headers) -> list[str]:
    """The tensors that only a quantised model has."""
    return [
        name
        for name, (dtype, shape) in headers.items()
        if (dtype not in FLOATS or QUANTISED.search(name)) and not _harmless(f"{name} {shape}")
    ]


def check_whole(name: str, model: nn.Module, found: dict, headers: Headers) -> None:
    """Raise EoraLabError unless tensors and places fit one to one, and weights are floating-point numbers.

    found: what transformers tells about loading (`output_loading_info`).
    """
    places = model.state_dict()
    _check_types(name, model, headers)
    wrong = f"the weights of {name} do not fit its config.json: the files"
    for problem, keys in (("lack", found["missing_keys"]), ("have another shape for", found["mismatched_keys"])):
        if keys:
            raise EoraLabError(f"{wrong} {problem} {_first(key if isinstance(key, str) else key[0] for key in keys)}")
    shapes = {key: shape for key, (_, shape) in headers.items()}
    surplus = [key for key in found["unexpected_keys"] if not _harmless(f"{key} {_of(key, shapes) or ()}")]
    if surplus:
        raise EoraLabError(
            f"{wrong} hold {_first(surplus)}, for which {type(model).__name__} has no place: "
            f"{_advice(surplus, model)}, or take these tensors out of the files if they are no part of the model"
        )
    for copy, source in model.get_expanded_tied_weights_keys().items():  # type: ignore[operator]
        # transformers ties them if they are equal
        if {copy, source} <= places.keys() and places[copy].data_ptr() != places[source].data_ptr():
            raise EoraLabError(
                f"{wrong} hold a {copy} that differs from {source}, though tie_word_embeddings makes them one: set it "
                "to false in config.json, or take the tensor out of the files"
            )


@step("checks")
def check_finite(model: nn.Module) -> None:
    """Raise EoraLabError, with the name of the tensor, when a weight is NaN or Inf."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel() and weight.device.type != "meta":
            low, high = torch.aminmax(weight.detach())  # both are NaN where any is; no copy is made
            if not (low.isfinite() and high.isfinite()):
                narrow = weight.dtype.itemsize < 4
                kind, wider = str(weight.dtype).removeprefix("torch."), "load it in float32, or " if narrow else ""
                raise EoraLabError(f"{name} holds NaN or Inf in {kind}: {wider}copy or download the model again")


def _check_types(name: str, model: nn.Module, headers: Headers) -> None:
    """Integers and 8-bit floats stand for other numbers: they need scales, which the model has no place for."""
    places: dict[str, torch.Tensor] = model.state_dict()
    known = model._keys_to_ignore_on_load_unexpected or ()
    for key, (dtype, shape) in headers.items():
        if dtype in FLOATS or _harmless(f"{key} {shape}") or any(re.search(pattern, key) for pattern in known):  # type: ignore[union-attr, arg-type]
            continue
        place = _of(key, places)
        index = place is None and dtype == "I64"  # such as a table of tokens: no weight is quantised to 64 bits
        if not index and (place is None or place.is_floating_point()):
            raise EoraLabError(
                f"{name} holds {key} as {dtype}: weights of that type are quantised, and config.json does not say how; "
                "give the full-precision model"
            )


def _of(key: str, known: dict):
    """What is known of a tensor, whose name may have got or lost the prefix of the base model."""
    names = (name for name in known if name.endswith(f".{key}") or key.endswith(f".{name}"))
    return known[key] if key in known else known.get(next(names, ""))


def _harmless(tensor: str) -> bool:
    return any(re.search(pattern, tensor) for pattern in HARMLESS)


def _first(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _advice(surplus: list[str], model: nn.Module) -> str:
    """What to do about tensors without a place."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[operator, union-attr]
    blocks = [int(found[1]) for key in surplus if (found := re.search(r"\.(\d+)\.", key))]
    if count is not None and len(blocks) == len(surplus) and min(blocks) >= count:
        return f"num_hidden_layers is {count}, and the files hold {max(blocks) + 1} blocks: correct it"
    if any(QUANTISED.search(key) for key in surplus):
        return "they belong to quantised weights: give the full-precision model"
    if all(key.endswith(".bias") for key in surplus):
        return "the model has biases: say so in config.json (such as attention_bias), or give its true model_type"
    return "give the config.json that belongs to these weights"
