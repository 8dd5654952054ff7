"""Compile a Triton kernel for a GPU that is not here and read its machine code: registers, spills, instructions.

`cuobjdump` and `nvdisasm` come with Triton.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.decode import decode_kernel
from eora_lab.layer.triton_kernels.down import down_kernel
from eora_lab.layer.triton_kernels.prefill import dense_kernel, prefill_kernel
from eora_lab.layer.triton_kernels.ptx import PLANES
from kernels.machine_code import Instruction, count, main_loop, read_code, tensor_core

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KERNELS = {
    "decode": decode_kernel,
    "down": down_kernel,
    "prefill": prefill_kernel,
    "dense": dense_kernel,
}
INTEGERS = {
    "M",
    "N",
    "K",
    "KP",
    "NP",
    "R",
    "blocks",
    "chunks",
    "chunk",
    "counters",
    "stride_xm",
    "stride_wn",
    "row_tiles",
    "paths",
    "tile_rank",
    "top",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made. loop: of the main loop, all warps alike, for `weights` weights a thread."""

    registers: int
    spills: int  # instructions that touch local memory
    shared: int  # bytes
    tensor_core: int  # instructions
    loop: list[Instruction]
    weights: float

    @property
    def per_weight(self) -> float:
        """Instructions of the main loop for a weight."""
        return len(self.loop) / self.weights


def compile_kernel(
    name: str, config: Config, capability: int, *, bits: int, group: int, dtype: str = "fp16",
    offsets: str = "fp32", even_k: bool = True, bias: bool = False, paths: str = "one",
) -> Report:  # fmt: skip
    """Compile a kernel of `KERNELS` as `launch` would on an aligned layer. dtype, offsets: Triton's names."""
    kernel = KERNELS[name]
    constants = {
        "BITS": bits, "GROUP": group, "HAS_BIAS": bias, "EVEN_K": even_k, "SPLIT_K": config.split_k,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": config.block_r, "STAGES": config.num_stages,
        "PDL": config.pdl, "PATHS": paths,
    }  # fmt: skip
    if name == "down":
        constants["GROUP"] = group or 128
    pointers = {
        "q_ptr": "i16", "tiles_ptr": "i32", "scales_ptr": "fp32", "offsets_ptr": offsets,
        "sums_ptr": "fp32", "partial_ptr": "fp32", "counters_ptr": "i32", "ids_ptr": "i32", "slots_ptr": "i32",
        "xa_ptr": dtype if name == "prefill" else "fp32",
    }  # fmt: skip
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else "i32" if n in INTEGERS else "*" + pointers.get(n, dtype) for n in names
    }
    aligned = [
        n for n in names if n.endswith("_ptr") or n in {"N", "K", "KP", "NP", "R", "chunk", "stride_xm", "stride_wn"}
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "launch_pdl": config.pdl}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = disassemble("cuobjdump", "-res-usage", cubin.name)
        code, labels = read_code(disassemble("nvdisasm", "-c", "-hex", cubin.name))
    everything = count(code)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=everything["LDL"] + everything["STL"],
        shared=compiled.metadata.shared,
        tensor_core=tensor_core(code),
        loop=main_loop(code, labels),
        weights=16 * PLANES[bits] * config.block_n / (32 * config.num_warps),  # a round of the main loop
    )


def disassemble(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
