"""Compile a Triton kernel for a GPU that is not here and read its machine code: registers, spills, instructions.

`cuobjdump` and `nvdisasm` come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eora_lab.layer.triton_kernels.configs import Config
from eora_lab.layer.triton_kernels.decode import decode_kernel, down_kernel
from eora_lab.layer.triton_kernels.prefill import dense_kernel, prefill_kernel
from eora_lab.layer.triton_kernels.ptx import PLANES

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
KERNELS = {
    "decode": decode_kernel,
    "down": down_kernel,
    "prefill": prefill_kernel,
    "dense": dense_kernel,
}
INTEGERS = {"M", "N", "K", "KP", "NP", "R", "blocks", "chunks", "chunk", "counters", "stride_xm", "stride_wn"}


@dataclass(frozen=True)
class Report:
    """What the compiler made. loop: instructions of the main loop, all warps alike, for `weights` weights a thread."""

    registers: int
    spills: int  # instructions that touch local memory
    shared: int  # bytes
    tensor_core: int  # instructions
    loop: Counter
    weights: float

    @property
    def per_weight(self) -> float:
        return sum(self.loop.values()) / self.weights


def compile_kernel(
    name: str, config: Config, capability: int, *, bits: int, group: int, dtype: str = "fp16",
    scales: str = "fp16", offsets: str = "fp16", even_k: bool = True, bias: bool = False,
) -> Report:  # fmt: skip
    """Compile a kernel of `KERNELS` as `launch` would on an aligned layer. dtype, scales, offsets: Triton's names."""
    kernel = KERNELS[name]
    constants = {
        "BITS": bits, "GROUP": group, "HAS_BIAS": bias, "EVEN_K": even_k, "SPLIT_K": config.split_k,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": config.block_r, "PDL": config.pdl,
    }  # fmt: skip
    if name == "down":
        constants["GROUP"] = group or 128
    pointers = {
        "q_ptr": "i16", "tiles_ptr": "i32", "scales_ptr": scales, "offsets_ptr": offsets,
        "sums_ptr": "fp32", "partial_ptr": "fp32", "counters_ptr": "i32",
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
        code = disassemble("nvdisasm", "-c", cubin.name)
    everything = count(code)
    weights = 16 * PLANES[bits] * config.block_n / (32 * config.num_warps)  # a round of the main loop
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(n for op, n in everything.items() if op in {"LDL", "STL"}),
        shared=compiled.metadata.shared,
        tensor_core=sum(n for op, n in everything.items() if op.endswith("MMA")),
        loop=main_loop(code),
        weights=weights,
    )


def disassemble(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def count(code: str) -> Counter:
    return Counter(op.split(".")[0] for op in INSTRUCTION.findall(code))


def main_loop(code: str) -> Counter:
    """Instructions of the longest innermost loop that holds a tensor-core instruction.

    A loop is a backward branch; one that holds another whole loop is not innermost.
    """
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"^(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        match = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], end) < end:
            loops.append((labels[match[1]], end))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [count("\n".join(lines[start : end + 1])) for start, end in innermost]
    bodies = [body for body in bodies if any(op.endswith("MMA") for op in body)]
    return max(bodies, key=lambda body: sum(body.values()), default=Counter())
