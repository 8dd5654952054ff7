"""The roofline figure: floors by arithmetic, and the measured times of a machine beside them where there are any.

`python -m kernels.figure` draws the floors alone into kernels/floors.png/.svg.
"""

from pathlib import Path

from matplotlib.figure import Figure

from eora_lab.plots import looks, save, tell
from eora_lab.plots.style import panels, styled
from kernels.shapes import H200, Machine, floor_us

SHAPE = (14336, 4096)
LINES = (("16 bits", 16, 0), ("4 bits + rank 128", 4, 128), ("3 bits + rank 128", 3, 128))
MARKS = {"dense16": "s", "torch_int4_unfused": "v", "unfused": "^", "fused": "o"}
NAMES = {"dense16": "cuBLAS", "torch_int4_unfused": "torch int4, unfused", "unfused": "unfused", "fused": "fused"}


def draw(result: dict | None, machine: Machine = H200) -> Figure:
    """Microseconds over rows for a 4096 -> 14336 layer. result: of `kernels.bench`, or None for the floors alone."""
    if result:
        machine = Machine(result["gpu"], result["bandwidth"], result["rate"])
    rows = [2 ** (i / 4) for i in range(49)]
    look = looks([label for label, *_ in LINES])
    with styled():
        figure, [[axes]] = panels(1, 1, 4.2)
        for label, bits, rank in LINES:
            colour = look[label].colour
            times = [floor_us(M, *SHAPE, bits, rank, machine) for M in rows]
            axes.plot(rows, times, color=colour, linestyle=look[label].line, label=f"floor, {label}")
            for peer, mark in MARKS.items():
                points = [
                    (row["M"], row["us"])
                    for row in (result or {"layers": []})["layers"]
                    if (row["N"], row["K"]) == SHAPE and row["peer"] == peer and row["dtype"] == "bfloat16"
                    and "us" in row
                    and (row["bits"] == bits or (bits == 16 and peer == "dense16" and row["bits"] == 4))
                    and (bits == 16) == (peer == "dense16")
                ]  # fmt: skip
                if points:
                    axes.plot(*zip(*points, strict=True), mark, color=colour, label=f"{NAMES[peer]}, {label}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rows of x")
        axes.set_ylabel("microseconds")
        axes.legend()
    one = {label: floor_us(1, *SHAPE, bits, rank, machine) for label, bits, rank in LINES}
    said = ", ".join(f"{us:.1f} µs with {label}" for label, us in one.items())
    below = f"{machine.name}, 4096 → 14336" + ("" if result else " (arithmetic only; no time measured)")
    return tell(figure, f"One row takes at least {said}", f"Microseconds against rows of x. {below}.", below)


if __name__ == "__main__":
    print(*save(draw(None), Path(__file__).with_name("floors")), sep="\n")
