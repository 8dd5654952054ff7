"""HQQ checkpoints (Badri and Shaji 2023, mobiusml.github.io/hqq_blog), as the library hqq and transformers 4 save them.

W_q          codes, packed along their rows: of `rows` rows, those from k * rows / n on are beside the first rows / n
scale, zero  in the type that the library computes in, one a group
shape, axis, group_size, packing, compute_dtype, ...  one small tensor for every setting; texts as their letters

Groups are runs of neighbours along the weight's rows, one after the other (axis 1): codes are (groups, group_size),
scale and zero (groups, 1). With axis 0 they are (group_size, groups) and (1, groups). W^ = (code - zero) * scale.
What the library's own `save_quantized` writes, qmodel.pt, is a pickle, which is not read.
"""

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from eora_lab.compress import Compressed, DenseWeight, HqqWeight
from eora_lab.errors import EoraLabError
from eora_lab.formats.checkpoint import quantised_as
from eora_lab.formats.quantised_folder import DAMAGED, FLOATS, QuantisedFolder
from eora_lab.formats.said import Said

PICKLE = "qmodel.pt"
PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
WORDS = {3: (torch.int32, 10)}  # bits -> type of a word and codes in it, where it is no byte full of them
DTYPES = {str(dtype): dtype for dtype in FLOATS}
# how scales were found, or where they are to lie
HARMLESS = ("nbits", "optimize", "round_zero", "unpack_view_dtype", "encoded_state_dict", "stores_quant_config")


def is_hqq(path: Path) -> bool:
    """Whether a folder says that hqq quantised it."""
    return quantised_as("hqq")(path) or (path / PICKLE).exists()


class HqqCheckpoint(QuantisedFolder):
    """The quantised linears of an HQQ folder."""

    format = "HQQ"
    tensors = (
        *("W_q", "scale", "zero", "shape", "axis", "group_size", "packing", "compute_dtype", "view_as_float"),
        *("channel_wise", "quant_scale", "quant_zero", "offload_meta", *HARMLESS),
    )

    @property
    def base(self) -> str:
        """How the weights were compressed, in short: by the first of them."""
        first = next(iter(self))
        return f"HQQ {self._bits(first)}-bit g{self._number(first, 'group_size')}"

    def configure(self) -> None:
        """Read quantization_config. What every weight is stands beside it."""
        if (self.path / PICKLE).exists() and not any(self.path.glob("*.safetensors")):
            raise EoraLabError(
                f"{PICKLE} is a pickle, which can run any code when it is read: load it with hqq, and save it again "
                "with save_to_safetensors"
            )
        said = Said(self.said)
        said.one_of("quant_method", "hqq")
        said.done(("quant_config", "skip_modules"))

    def read(self, name: str) -> Compressed:
        """W^ of one linear; in full, where its groups are no parts of its rows."""
        for key, known in (("channel_wise", 1), ("quant_scale", 0), ("quant_zero", 0), ("offload_meta", 0)):
            if self.has(f"{name}.{key}") and (value := self._number(name, key)) != known:
                raise EoraLabError(f"{self.path}: {name} has {key} {value}, which is not read, only {known}")
        text = self._text(name, "compute_dtype")
        if (dtype := DTYPES.get(text)) is None:
            raise EoraLabError(f"{self.path}: compute_dtype of {name} is {text!r}, not one of {', '.join(DTYPES)}")
        shape = self.take(f"{name}.shape", torch.int64, shape=(2,)).tolist()
        axis, size, bits = self._number(name, "axis"), self._number(name, "group_size"), self._bits(name)
        count = shape[0] * shape[1]
        if min(*shape, size) < 1 or axis not in (0, 1) or count % size:
            raise EoraLabError(
                f"{self.path}: {name} cannot have shape {shape}, groups of {size} and axis {axis}: {DAMAGED}"
            )
        groups, rows = count // size, size if axis == 0 else count // size
        codes = self._codes(name, bits, dtype)
        if len(codes) - rows not in range(WORDS.get(bits, (None, 1))[1]) or codes.shape[1] * rows != count:
            raise EoraLabError(
                f"{self.path}: {name}.W_q holds {codes.shape[0]} x {codes.shape[1]} codes, not {rows} x "
                f"{count // rows}: {DAMAGED}"
            )
        codes, along = codes[:rows], (groups, 1) if axis == 1 else (1, groups)
        scale, zero = (self.take(f"{name}.{key}", dtype, shape=along) for key in ("scale", "zero"))
        if axis == 1 and shape[1] % size == 0:
            return HqqWeight(codes.reshape(shape), scale.view(shape[0], -1), zero.view(shape[0], -1), bits)
        return DenseWeight(((codes.to(dtype) - zero) * scale).reshape(shape))

    def _codes(self, name: str, bits: int, dtype: torch.dtype) -> UInt8[Tensor, "rows columns"]:
        """All codes, with those that only fill words."""
        word, several = WORDS.get(bits, (torch.uint8, 8 // bits))
        key = f"{name}.W_q"
        if self.has(f"{name}.view_as_float") and self._number(name, "view_as_float"):
            packed = self.tensor(key).contiguous()  # its floats are no numbers
            packed = packed.view(word) if packed.ndim == 2 and packed.dtype == dtype else packed
        else:
            packed = self.take(key, word, shape=(None, None))
        if packed.ndim != 2 or packed.dtype != word:
            raise EoraLabError(f"{self.path}: {key} is no matrix of {dtype}, though view_as_float is 1: {DAMAGED}")
        shifts = [bits * place for place in reversed(range(several))]
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in shifts]).to(torch.uint8)

    def _bits(self, name: str) -> int:
        packing = self._text(name, "packing")
        if packing not in PACKINGS:
            raise EoraLabError(f"{self.path}: packing {packing!r} of {name} is not read, only {', '.join(PACKINGS)}")
        return PACKINGS[packing]

    def _text(self, name: str, key: str) -> str:
        """A setting of a linear that is a text."""
        return bytes(self.take(f"{name}.{key}", torch.uint8, shape=(None,)).tolist()).decode(errors="replace")

    def _number(self, name: str, key: str) -> int:
        """A setting of a linear that is a whole number."""
        return int(self.take(f"{name}.{key}", torch.int32, torch.uint8, shape=()))
