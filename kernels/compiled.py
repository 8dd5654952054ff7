"""What Triton makes of the shipped kernels on sm_80, sm_90 and sm_100, without a GPU: `python -m kernels.compiled`."""

import argparse
from dataclasses import dataclass, field

from tqdm import tqdm

from eora_lab.layer.triton_kernels.configs import Config, rule

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H200, B200
PLAIN = {"bits": 4, "group": 128}


@dataclass(frozen=True)
class Job:
    """A kernel as `rule` configures it for rows of a 4096 -> 14336 layer. settings: of `sass.compile_kernel`."""

    kernel: str
    rows: int
    capability: int
    settings: dict = field(default_factory=dict)

    @property
    def config(self) -> Config:
        bits = (PLAIN | self.settings)["bits"]
        return rule(self.rows, 14336, 4096, bits, PROCESSORS[self.capability], self.capability // 10)

    @property
    def name(self) -> str:
        settings = " ".join(f"{k}={v}" for k, v in (PLAIN | self.settings).items())
        return f"{self.kernel} sm_{self.capability} m={self.rows} {settings}"


def jobs() -> list[Job]:
    found = []
    for capability in PROCESSORS:
        for bits in (4, 3):
            found += [Job("decode", rows, capability, {"bits": bits}) for rows in (1, 32)]
            found.append(Job("prefill", 256, capability, {"bits": bits}))
        found += [
            Job("decode", 1, capability, {"dtype": "bf16", "scales": "fp32", "offsets": "fp32"}),
            Job("decode", 1, capability, {"offsets": "u8", "bias": True}),
            Job("decode", 1, capability, {"group": 32}),
            Job("decode", 1, capability, {"bits": 3, "group": 0, "even_k": False}),
            Job("prefill", 256, capability, {"dtype": "bf16", "offsets": "u8"}),
            Job("down", 1, capability),
            Job("dense", 1, capability),
        ]
    return found


def main() -> None:
    argparse.ArgumentParser(prog="python -m kernels.compiled", description=__doc__).parse_args()
    from kernels.sass import compile_kernel

    print(f"{'kernel':70} registers spills shared tensor-core instructions/weight")
    for job in tqdm(jobs()):
        report = compile_kernel(job.kernel, job.config, job.capability, **PLAIN | job.settings)
        numbers = f"{report.registers:9} {report.spills:6} {report.shared:6} {report.tensor_core:11}"
        tqdm.write(f"{job.name:70} {numbers} {report.per_weight:19.2f}")


if __name__ == "__main__":
    main()
