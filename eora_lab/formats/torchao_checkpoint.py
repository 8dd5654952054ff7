"""torchao checkpoints, as transformers saves them: what a weight is stands in the metadata of its file, in JSON.

_weight_qdata       int8 or float8_e4m3fn (out, in), one value each whatever its bits
_weight_scale       (out, groups)
_weight_zero_point  int8 (out, groups), or missing

W^ = (qdata - zero_point) * scale. Layouts that are packed for a kernel are not read.
"""

import json
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from eora_lab.compress import CodebookWeight, GridWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats.floats import fp8_weight
from eora_lab.formats.quantised_folder import DAMAGED, FLOATS, QuantisedFolder
from eora_lab.formats.said import Said

BITS = {f"int{bits}": bits for bits in range(1, 9)}
KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
# how activations are quantised when the model runs, which is not modelled here, and what computes
HARMLESS = ("act_quant_kwargs", "activation_quantization", "reduce_range", "mm_config", "kernel_preference", "dtype")


class TorchaoCheckpoint(QuantisedFolder):
    """The quantised linears of a torchao folder."""

    format = "torchao"
    tensors = ("_weight_qdata", "_weight_scale", "_weight_zero_point")

    @property
    def base(self) -> str:
        """How the weights were compressed, in short: the first word of torchao's settings."""
        kind = (self.said.get("quant_type") or {}).get("default") or {}
        return f"torchao {str(kind.get('_type', '')).removesuffix('Config')}".strip()

    def configure(self) -> None:
        """Read quantization_config. What every weight is stands beside it."""
        said = Said(self.said)
        said.one_of("quant_method", "torchao")
        said.done(("quant_type", "modules_to_not_convert", "quant_type_kwargs"))

    def read(self, name: str) -> GridWeight | CodebookWeight:
        """W^ of one linear."""
        kind, said = self._said_of(name)
        block = said.get("block_size", list)
        floating = kind == "Float8Tensor"
        values = self.take(f"{name}._weight_qdata", torch.float8_e4m3fn if floating else torch.int8, shape=(None, None))
        target = said.part("target_dtype")
        bits = 8 if target is None else BITS[target.one_of("_data", *BITS)]
        said.done(HARMLESS)
        if block is None or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
            raise EoraLabError(f"{self.path}: block_size of {name} must be two positive numbers, not {block}")
        shape = tuple(-(-size // step) for size, step in zip(values.shape, block, strict=True))
        scales = self._of_blocks(f"{name}._weight_scale", shape, *FLOATS)
        if floating:
            return fp8_weight(values, scales, (block[0], block[1]))
        zeros = torch.zeros(shape, dtype=torch.int8)
        if self.has(key := f"{name}._weight_zero_point"):
            zeros = self._of_blocks(key, shape, torch.int8)
        half = 2 ** (bits - 1)
        if not -half <= min(int(values.min()), int(zeros.min())) <= max(int(values.max()), int(zeros.max())) < half:
            raise EoraLabError(f"{self.path}: {name}._weight_qdata or its zero points are beyond {bits} bits")
        scales = scales if scales.dtype == torch.float16 else scales.float()
        codes, zeros = ((one.int() + half).to(torch.uint8) for one in (values, zeros))
        scales, zeros = (one.repeat_interleave(block[0], 0)[: len(codes)].contiguous() for one in (scales, zeros))
        return GridWeight(codes, scales, zeros, bits, group_size=min(block[1], codes.shape[1]))

    def _of_blocks(self, key: str, shape: Sequence[int], *dtypes: torch.dtype) -> Shaped[Tensor, "out groups"]:
        """A tensor with one number for every block, in whatever shape it is stored."""
        found = self.take(key, *dtypes)
        if found.numel() != shape[0] * shape[1]:
            raise EoraLabError(f"{self.path}: {key} has {found.numel()} numbers, not {shape[0] * shape[1]}: {DAMAGED}")
        return found.reshape(*shape)

    def _said_of(self, name: str) -> tuple[str, Said]:
        """The kind of a weight, and its attributes."""
        text = self.metadata(f"{name}._weight_qdata").get(f"{name}.weight", "{}")
        try:
            said = Said(json.loads(text), f"{name}: ")
        except ValueError as error:
            raise EoraLabError(f"{self.path}: the metadata of {name} are no JSON: copy or download it again") from error
        kind = said.one_of("_type", *KINDS)
        if kind is None:
            raise EoraLabError(f"{self.path}: the metadata of its file do not say what {name} is: save it again")
        return kind, said.part("_data") or Said({})
