"""Compile `fused.cu`; needs nvcc, no GPU: `python -m kernels.cuda.build` prints registers and spills."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eora_lab.errors import EoraLabError

SOURCE = Path(__file__).with_name("fused.cu")
TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}


@dataclass(frozen=True)
class Built:
    """A cubin, and what ptxas says of its kernel `fused`."""

    cubin: bytes
    registers: int
    spilled_bytes: int


def find_nvcc() -> str | None:
    """On the path, or in a wheel of NVIDIA's."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which("nvcc") or next((str(path) for path in sorted(wheels.glob("**/bin/nvcc"))), None)


def build(bits: int, group: int, dtype: str, capability: int) -> Built:
    """Raises EoraLabError where there is no nvcc, or when it fails."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise EoraLabError("no nvcc found; install the CUDA toolkit or the wheel nvidia-cuda-nvcc")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "fused.cubin"
        options = [f"-DBITS={bits}", f"-DGROUP={group}", f"-DT={TYPES[dtype]}", f"-arch=sm_{capability}", "-O3"]
        command = [nvcc, "-cubin", "-Xptxas", "-v", *options, "-o", str(cubin), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EoraLabError(f"nvcc failed: {done.stderr.strip().splitlines()[-1]}")
        report = done.stderr.split("entry function 'fused'")[1].split("entry function")[0]
        spills = re.findall(r"(\d+) bytes spill", report)
        return Built(cubin.read_bytes(), int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spills)))


def main() -> None:
    try:
        for capability in (80, 90):
            for bits in (4, 3):
                for dtype in TYPES:
                    built = build(bits, 128, dtype, capability)
                    usage = f"{built.registers} registers, {built.spilled_bytes} bytes spilled"
                    print(f"sm_{capability} {bits} bits {dtype}: {usage}")
    except EoraLabError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
