"""Machine code as `nvdisasm -c -hex` prints it: instructions, what the compiler says of their timing, the main loop.

Since Volta an instruction is 128 bits, and the compiler schedules: bits 105 to 125 tell the processor for how many
cycles to wait before the next instruction of the warp, which of six barriers the result of a load sets, and which
barriers to wait for first (Jia et al. 2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking").
"""

import re
from collections import Counter
from dataclasses import dataclass

LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);?\s+/\* 0x[0-9a-f]{16} \*/")
CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
LABEL = re.compile(r"^(\.L_x_\d+):")
NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """name: with its suffixes. stall: cycles until the warp's next one. sets: a barrier, or 7. waits: for barriers.
    target: the label it may jump to."""

    name: str
    stall: int
    sets: int
    waits: frozenset[int]
    target: str | None

    @property
    def operation(self) -> str:
        """The name without suffixes."""
        return self.name.split(".")[0]


def read_code(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and label -> number of the instruction that follows it."""
    code: list[Instruction] = []
    labels, pending = {}, None
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := LINE.match(line):
            pending = found
        elif pending and (control := CONTROL.match(line)):
            bits = int(control[1], 16) >> 41
            waits = frozenset(b for b in range(6) if bits >> (11 + b) & 1)
            target = re.search(r"`\((\.L_x_\d+)\)", pending[3]) if "BRA" in pending[2] else None
            stall = max(bits & 15, 1)
            code.append(Instruction(pending[2], stall, bits >> 5 & 7, waits, target and target[1]))
            pending = None
    return code, labels


def count(code: list[Instruction]) -> Counter:
    """How often each operation stands in the code."""
    return Counter(one.operation for one in code)


def main_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The longest innermost loop that holds a tensor-core instruction; empty where there is none.

    A loop is a backward branch; one that holds another whole loop is not innermost.
    """
    ends = [(labels[one.target], i) for i, one in enumerate(code) if one.target and labels.get(one.target, i + 1) <= i]
    innermost = [a for a in ends if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ends)]
    bodies = [code[start : end + 1] for start, end in innermost]
    return max((body for body in bodies if tensor_core(body)), key=len, default=[])


def tensor_core(code: list[Instruction]) -> int:
    """How many instructions run on the tensor cores."""
    return sum(one.operation.endswith("MMA") for one in code)


def cycles(loop: list[Instruction]) -> int:
    """Cycles that a warp alone needs for a round of the loop, by the compiler's own count, were memory never late."""
    return sum(one.stall for one in loop)


def soonest_use(loop: list[Instruction]) -> int:
    """Cycles from a load of global memory into registers to the first wait for it, at the least over the loop's loads.

    A round after the load is looked at; without such loads, and where nothing waits, it is a round's cycles.
    """
    least = cycles(loop)
    for i, one in enumerate(loop):
        if one.operation != "LDG" or one.sets == NO_BARRIER:
            continue
        passed = one.stall
        for other in loop[i + 1 :] + loop[:i]:
            if one.sets in other.waits:
                break
            passed += other.stall
        least = min(least, passed)
    return least
