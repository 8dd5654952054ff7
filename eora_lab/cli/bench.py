"""`eora-lab bench`."""

from dataclasses import dataclass

ROUNDING = 1e-10  # of the error without a path: below it float32 ends
SHAPES = ("1024x1024", "4096x4096", "14336x4096", "4096x14336")


@dataclass(frozen=True)
class Bench:
    """Time the EoRA solver beside the reference algorithm on layers of real sizes (the large ones take minutes)."""

    shapes: tuple[str, ...] = SHAPES
    """OUTxIN of the layers"""
    rank: int = 128
    """rank of the compensation"""
    seed: int = 0
    """seed of the synthetic layers"""

    def run(self) -> None:
        from eora_lab.experiment.bench_solver import bench

        columns = "{:>12} {:>9} {:>12} {:>8}  {:>15} {:>14}"
        print(columns.format("out x in", "ours s", "reference s", "ratio", "loss/reference", "loss/residual"))
        for row in bench(self.shapes, self.rank, self.seed):
            times = f"{row.seconds:.2f}", f"{row.reference_seconds:.2f}", f"{row.reference_seconds / row.seconds:.0f}x"
            exact = max(row.loss, row.reference_loss) < ROUNDING * row.total  # nothing is left to compare
            losses = "rounding" if exact else f"{row.loss / row.reference_loss:.9f}", f"{row.loss / row.total:.5f}"
            print(columns.format(row.shape, *times, *losses), flush=True)
