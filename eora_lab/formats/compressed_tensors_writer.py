"""Checkpoints of compressed-tensors, as vLLM, SGLang and transformers load them: written, with 16-bit activations.

pack-quantized          integers of a `GridWeight` with whole zero points, 2, 4 or 8 bits
    weight_packed       int32 (out, in * bits / 32), a row one little-endian bit stream
    weight_scale        (out, groups), in the type of the model
    weight_zero_point   int32 (out * bits / 32, groups), where grids are asymmetric
    weight_shape        int64 (2,)
nvfp4-pack-quantized    weight_packed uint8 (out, in / 2), the first of two codes in the low bits;
                        weight_scale E4M3 (out, in / 16), weight_global_scale float32 (1,)
mxfp4-pack-quantized    weight_packed alike, weight_scale uint8 (out, in / 32), the exponent + 127
float-quantized         weight E4M3 (out, in), weight_scale float32 (out, 1)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from eora_lab.compress import CodebookWeight, GridWeight
from eora_lab.compress.format_grids import E2M1
from eora_lab.compress.packing import pack
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.dense import compressed_linears, dense_tensors, write_model_folder
from eora_lab.formats.gptq import whole_codes
from eora_lab.layer.linear import compensated
from eora_lab.model.experts import fuse

BITS = (2, 4, 8)  # others are packed in several ways by the versions of the library
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FP4 = {  # group size, type of the scales, whether the tensor has one
    (16, E4M3, True): ("nvfp4-pack-quantized", {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
    (32, E8M0, False): ("mxfp4-pack-quantized", {"strategy": "group", "scale_dtype": "torch.uint8"}),
}
DENSE = "use format dense"


@dataclass(frozen=True)
class Scheme:
    """How the linears of a checkpoint are stored: by which format, and what its configuration says of weights."""

    format: str
    weights: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, left: list[str]) -> dict:
        """For config.json. left: linears that are not quantised."""
        weights = {"symmetric": True, "dynamic": False} | self.weights
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"format": self.format}},
            "ignore": left,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def __str__(self) -> str:
        size = self.weights.get("group_size")
        groups = f", groups of {size}" if size else f", one scale a {self.weights['strategy']}"
        return f"{self.format}, {self.weights['num_bits']} bits{groups}, without the low-rank path"


def write_compressed_tensors(
    folder: Path | str, model: nn.Module, tokenizer, dtype: torch.dtype = torch.float16
) -> Scheme:
    """Write a compressed model as a checkpoint of compressed-tensors, without its low-rank path. Returns its scheme.

    dtype: of the tensors that are not quantised, and of the scales of integers.
    Raises EoraLabError when the model is not compressed, on compressed experts, on weights that the format cannot say,
    and where one scheme does not fit all, with what to do.
    """
    weights, modules = compressed_linears(model, "checkpoint of compressed-tensors"), compensated(model)
    tensors = dense_tensors(model, dtype)
    fuse(model, tensors)
    whole_rows = all(weight.shape[1] <= getattr(weight, "group_size", 0) for weight in weights.values())
    symmetric = all(isinstance(weight, GridWeight) and in_the_middle(weight) for weight in weights.values())
    shared: dict[str, float] = {}  # module -> the smallest scale of a tensor in it
    for name, weight in weights.items():
        if isinstance(weight, CodebookWeight) and weight.tensor_scale is not None:
            shared[parent(name)] = min(weight.tensor_scale.item(), shared.get(parent(name), torch.inf))
    schemes: dict[str, tuple[Scheme, str]] = {}
    for name, weight in weights.items():
        with naming(name):
            if modules[name].transposed:
                raise EoraLabError(f"the original is no Linear, as compressed-tensors wants it: {DENSE}")
            if isinstance(weight, GridWeight):
                scheme, parts = integers(weight, dtype, symmetric, whole_rows)
            elif isinstance(weight, CodebookWeight):
                scheme, parts = floats(weight, shared.get(parent(name)))
            else:
                raise EoraLabError(f"it is stored as {weight.kind}, which compressed-tensors cannot say: {DENSE}")
        schemes.setdefault(str(scheme), (scheme, name))
        tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
    if len(schemes) > 1:
        (one, first), (other, second) = list(schemes.values())[:2]
        raise EoraLabError(f"{first} is {one}, and {second} {other}, but one scheme holds for all: {DENSE}")
    ((scheme, _),) = schemes.values()
    left = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    write_model_folder(folder, model, tokenizer, tensors, dtype, scheme.to_dict(left))
    return scheme


def in_the_middle(weight: GridWeight) -> bool:
    """Whether all zero points are those of symmetric grids."""
    return weight.offsets.dtype == torch.uint8 and bool((weight.offsets == 2 ** (weight.bits - 1)).all())


def integers(
    weight: GridWeight, dtype: torch.dtype, symmetric: bool, whole_rows: bool
) -> tuple[Scheme, dict[str, Tensor]]:
    """pack-quantized: the scheme and the tensors of one linear. Raises EoraLabError on a grid that it cannot say.

    symmetric: all zero points are in the middle, and not written. whole_rows: no linear has more than one group a row.
    """
    bits, (_, in_features) = weight.bits, weight.shape
    if bits not in BITS:
        raise EoraLabError(f"{bits} bits are written as 2, 4 or 8 only: compress again with those, or {DENSE}")
    if weight.offsets.dtype != torch.uint8:
        raise EoraLabError("grids without a whole zero point: compress again with --zero-point integer")
    if weight.g_idx is not None or in_features % weight.group_size:
        raise EoraLabError(f"its groups are no neighbours of equal number: {DENSE}")
    if not torch.equal(weight.scales.to(dtype).float(), weight.scales.float()):
        kind = str(dtype).removeprefix("torch.")
        raise EoraLabError(
            f"scales that are no {kind} numbers: compress again with --scale-dtype float16, or export with another "
            "--dtype (float32 holds all)"
        )
    of = {"strategy": "channel"} if whole_rows else {"strategy": "group", "group_size": weight.group_size}
    scheme = Scheme("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": symmetric} | of)
    zeros = {} if symmetric else {"weight_zero_point": words(weight.offsets.T.contiguous(), bits).T.contiguous()}
    return scheme, zeros | {
        "weight_packed": words(whole_codes(weight), bits),
        "weight_scale": weight.scales.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Each row as a stream of codes, filled up to whole words of 32 bits."""
    packed = pack(codes, bits)
    return F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def parent(name: str) -> str:
    """The module that a linear is part of."""
    return name.rpartition(".")[0]


