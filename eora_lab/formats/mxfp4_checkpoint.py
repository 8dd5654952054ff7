"""MXFP4 checkpoints of gpt-oss, `quant_method: mxfp4`: the experts of a layer in two tensors for each of their linears.

..._blocks  uint8 (experts, out, in / 32, 16)  32 codes of E2M1, two a byte, the first in its lower half
..._scales  uint8 (experts, out, in / 32)      powers of two, E8M0
"""

import torch

from eora_lab.compress import CodebookWeight
from eora_lab.formats.floats import fp4_weight
from eora_lab.formats.quantised_folder import QuantisedFolder
from eora_lab.formats.said import Said


class Mxfp4Checkpoint(QuantisedFolder):
    """The linears of experts of a gpt-oss folder, one by one: `...experts.3.gate_up_proj`."""

    format = "MXFP4"
    tensors = ("_blocks", "_scales")

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return "MXFP4"

    def configure(self) -> None:
        """Read quantization_config."""
        said = Said(self.said)
        said.one_of("quant_method", "mxfp4")
        said.done(("modules_to_not_convert",))

    def find(self) -> list[str]:
        """One name an expert and linear."""
        names = []
        for key in filter(lambda key: key.endswith("_blocks"), self.keys_held):
            module, leaf = key.removesuffix("_blocks").rpartition(".")[::2]
            names += [f"{module}.{index}.{leaf}" for index in range(self.shape(key)[0])]
        return names

    def keys_of(self, name: str) -> list[str]:
        """The two tensors, which it shares with the other experts."""
        module, _, leaf = name.rsplit(".", 2)
        return [f"{module}.{leaf}{kind}" for kind in self.tensors]

    def read(self, name: str) -> CodebookWeight:
        """W^ of one linear of one expert."""
        blocks, scales = self.keys_of(name)
        index = int(name.rsplit(".", 2)[1])
        codes = self.take(blocks, torch.uint8, shape=(None, None, 16), index=index)
        exponents = self.exponents(scales, codes.shape[:2], index)
        return fp4_weight(codes.flatten(1), exponents, 32)
