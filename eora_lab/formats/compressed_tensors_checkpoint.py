"""compressed-tensors checkpoints, which llm-compressor writes and vLLM and SGLang serve.

pack-quantized        weight_packed int32 (out, words), rows of codes as a little-endian stream of bits; weight_shape;
                      weight_zero_point int32 (words of out, groups), in the same way from top to bottom
int-, float-, naive-  weight int8 or float8_e4m3fn (out, in); weight_zero_point int8
nvfp4-, mxfp4-pack-   weight_packed uint8 (out, in / 2), E2M1; weight_scale in E4M3, divided by weight_global_scale, or
                      powers of two
weight_scale          one for the tensor, a row, a group of channels, or a block; multiplied with (code - zero point)

Activations may be quantised when the model runs, which is not modelled here: W^ is what the weights alone say.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from eora_lab.compress import CodebookWeight, Compressed, GridWeight
from eora_lab.compress.packing import unpack
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.compressed_tensors_config import Scheme, read_schemes, scheme_of
from eora_lab.formats.floats import fp4_weight, fp8_weight
from eora_lab.formats.quantised_folder import DAMAGED, FLOATS, QuantisedFolder


class CompressedTensorsCheckpoint(QuantisedFolder):
    """The quantised linears of a compressed-tensors folder."""

    format = "compressed-tensors"
    tensors = (
        *("weight_scale", "weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "input_g_idx"),
        *("output_scale", "output_zero_point"),
    )

    @property
    def base(self) -> str:
        """How the weights were compressed, in short."""
        return " and ".join(sorted({str(scheme) for scheme in self.schemes}))

    def configure(self) -> None:
        """Read quantization_config."""
        self.schemes = read_schemes(self.said)

    def read(self, name: str) -> Compressed:
        """W^ of one linear."""
        with naming(str(self.path)):
            scheme = scheme_of(name, self.schemes, self.said.get("ignore") or ())
        if not scheme.floating:
            return self._integers(name, scheme)
        return self._fp4(name, scheme) if scheme.bits == 4 else self._fp8(name, scheme)

    def _fp4(self, name: str, scheme: Scheme) -> CodebookWeight:
        packed = self.take(f"{name}.weight_packed", torch.uint8, shape=(None, None))
        if 2 * packed.shape[1] % scheme.group_size:
            raise EoraLabError(f"{self.path}: {name}.weight_packed does not hold whole groups: {DAMAGED}")
        key, shape = f"{name}.weight_scale", (len(packed), 2 * packed.shape[1] // scheme.group_size)
        if scheme.strategy == "group":
            return fp4_weight(packed, self.exponents(key, shape), scheme.group_size)
        scales = self.take(key, torch.float8_e4m3fn, shape=shape)
        whole = self.take(f"{name}.weight_global_scale", *FLOATS, shape=(1,)).float()
        if not whole.all():
            raise EoraLabError(f"{self.path}: {name}.weight_global_scale is 0: {DAMAGED}")
        return fp4_weight(packed, scales, scheme.group_size, whole)

    def _fp8(self, name: str, scheme: Scheme) -> CodebookWeight:
        values = self.take(f"{name}.weight", torch.float8_e4m3fn, shape=(None, None))
        scales, block = self._scales(name, scheme, *values.shape)
        return fp8_weight(values, scales, block)

    def _integers(self, name: str, scheme: Scheme) -> GridWeight:
        middle = 2 ** (scheme.bits - 1)
        if scheme.layout == "pack-quantized":
            codes = self._packed(name, scheme.bits)
        else:
            codes = self._from_signed(
                f"{name}.weight", scheme.bits, self.take(f"{name}.weight", torch.int8, shape=(None, None))
            )
        scales, (rows, group_size) = self._scales(name, scheme, *codes.shape)
        zeros = torch.full_like(scales, middle, dtype=torch.uint8)
        key = f"{name}.weight_zero_point"
        if not scheme.symmetric and scheme.layout == "pack-quantized" and scheme.strategy != "tensor":
            words = self.take(key, torch.int32, shape=(-(-len(codes) * scheme.bits // 32), scales.shape[1]))
            zeros = unpack(words.T.contiguous().view(torch.uint8), scheme.bits, len(codes)).T.contiguous()
        elif not scheme.symmetric:
            zeros = self._from_signed(key, scheme.bits, self.take(key, torch.int8).reshape(scales.shape))
        elif self.has(key) and self.tensor(key).any():
            raise EoraLabError(f"{self.path}: {key} is there, though config.json says symmetric: {DAMAGED}")
        scales = scales if scales.dtype == torch.float16 else scales.float()
        if rows > 1:
            scales, zeros = (one.expand(len(codes), -1).contiguous() for one in (scales, zeros))
        return GridWeight(
            codes,
            scales,
            zeros,
            scheme.bits,
            group_size=group_size,
            g_idx=self._index(name, group_size, scheme.ordered, codes),
        )

    def _packed(self, name: str, bits: int) -> UInt8[Tensor, "out in"]:
        shape = self.take(f"{name}.weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
        words = self.take(f"{name}.weight_packed", torch.int32, shape=(shape[0], -(-shape[1] * bits // 32)))
        return unpack(words.contiguous().view(torch.uint8), bits, shape[1]).contiguous()

    def _from_signed(
        self, key: str, bits: int, values: Shaped[Tensor, "rows columns"]
    ) -> UInt8[Tensor, "rows columns"]:
        """Codes that begin at 0."""
        codes = values.int() + 2 ** (bits - 1)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
            raise EoraLabError(f"{self.path}: {key} has numbers beyond {bits} bits: {DAMAGED}")
        return codes.to(torch.uint8)

    def _scales(
        self, name: str, scheme: Scheme, out_features: int, in_features: int
    ) -> tuple[Shaped[Tensor, "blocks_out blocks_in"], tuple[int, int]]:
        """Scales as a matrix, and the rows and columns that share one."""
        key = f"{name}.weight_scale"
        if scheme.strategy == "tensor":
            return self.take(key, *FLOATS, shape=(1,) if len(self.shape(key)) else ()).reshape(1, 1), (
                out_features,
                in_features,
            )
        if scheme.strategy == "group" and in_features % scheme.group_size:
            raise EoraLabError(
                f"{self.path}: {name} has {in_features} channels, no whole groups of {scheme.group_size}"
            )
        rows, columns = scheme.block if scheme.strategy == "block" else (1, scheme.group_size or in_features)
        shape = (-(-out_features // rows), -(-in_features // columns))
        return self.take(key, *FLOATS, shape=shape), (rows, columns)

    def _index(self, name: str, group_size: int, ordered: bool, codes: Tensor) -> Tensor | None:
        """The group of every channel, where groups are not neighbours (actorder "group", of older versions)."""
        key = f"{name}.weight_g_idx"
        g_idx = self.take(key, torch.int32, torch.int64, shape=(codes.shape[1],)).int() if self.has(key) else None
        if g_idx is None or (g_idx == -1).all():  # what a module begins with: nothing was put in order
            if ordered:
                raise EoraLabError(f"{self.path}: {key} says no order of channels, though actorder in config.json does")
            return None
        neighbours = torch.arange(codes.shape[1], dtype=torch.int32) // group_size
        if not torch.equal(g_idx.sort().values, neighbours):
            raise EoraLabError(f"{self.path}: {key} has groups of other sizes than {group_size}: {DAMAGED}")
        if torch.equal(g_idx, neighbours):
            return None
        if not ordered:
            raise EoraLabError(
                f"{self.path}: {key} has groups that are no neighbours, though actorder in config.json is not group: "
                "some loaders ignore it then; correct the wrong one"
            )
        return g_idx
