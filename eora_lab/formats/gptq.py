"""GPTQ checkpoints, one linear: its tensors, bit for bit, to and from a `GridWeight`.

qweight  int32 (in * bits / 32, out)      a column is a row of codes
qzeros   int32 (groups, out * bits / 32)  a row is a group's zero points
scales   float16 (groups, out)
g_idx    int32 (in,)                      the group of every input channel

W^ = (q - z) * s[g_idx]. Codes form one little-endian stream of bits, cut into 32-bit words, so that with 3 bits a code
can lie across two words. Format "gptq" stores z - 1, "gptq_v2" stores z.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from eora_lab.compress import GridWeight
from eora_lab.compress.grid_weight import zero_points
from eora_lab.compress.packing import pack, unpack
from eora_lab.errors import EoraLabError
from eora_lab.formats.gptq_config import BITS, GptqConfig

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Each row as a stream of codes, in 32-bit words; columns * bits must fill whole words."""
    return pack(codes, bits).view(torch.int32)


def from_words(words: Int32[Tensor, "rows words"], bits: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of `to_words`."""
    columns = words.shape[1] * 32 // bits
    return unpack(words.contiguous().view(torch.uint8), bits, columns)


def read_linear(tensors: dict[str, Tensor], config: GptqConfig, name: str) -> GridWeight:
    """Read one linear from its tensors (the keys are TENSORS).

    Raises EoraLabError, with the tensor's name, when one is missing, of another type or shape, or out of range.
    """
    bits, damaged = config.bits, "the checkpoint is damaged, or its configuration is that of another"
    for key in TENSORS:
        if key not in tensors and (key != "g_idx" or config.desc_act):
            raise EoraLabError(f"the checkpoint lacks {name}.{key}: copy or download it again")
        if key == "scales" and tensors[key].dtype not in SCALES:
            raise EoraLabError(f"{name}.scales is {tensors[key].dtype}, not float16: {damaged}")
        if key in tensors and key != "scales" and tensors[key].dtype != torch.int32:
            raise EoraLabError(f"{name}.{key} is {tensors[key].dtype}, not int32: {damaged}")
    qweight, qzeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
    if qweight.ndim != 2 or qweight.shape[0] * 32 % bits:
        raise EoraLabError(f"{name}.qweight {tuple(qweight.shape)} does not hold {bits}-bit codes: {damaged}")
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group_size = in_features if config.group_size == -1 else config.group_size
    groups = -(-in_features // group_size)
    neighbours = torch.arange(in_features, dtype=torch.int32) // group_size
    g_idx = tensors.get("g_idx", neighbours)
    for key, tensor, shape in (
        ("qzeros", qzeros, (groups, out_features * bits // 32)),
        ("scales", scales, (groups, out_features)),
        ("g_idx", g_idx, (in_features,)),
    ):
        if tensor.shape != shape:
            raise EoraLabError(f"{name}.{key} is {tuple(tensor.shape)}, not {shape}: {damaged}")
    if not torch.isfinite(scales).all():
        raise EoraLabError(f"{name}.scales has NaN or Inf: {damaged}")
    offsets = read_zeros(qzeros, config)
    check_zeros(offsets, config, name)
    return GridWeight(
        codes=from_words(qweight.T, bits),
        scales=(scales if scales.dtype == torch.float16 else scales.float()).T.contiguous(),
        offsets=offsets.T.contiguous(),
        bits=bits,
        group_size=min(group_size, in_features),
        g_idx=read_index(g_idx, neighbours, config, name),
    )


def read_index(
    g_idx: Int32[Tensor, " in"], neighbours: Int32[Tensor, " in"], config: GptqConfig, name: str
) -> Int32[Tensor, " in"] | None:
    """The group of every input channel; None: neighbours share one. Raises EoraLabError on what no quantiser makes.

    Without desc_act, a g_idx of zeros stands for "no index": the tools that write it pack groups of neighbours, and the
    kernels for such files (exllama, marlin) never read the field. That is certain, for a layer whose channels all are
    of the first group would have no use for the grids of the others. With desc_act the order is lost.
    """
    groups = int(neighbours[-1]) + 1
    if torch.equal(g_idx, neighbours):
        return None
    if groups > 1 and not g_idx.any():
        if not config.desc_act:
            return None
        raise EoraLabError(
            f"{name}.g_idx is all zeros though desc_act is true and there are {groups} groups: the order of the "
            "channels is lost; quantise again, or set desc_act to false if it was made without"
        )
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise EoraLabError(
            f"{name}.g_idx names groups beyond the {groups} there are: the checkpoint is damaged, or its configuration "
            "is that of another"
        )
    if not torch.equal(g_idx.bincount(minlength=groups), neighbours.bincount()):
        raise EoraLabError(
            f"{name}.g_idx has groups of other sizes than group_size {config.group_size}: correct group_size in the "
            "configuration, or copy or download the checkpoint again"
        )
    if not config.desc_act:
        raise EoraLabError(
            f"{name}.g_idx has groups that are no neighbours, though desc_act is false: some loaders ignore it then; "
            "set desc_act to true in the configuration if it was made so"
        )
    return g_idx


def check_zeros(offsets: UInt8[Tensor, "groups out"], config: GptqConfig, name: str) -> None:
    """Raise EoraLabError where zero points contradict `sym`, whose grids have theirs in the middle."""
    middle = 2 ** (config.bits - 1)
    if not config.sym or (offsets == middle).all():
        return
    other = "gptq_v2" if config.checkpoint_format == "gptq" else "gptq"
    shift = 1 if config.checkpoint_format == "gptq" else -1
    if (offsets == middle + shift).all():
        raise EoraLabError(
            f"{name}: every zero point is {middle + shift}, and {middle} with sym true: checkpoint_format is not "
            f"{config.checkpoint_format}, set it to {other} in the configuration (checkpoint_format: {other})"
        )
    raise EoraLabError(
        f"{name}.qzeros has zero points other than {middle}, which sym true rules out: set sym to false in the "
        "configuration if the grids are asymmetric, else copy or download the checkpoint again"
    )


def read_zeros(qzeros: Int32[Tensor, "groups words"], config: GptqConfig) -> UInt8[Tensor, "groups out"]:
    """Zero points. Format "gptq" adds 1.

    A zero point of 0 does not fit that format. GPTQModel, which writes it all the same, takes 1 from whole words, where
    it borrows from the neighbours; adding to whole words undoes that. With 3 bits it works on codes, and so do we.
    """
    if config.checkpoint_format == "gptq_v2":
        return from_words(qzeros, config.bits)
    if config.bits == 3:
        return (from_words(qzeros, 3) + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, config.bits))
    return from_words(qzeros + ones, config.bits)


def write_linear(weight: GridWeight, checkpoint_format: str, name: str) -> dict[str, Tensor]:
    """The tensors of one linear. Raises EoraLabError on a grid that the format cannot say, with what to do."""
    bits, (out_features, in_features) = weight.bits, weight.shape
    again = "compress again with --zero-point integer --scale-dtype float16"
    if bits not in BITS:
        raise EoraLabError(f"{name} has {bits} bits, and GPTQ checkpoints 2, 3, 4 or 8: compress again with those")
    if weight.offsets.dtype != torch.uint8:
        raise EoraLabError(f"{name} has grids without a whole zero point, which no GPTQ checkpoint can hold: {again}")
    if not torch.equal(weight.scales.half().float(), weight.scales.float()):
        raise EoraLabError(f"{name} has scales that are no float16 numbers, as GPTQ checkpoints want them: {again}")
    if in_features * bits % 32 or out_features * bits % 32:
        raise EoraLabError(f"{name}: {out_features} x {in_features} codes of {bits} bits do not fill 32-bit words")
    if checkpoint_format == "gptq" and (weight.offsets == 0).any():
        raise EoraLabError(f"{name} has zero points of 0, which format gptq cannot hold: use gptq_v2")
    g_idx = weight.g_idx
    if g_idx is None:
        g_idx = torch.arange(in_features, dtype=torch.int32) // weight.group_size
    stored = weight.offsets - (1 if checkpoint_format == "gptq" else 0)
    return {
        "qweight": to_words(whole_codes(weight), bits).T.contiguous(),
        "qzeros": to_words(stored.T.contiguous(), bits),
        "scales": weight.scales.half().T.contiguous(),
        "g_idx": g_idx,
    }


def whole_codes(weight: GridWeight) -> UInt8[Tensor, "out in"]:
    """The codes of a weight whose zero points are whole, a pruned weight's being the zero point of its group."""
    group = torch.arange(weight.shape[1]) // weight.group_size if weight.g_idx is None else weight.g_idx.long()
    # from the dense weight, where this division is exact
    codes = weight.dense() / weight.scales.float()[:, group] + zero_points(weight.scales, weight.offsets)[:, group]
    return codes.round().nan_to_num().to(torch.uint8)  # NaN: a scale of 0
