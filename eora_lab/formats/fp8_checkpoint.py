"""FP8 checkpoints as DeepSeek, Qwen and others publish them, `quant_method: fp8` of transformers.

weight            float8_e4m3fn (out, in)
weight_scale_inv  float32, bfloat16 or E8M0 (blocks of out, blocks of in), by which the values are multiplied; the last
                  blocks may be smaller. Without blocks, one number for the tensor

Activations are quantised when the model runs, which is not modelled here: W^ is what the weights alone say.
"""

import torch

from eora_lab.compress import CodebookWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats.floats import fp8_weight
from eora_lab.formats.quantised_folder import FLOATS, QuantisedFolder
from eora_lab.formats.said import NOT_MODELLED, Said


class Fp8Checkpoint(QuantisedFolder):
    """The quantised linears of an FP8 checkpoint folder."""

    format = "FP8"
    tensors = ("weight_scale_inv", "weight", "activation_scale", "input_scale")

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        kind = f"FP8 blocks of {self.block[0]}x{self.block[1]}" if self.block else "FP8, one scale a tensor"
        return kind + NOT_MODELLED

    def configure(self) -> None:
        """Read quantization_config."""
        said = Said(self.said)
        said.one_of("quant_method", "fp8")
        said.one_of("fmt", "e4m3")
        said.one_of("expert_dtype", "fp8")
        said.one_of("scale_fmt", "float", "ue8m0")
        said.one_of("activation_scheme", "dynamic", "static")
        block = said.get("weight_block_size", list)
        if block is not None and (len(block) != 2 or any(type(size) is not int or size < 1 for size in block)):
            raise EoraLabError(f"weight_block_size must be two positive numbers, not {block}")
        self.block = block and (block[0], block[1])
        said.done(("modules_to_not_convert", "ignored_layers", "modules_to_convert"))

    def read(self, name: str) -> CodebookWeight:
        """W^ of one linear."""
        values = self.take(f"{name}.weight", torch.float8_e4m3fn, shape=(None, None))
        block = self.block or (max(values.shape[0], 1), max(values.shape[1], 1))
        blocks = tuple(-(-size // step) for size, step in zip(values.shape, block, strict=True))
        key, dtypes = f"{name}.weight_scale_inv", (*FLOATS, torch.float8_e8m0fnu)
        if self.block:
            scales = self.take(key, *dtypes, shape=blocks)
        elif (scales := self.take(key, *dtypes)).numel() != 1:
            raise EoraLabError(
                f"{self.path}: {key} is {tuple(scales.shape)}, though config.json names no weight_block_size"
            )
        return fp8_weight(values, scales.reshape(blocks), block)