def floats(weight: CodebookWeight, tensor_scale: float | None) -> tuple[Scheme, dict[str, Tensor]]:
    """NVFP4, MXFP4 and FP8: the scheme and the tensors of one linear. Raises EoraLabError on other codebooks.

    tensor_scale: to be had in place of its own, where it has one. Servers fuse q, k and v, and gate and up, and take
        the largest of theirs for all, so that all must be the same.
    """
    levels, scales, (_, in_features) = weight.levels, weight.scales, weight.shape
    kind = (weight.group_size, scales.dtype, weight.tensor_scale is not None)
    if kind[0] >= in_features and torch.equal(levels.to(E4M3).float(), levels) and weight.bits == 8 and not kind[2]:
        values = levels.to(E4M3)[weight.codes.int()]
        scheme = Scheme("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
        return scheme, {"weight": values, "weight_scale": scales.float()}
    same = levels[:, None] == E2M1
    if kind not in FP4 or not same.any(1).all():
        raise EoraLabError(f"compressed-tensors has no such codebook with such groups and scales: {DENSE}")
    if in_features % weight.group_size:
        raise EoraLabError(f"groups of {weight.group_size} do not divide {in_features} channels: {DENSE}")
    codes = same.to(torch.uint8).argmax(1).to(torch.uint8)[weight.codes.int()]
    name, about = FP4[kind]
    scheme = Scheme(name, {"num_bits": 4, "type": "float", "group_size": weight.group_size} | about)
    parts = {"weight_packed": pack(codes, 4)}
    if weight.tensor_scale is None or tensor_scale is None:
        return scheme, parts | {"weight_scale": scales.view(torch.uint8)}
    moved = (scales.float() * (tensor_scale / weight.tensor_scale)).to(E4M3)
    if not torch.equal(moved.float() / tensor_scale, scales.float() / weight.tensor_scale):
        raise EoraLabError(f"its scales fit in no tensor scale that its neighbours have as well: {DENSE}")
    return scheme, parts | {"weight_scale": moved, "weight_global_scale": torch.tensor([tensor_scale])}
