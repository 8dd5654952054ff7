"""Checkpoint folders of quantisers that need a GPU or a large package, laid down as those lay them down."""

import json
from collections.abc import Callable

import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compress import GridWeight, rtn
from eora_lab.compress.format_grids import NF4_LEVELS
from eora_lab.compress.packing import pack
from eora_lab.formats.gptq import write_linear
from tests.tiny import tiny_model

Linear = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # weight -> tensors, by what follows the linear's name
Q_PROJ = "model.layers.0.self_attn.q_proj"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40], "fmt": "e4m3"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"]}
INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INTEGERS}}}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2}}}
INTX = {"block_size": [1, 32], "target_dtype": {"_type": "torch.dtype", "_data": "int4"}}
INTX = {"_type": "IntxUnpackedToInt8Tensor", "_data": INTX}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def quantise(folder, linear: Linear, about: dict, model=None, at: str = "_proj.weight") -> dict:
    """Save a model with other tensors in place of some weights; the tensors of the file."""
    model = model or tiny_model("llama")
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = key.removesuffix(".weight")
        own = linear(tensor) if key.endswith(at) else None
        tensors |= {key: tensor} if own is None else {f"{name}.{kind}": one for kind, one in own.items()}
    return rewrite(folder, tensors, about)


def rewrite(folder, tensors: dict, about: dict) -> dict:
    """Other tensors and another quantization_config."""
    metadata = {"format": "pt"}
    if about.get("quant_method") == "torchao":
        names = [key.removesuffix("._weight_qdata") for key in tensors if key.endswith("._weight_qdata")]
        metadata |= {f"{name}.weight": json.dumps(INTX) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return tensors


def matrices(linear: Linear) -> Linear:
    """Of a mixture: the same for all matrices but those of vocabulary and routers."""
    return lambda weight: linear(weight) if len(weight) not in (97, 3) and weight.ndim == 2 else None


def mixtral() -> torch.nn.Module:
    """Two blocks with three experts each, for `matrices`."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**sizes)).eval()


def fp8(weight: torch.Tensor, rows: int = 24, columns: int = 40) -> dict[str, torch.Tensor]:
    """E4M3 in blocks, the last of which are smaller."""
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        scales[i, j] = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].abs().amax() / 448
    whole = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": (weight / whole).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def awq(weight: torch.Tensor, group_size: int = 32) -> dict[str, torch.Tensor]:
    """As AutoAWQ's WQLinear_GEMM packs: column 8 w + ORDER[i] of a row of codes at bit 4 i of word w."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).flatten(1)

    def words(matrix: torch.Tensor) -> torch.Tensor:
        columns = matrix.T.to(torch.int64).unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return (columns << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T.contiguous()}


def nvfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As ModelOpt's NVFP4QTensor: whole = max|w| / (6 * 448), scales in E4M3, the first code in the lower half."""
    whole = weight.abs().amax() / (6 * 448)
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / (6 * whole)).to(torch.float8_e4m3fn)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / (scales.float() * whole)[..., None]
    codes = ((scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)).to(torch.uint8).flatten(1)
    own = {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scales, "weight_scale_2": whole}
    return own | {"input_scale": torch.tensor(0.1)}


def gpt_oss() -> torch.nn.Module:
    """Two blocks with three experts each."""
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16
    )
    config.num_key_value_heads, config.num_local_experts, config.num_experts_per_tok = 2, 3, 2
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def mxfp4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts (E, in, out) as gpt-oss has them."""
    groups = weight.transpose(1, 2).contiguous().unflatten(2, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / exponents.exp2()[..., None]
    codes = ((scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)).to(torch.uint8)
    return {"_blocks": pack(codes.flatten(0, 2), 4).view(*codes.shape[:3], 16), "_scales": (exponents + 127).byte()}


def save_gpt_oss(folder) -> dict[str, torch.Tensor]:
    gpt_oss().save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        experts = key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        tensors |= {f"{key}{kind}": one for kind, one in mxfp4(tensor).items()} if experts else {key: tensor}
    return rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def four_bits(weight: torch.Tensor) -> GridWeight:
    """Groups of 32 with the zero point in the middle."""
    settings = {"bits": 4, "group_size": 32, "sym": True, "zero_point": "integer", "scale_dtype": "float16"}
    return rtn(weight, InputStatistics(weight.shape[1]), **settings)


def gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As the writer of this package does."""
    return write_linear(four_bits(weight), "gptq", "")


def packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As compressed-tensors packs whole numbers."""
    made = four_bits(weight)
    codes = pack_to_int32(made.codes.to(torch.int8) - 8, 4)
    return {"weight_packed": codes, "weight_scale": made.scales, "weight_shape": torch.tensor(weight.shape)}


def letters(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def hqq(weight, bits=4, size=32, axis=1, dtype=torch.float16, as_float=False) -> dict[str, torch.Tensor]:
    """Codes and their settings. Word w of a column has the codes of rows w, w + n, w + 2 n, ..., the first highest."""
    groups = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    zero = (-low / scale.float()).to(dtype)
    codes = (groups / scale.float() + zero.float()).round().clamp(0, 2**bits - 1).int()
    several = 10 if bits == 3 else 8 // bits
    rows = -(-len(codes) // several)
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.int32)
    for row in range(len(codes)):
        packed[row % rows] |= codes[row] << bits * (several - 1 - row // rows)
    packed = packed if bits == 3 else packed.to(torch.uint8)
    numbers = {"axis": axis, "group_size": size, "nbits": bits}
    flags = {"quant_scale": 0, "quant_zero": 0, "view_as_float": as_float, "channel_wise": 1, "offload_meta": 0}
    texts = {"packing": PACKINGS[bits], "compute_dtype": str(dtype), "unpack_view_dtype": str(packed.dtype)}
    return (
        {"W_q": packed.view(dtype) if as_float else packed, "scale": scale, "zero": zero}
        | {"shape": torch.tensor(weight.shape)}
        | {key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()}
        | {key: torch.tensor(int(value), dtype=torch.uint8) for key, value in flags.items()}
        | {key: letters(value) for key, value in texts.items()}
        | {"true": ((codes.to(dtype) - zero) * scale).reshape(weight.shape)}
    )


def nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As bitsandbytes does, without double quantisation."""
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1)
    codes = (blocks[..., None] / scales[:, None, None] - NF4_LEVELS).abs().argmin(-1).to(torch.uint8).flatten()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": scales,
        "weight.quant_map": NF4_LEVELS.clone(),
        "weight.quant_state.bitsandbytes__nf4": letters(json.dumps(state)),
    }


def torchao(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes of 4 bits, one a byte; `rewrite` says what they are."""
    made = four_bits(weight)
    zeros = torch.zeros_like(made.scales, dtype=torch.int8)
    return {
        "_weight_qdata": made.codes.to(torch.int8) - 8,
        "_weight_scale": made.scales.float(),
        "_weight_zero_point": zeros,
    }


FOLDERS = {  # name -> (linear, quantization_config); that of gpt-oss is `save_gpt_oss`
    "gptq": (gptq, GPTQ),
    "awq": (awq, AWQ),
    "compressed-tensors": (packed, PACKED),
    "fp8": (fp8, FP8),
    "modelopt": (nvfp4, NVFP4),
    "bitsandbytes": (nf4, NF4),
    "torchao": (torchao, TORCHAO),
    "hqq": (lambda weight: {key: one for key, one in hqq(weight).items() if key != "true"}, HQQ),
}
