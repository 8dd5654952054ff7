"""What llama.cpp itself makes of an adapter in a GGUF file: what it refuses, and what it loads and then does not apply.

The rules were read in llama.cpp of October 2026 (src/llama-adapter.cpp, llama-graph.cpp, and the graphs of the models).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eora_lab.errors import EoraLabError, one_line
from eora_lab.formats.gguf_idle import is_idle
from eora_lab.formats.loaders.given import some

HALF = re.compile(r"(.+)\.lora_([ab])")


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says, and its tensors.

    tensors: name -> (type, shape as in numpy).
    """

    said: dict[str, object]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path | str) -> GgufFile:
    """Keys and tensors of a GGUF file. Raises EoraLabError when it is none, or damaged."""
    return _header(_reader(path))


def check_gguf_adapter(path: Path | str, base: Path | str | None = None) -> list[str]:
    """Everything that llama.cpp would refuse, abort on, not apply or scale otherwise than once for all.

    base: the GGUF file that it is for; without it, what depends on the base is not checked.
    Raises EoraLabError when a file cannot be read.
    """
    reader = _reader(path)
    adapter = _header(reader)
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown = []
    for name, (_, shape) in adapter.tensors.items():
        if match := HALF.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = shape
        elif not name.endswith("_norm.weight"):
            unknown.append(name)
    found = [*_file(adapter, pairs, unknown), *_values(reader)]
    if base is not None:
        found += _on_base(adapter, pairs, read_header(base))
    return found


def _file(adapter: GgufFile, pairs: dict, unknown: list[str]) -> Iterator[str]:
    """What is wrong with it on any base."""
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (said := adapter.said.get(key)) != wanted:
            yield f"refuses it: {key} is {said!r}, not {wanted!r}"
    if unknown:
        yield f"refuses {some(unknown)}, which is no lora_a or lora_b"
    if not pairs:
        yield "there is no lora_a and lora_b in it"
    if halved := [name for name, halves in pairs.items() if len(halves) == 1]:
        yield f"refuses it: one of lora_a and lora_b is missing of {some(halved)}"
    full = {name: halves for name, halves in pairs.items() if len(halves) == 2}
    if other := [
        name for name, halves in full.items() if halves["a"][-2:-1] != halves["b"][-1:] and not _is_embd(name)
    ]:
        a, b = full[other[0]]["a"], full[other[0]]["b"]
        yield f"refuses {some(other)}: lora_a is {_size(a)}, lora_b {_size(b)}"
    alpha = adapter.said.get("adapter.lora.alpha") or 0
    ranks = {halves["b"][-1] for halves in full.values()}
    if isinstance(alpha, int | float) and alpha and len(ranks) > 1:
        yield (
            f"divides its alpha of {alpha:g} by each pair's rank: it scales by {alpha / max(ranks):.4g} to "
            f"{alpha / min(ranks):.4g}; leave adapter.lora.alpha out, and every rank is scaled by 1"
        )
    if adapter.said.get("adapter.alora.invocation_tokens"):
        yield "applies it from certain tokens on only (adapter.alora.invocation_tokens)"


def _on_base(adapter: GgufFile, pairs: dict, base: GgufFile) -> Iterator[str]:
    """What does not go with that base."""
    ours, theirs = (str(file.said.get("general.architecture")) for file in (adapter, base))
    if ours != theirs:
        yield f"refuses it: general.architecture is {ours}, that of the base {theirs}"
    if strangers := [name for name in pairs if name not in base.tensors]:
        yield f"refuses it: the base has no tensor {some(strangers)}"
    known = {name: halves for name, halves in pairs.items() if name in base.tensors and len(halves) == 2}
    if other := [name for name, halves in known.items() if not _fits(name, halves, base.tensors[name][1])]:
        a, b = known[other[0]]["a"], known[other[0]]["b"]
        size = _size(base.tensors[other[0]][1])
        yield f"refuses {some(other)}: lora_a is {_size(a)} and lora_b {_size(b)}, the tensor {size}"
    if idle := [name for name in known if is_idle(theirs, name)]:
        yield f"loads {some(idle)} and does not apply it: the graph of {theirs} multiplies that tensor without adapters"
    abort = [
        name
        for name in known
        if re.fullmatch(r"blk\.\d+\.ffn_(up|gate|down)\.weight", name)
        and base.tensors[name][0] == "NVFP4"
        and name.replace(".weight", ".scale") in base.tensors
    ]
    if abort:
        yield f"aborts at {some(abort)}: no adapter on a dense feed-forward layer in NVFP4; leave it out"


def _fits(name: str, halves: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether two halves are those of a tensor (..., out, in)."""
    a, b = halves["a"], halves["b"]
    if min(len(a), len(b), len(shape)) < 2:
        return False
    if _is_embd(name):  # the halves of an embedding change places
        return (b[-2], a[-2]) == (shape[-1], shape[-2])
    return (*a[:-2], a[-1]) == (*shape[:-2], shape[-1]) and b[:-1] == shape[:-1]


def _is_embd(name: str) -> bool:
    return name.endswith("token_embd.weight")


def _values(reader) -> Iterator[str]:
    """NaN and Inf in the factors."""
    import gguf

    for tensor in reader.tensors:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            yield f"{tensor.name} is {tensor.tensor_type.name}, which is not read here: write F16, BF16, F32 or Q8_0"
            continue
        if not np.isfinite(values).all():
            yield f"{tensor.name} has NaN or Inf"


def _reader(path: Path | str):
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises whatever it stumbles over in a damaged file
        raise EoraLabError(f"cannot read {path} as a GGUF file: {one_line(error)}") from error


def _header(reader) -> GgufFile:
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {one.name: (one.tensor_type.name, tuple(int(n) for n in reversed(one.shape))) for one in reader.tensors}
    return GgufFile(said, tensors)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
