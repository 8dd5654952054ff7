"""What Triton makes of the shipped kernels on six generations of GPUs, without one: `python -m kernels.compiled`."""

import argparse
from dataclasses import dataclass, field

from tqdm import tqdm

from eora_lab.layer.triton_kernels.configs import GPUS, Config, rule

PLAIN = {"bits": 4, "group": 64, "dtype": "bf16"}  # the default recipe
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may have


@dataclass(frozen=True)
class Job:
    """A kernel as `rule` configures it for rows of a 4096 -> 14336 layer. settings: of `sass.compile_kernel`."""

    kernel: str
    rows: int
    gpu: str
    settings: dict = field(default_factory=dict)

    @property
    def whole(self) -> dict:
        """All settings."""
        return PLAIN | self.settings

    @property
    def config(self) -> Config:
        return rule(self.rows, 14336, 4096, self.whole["bits"], self.whole["group"], GPUS[self.gpu])

    @property
    def capability(self) -> int:
        return GPUS[self.gpu].capability

    @property
    def name(self) -> str:
        settings = " ".join(f"{k}={v}" for k, v in self.whole.items())
        return f"{self.kernel} sm_{self.capability} m={self.rows} {settings}"


def jobs() -> list[Job]:
    """Every kernel that a layer of the default recipe uses on each GPU, and other formats in turn."""
    found = []
    for gpu in GPUS:
        found += [Job("decode", rows, gpu, {"bits": bits}) for bits in (4, 3) for rows in (1, 32)]
        found += [Job("prefill", 256, gpu, {"bits": bits}) for bits in (4, 3) if gpu != "B200"]
        found.append(Job("down", 1, gpu))
    small = ("RTX 3090", "RTX 4090")  # of the least shared memory
    found += [Job("prefill", 256, gpu, {"bits": 3, "dtype": "fp16", "group": 32}) for gpu in small]
    others = [
        Job("decode", 1, "", {"dtype": "fp16", "group": 128, "offsets": "fp16"}),
        Job("decode", 1, "", {"offsets": "u8", "bias": True}),
        Job("decode", 32, "", {"group": 32}),
        Job("decode", 1, "", {"group": 16}),
        Job("decode", 1, "", {"bits": 3, "group": 0, "even_k": False}),
        Job("decode", 1, "", {"paths": "rows"}),
        Job("decode", 32, "", {"paths": "rows"}),
        Job("decode", 1, "", {"paths": "experts"}),
        Job("decode", 32, "", {"paths": "experts"}),
        Job("down", 1, "", {"paths": "rows"}),
        Job("down", 1, "", {"paths": "experts"}),
        Job("dense", 1, ""),
    ]
    for gpu in ("A100", "H200", "B200"):
        found += [Job(one.kernel, one.rows, gpu, one.settings) for one in others]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.compiled", description=__doc__)
    parser.add_argument("--only", default="", help="jobs whose name holds this text")
    arguments = parser.parse_args()
    from kernels.machine_code import cycles, soonest_use
    from kernels.sass import compile_kernel

    print(f"{'kernel':60} registers spills shared tensor-core instructions/weight cycles/128 channels, load to use")
    for job in tqdm([job for job in jobs() if arguments.only in job.name]):
        report = compile_kernel(job.kernel, job.config, job.capability, **job.whole)
        numbers = f"{report.registers:9} {report.spills:6} {report.shared:6} {report.tensor_core:11}"
        blocks = 2 if job.whole["bits"] == 3 else 1
        timing = f"{cycles(report.loop) // blocks:19} {soonest_use(report.loop):12}"
        tqdm.write(f"{job.name:60} {numbers} {report.per_weight:19.2f} {timing}")


if __name__ == "__main__":
    main()
