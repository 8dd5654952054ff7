"""AWQ checkpoints (arXiv 2306.00978) in the layout "gemm", which AutoAWQ and GPTQModel write.

qweight  int32 (in, out / 8)      a row is an input channel; 8 codes a word, from the lowest bits on as in ORDER
qzeros   int32 (groups, out / 8)  zero points, laid down alike
scales   float16 (groups, out)

W^ = (q - z) * s.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from eora_lab.compress import GridWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats.gptq import from_words
from eora_lab.formats.gptq_config import HARMLESS
from eora_lab.formats.quantised_folder import FLOATS, QuantisedFolder
from eora_lab.formats.said import Said

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the codes of eight neighbouring channels are
KEPT = {"do_fuse", "fuse_max_seq_len", "modules_to_fuse", "quantization_config"}


class AwqCheckpoint(QuantisedFolder):
    """The quantised linears of an AWQ checkpoint folder."""

    format = "AWQ"
    tensors = ("qweight", "qzeros", "scales")

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return f"AWQ 4-bit g{self.group_size}"

    def configure(self) -> None:
        """Read quantization_config."""
        said = Said(self.said)
        for key in ("quant_method", "method"):
            said.one_of(key, "awq")
        for key in ("version", "format", "checkpoint_format"):
            said.one_of(key, "gemm")
        for key in ("bits", "w_bit"):
            said.one_of(key, 4)
        said.one_of("zero_point", True)  # no code for grids without is known to have been written
        said.one_of("desc_act", False)
        said.one_of("pack_dtype", "int32")
        said.get("sym", bool)  # its zero points are written all the same
        sizes = {said.get(key, int) for key in ("group_size", "q_group_size")} - {None}
        if len(sizes) != 1 or min(sizes) < -1 or 0 in sizes:
            raise EoraLabError(f"group_size must be one positive number or -1, not {sorted(sizes) or None}")
        (self.group_size,) = sizes
        said.done(HARMLESS | KEPT)

    def read(self, name: str) -> GridWeight:
        """W^ of one linear."""
        codes = in_order(self.take(f"{name}.qweight", torch.int32, shape=(None, None)))  # (in, out)
        in_features, out_features = codes.shape
        group_size = in_features if self.group_size == -1 else min(self.group_size, in_features)
        groups = -(-in_features // group_size)
        zeros = in_order(self.take(f"{name}.qzeros", torch.int32, shape=(groups, out_features // 8)))
        scales = self.take(f"{name}.scales", *FLOATS, shape=(groups, out_features))
        scales = scales if scales.dtype == torch.float16 else scales.float()
        return GridWeight(codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous(), 4, group_size=group_size)


def in_order(words: Int32[Tensor, "rows words"]) -> UInt8[Tensor, "rows columns"]:
    """Codes of 4 bits in the order of their channels."""
    return from_words(words, 4).unflatten(1, (-1, 8))[..., ORDER].flatten(1)
