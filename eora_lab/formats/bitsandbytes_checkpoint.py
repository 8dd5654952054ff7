"""bitsandbytes checkpoints, as transformers saves them: NF4 and FP4 (arXiv 2305.14314), and INT8 (arXiv 2208.07339).

4 bits: the weight, row after row, in blocks of `blocksize` that share a scale
weight                        uint8, two codes a byte, the first in its upper half
weight.quant_map              float32 (16,), what each code stands for
weight.absmax                 float32 (blocks,), scales; or codes of them, uint8, "double quantisation":
weight.nested_quant_map       float32 (256,) and
weight.nested_absmax          float32, one for `nested_blocksize` scales: scale = map[code] * nested_absmax + offset
weight.quant_state.bitsandbytes__nf4 (or fp4)  JSON in bytes, with the sizes and the offset

8 bits: W^ = weight * SCB / 127
weight         int8 (out, in)
SCB            float32 (out,)
weight_format  uint8, 0

In 8 bits activations are quantised too when the model runs, but for outliers, which is not modelled here.
"""

import json

import torch
from jaxtyping import Float
from torch import Tensor

from eora_lab.compress import CodebookWeight, Compressed, DenseWeight, GridWeight
from eora_lab.compress.packing import unpack
from eora_lab.errors import EoraLabError
from eora_lab.formats.quantised_folder import DAMAGED, QuantisedFolder
from eora_lab.formats.said import NOT_MODELLED, Said

STATE = "weight.quant_state.bitsandbytes__"
HARMLESS = {
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "llm_int8_skip_modules"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_threshold", "_load_in_4bit", "_load_in_8bit"),
}


class BitsAndBytesCheckpoint(QuantisedFolder):
    """The quantised linears of a bitsandbytes folder."""

    format = "bitsandbytes"

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return f"bitsandbytes {self.kind.upper()}" + (NOT_MODELLED if self.kind == "int8" else "")

    def configure(self) -> None:
        """Read quantization_config."""
        said = Said(self.said)
        said.one_of("quant_method", "bitsandbytes")
        four, eight = said.get("load_in_4bit", bool, False), said.get("load_in_8bit", bool, False)
        if four == eight:
            raise EoraLabError("one of load_in_4bit and load_in_8bit must be true")
        kind = said.one_of("bnb_4bit_quant_type", "nf4", "fp4", default="fp4")
        said.one_of("llm_int8_has_fp16_weight", False)
        said.done(HARMLESS)
        self.kind = kind if four else "int8"
        if four:
            more = ("weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", f"{STATE}{kind}")
            self.tensors = ("weight.absmax", "weight", *more)  # type: ignore[misc]
        else:
            self.tensors = ("SCB", "weight", "weight_format")  # type: ignore[misc]

    def read(self, name: str) -> Compressed:
        """W^ of one linear; in full, where a block of it goes on in the next row."""
        return self._read_int8(name) if self.kind == "int8" else self._read_4bit(name)

    def _read_int8(self, name: str) -> GridWeight:
        """The library multiplies by SCB and then by 1 / 127, which can differ in the last bit of float32."""
        if self.has(f"{name}.weight_format") and self.tensor(f"{name}.weight_format").any():
            raise EoraLabError(f"{self.path}: {name}.weight_format is not 0, rows one after the other: save it again")
        codes = self.take(f"{name}.weight", torch.int8, shape=(None, None))
        scales = self.take(f"{name}.SCB", torch.float32, shape=(len(codes),))[:, None] / 127
        codes = (codes.view(torch.uint8) ^ 128).contiguous()  # from -128 .. 127 to 0 .. 255
        return GridWeight(codes, scales, torch.full_like(scales, 128, dtype=torch.uint8), 8)

    def _read_4bit(self, name: str) -> CodebookWeight | DenseWeight:
        state = self._state(name)
        (out_features, in_features), blocksize = state["shape"], state["blocksize"]
        count = out_features * in_features
        packed = self.tensor(f"{name}.weight").contiguous().flatten().view(torch.uint8)
        if 2 * len(packed) not in (count, count + 1):
            raise EoraLabError(f"{self.path}: {name}.weight has {2 * len(packed)} codes, not {count}: {DAMAGED}")
        levels = self.take(f"{name}.weight.quant_map", torch.float32, shape=(16,))
        scales = self._scales(name, state, -(-count // blocksize))
        codes = unpack((packed << 4 | packed >> 4)[None], 4, count)  # the first in the lower half
        if in_features % blocksize == 0:
            return CodebookWeight(codes.view(out_features, -1), levels, scales.view(out_features, -1), 4, blocksize)
        values = levels[codes[0].int()] * scales.repeat_interleave(blocksize)[:count]
        return DenseWeight(values.view(out_features, in_features))

    def _scales(self, name: str, state: dict, blocks: int) -> Float[Tensor, " blocks"]:
        if "nested_blocksize" not in state:
            return self.take(f"{name}.weight.absmax", torch.float32, shape=(blocks,))
        codes, size = self.take(f"{name}.weight.absmax", torch.uint8, shape=(blocks,)), state["nested_blocksize"]
        levels = self.take(f"{name}.weight.nested_quant_map", torch.float32, shape=(256,))
        scales = self.take(f"{name}.weight.nested_absmax", torch.float32, shape=(-(-blocks // size),))
        return levels[codes.int()] * scales.repeat_interleave(size)[:blocks] + state["nested_offset"]

    def _state(self, name: str) -> dict:
        """Sizes of a linear. Raises EoraLabError where they are none."""
        key = f"{name}.{STATE}{self.kind}"
        try:
            state = json.loads(bytes(self.take(key, torch.uint8, shape=(None,)).tolist()))
            sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
            good = len(state["shape"]) == 2 and all(type(size) is int and size > 0 for size in sizes)
            if "nested_blocksize" in state:
                good = good and isinstance(state["nested_offset"], float)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EoraLabError(f"{self.path}: {key} is damaged ({error}): copy or download it again") from error
        if not good:
            raise EoraLabError(f"{self.path}: {key} has sizes that are none: copy or download it again")
        return state
