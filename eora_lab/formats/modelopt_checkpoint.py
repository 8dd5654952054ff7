"""ModelOpt checkpoints, NVIDIA's, with weights in NVFP4 or FP8.

NVFP4  weight uint8 (out, in / 2), two codes of E2M1 a byte; weight_scale float8_e4m3fn (out, in / 16), and
       weight_scale_2 float32: W^ = level * (weight_scale * weight_scale_2)
FP8    weight float8_e4m3fn (out, in); weight_scale float32, one number

Settings are in config.json (`quant_method: modelopt`), or in hf_quant_config.json. Activations and the cache are
quantised when the model runs, which is not modelled here: W^ is what the weights alone say.
"""

from pathlib import Path

import torch

from eora_lab.compress import CodebookWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats.checkpoint import json_object, quantization
from eora_lab.formats.floats import fp4_weight, fp8_weight
from eora_lab.formats.quantised_folder import QuantisedFolder
from eora_lab.formats.said import NOT_MODELLED, Said

BESIDE = "hf_quant_config.json"
HARMLESS = (
    *("kv_cache_quant_algo", "kv_cache_scheme", "exclude_modules", "ignore", "producer", "config_groups"),
    "quant_method",
)


def is_modelopt(path: Path) -> bool:
    """Whether a folder says that ModelOpt quantised it."""
    if not path.is_dir():
        return False
    said = str(quantization(path).get("quant_method", "")).lower()
    return said.startswith("modelopt") or (not said and (path / BESIDE).exists())


class ModelOptCheckpoint(QuantisedFolder):
    """The quantised linears of a ModelOpt folder."""

    format = "ModelOpt"
    tensors = ("weight_scale", "weight", "weight_scale_2", "input_scale")

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return f"ModelOpt {self.algorithm}{NOT_MODELLED}"

    def configure(self) -> None:
        """Read quantization_config, or else the file beside it."""
        said = Said(
            self.said or json_object(self.path / BESIDE).get("quantization"), "" if self.said else "quantization."
        )
        self.algorithm = said.one_of("quant_algo", "NVFP4", "FP8")
        if self.algorithm is None:
            raise EoraLabError("quant_algo must say how the weights are quantised")
        said.one_of("group_size", 16)
        said.one_of("has_zero_point", False)
        said.one_of("pre_quant_scale", False)
        said.done(HARMLESS)

    def read(self, name: str) -> CodebookWeight:
        """W^ of one linear."""
        weight, scale = f"{name}.weight", f"{name}.weight_scale"
        if self.algorithm == "FP8":
            values = self.take(weight, torch.float8_e4m3fn, shape=(None, None))
            whole = self.take(scale, torch.float32, shape=(1,) if self.shape(scale) else ())
            return fp8_weight(values, whole.reshape(1, 1), (max(values.shape[0], 1), max(values.shape[1], 1)))
        packed = self.take(weight, torch.uint8, shape=(None, None))
        scales = self.take(scale, torch.float8_e4m3fn, shape=(len(packed), packed.shape[1] // 8))
        key = f"{scale}_2"
        whole = self.take(key, torch.float32, shape=(1,) if self.has(key) and self.shape(key) else ())
        return fp4_weight(packed, self.finite(scale, scales.float() * whole), 16)
