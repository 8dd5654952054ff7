"""`eora-lab compare`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from eora_lab.compensate.budget import Budget
from eora_lab.compress.grid import ScaleDtype, ZeroPoint
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation


@dataclass(frozen=True)
class Compare:
    """Print the perplexity of several methods, ranks and bits on one compressed base, same texts for all."""

    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    compressor: str = "rtn"
    """rtn, gptq, magnitude, wanda or sparsegpt"""
    bits: tuple[int, ...] = (3,)
    """bits of a weight; 16: pruning alone"""
    group_size: int = 64
    """input channels that share a grid; -1: one grid per output row"""
    sym: bool = False
    """symmetric grids"""
    zero_point: ZeroPoint = "float"
    """of asymmetric grids: float keeps each group's ends, integer keeps zero"""
    scale_dtype: ScaleDtype = "float32"
    """type of a grid's scale and offset"""
    mse: bool = False
    """shrink every grid as far as that lowers the squared error of its weights"""
    sparsity: str = ""
    """what a pruner leaves: n of every m inputs such as 2:4, or the share that goes, such as 0.5"""
    desc_act: bool = True
    """gptq: inputs with the largest activations first"""
    true_sequential: bool = False
    """measure the inputs within each block step by step (with --inputs compensated)"""
    rounds: int = 1
    """how often weights are compressed and compensated in turn; then every row has a base of its own"""
    method: tuple[str, ...] = ("none", "svd", "qera_approx", "eora")
    """methods to compare"""
    rank: tuple[int, ...] = (64,)
    """ranks of the compensation"""
    factor_bits: tuple[int, ...] = (16,)
    """bits of the compensation's factors: 16, or 2 to 8"""
    budget: tuple[Literal["uniform", "relative", "absolute"], ...] = ("uniform",)
    """how the parameters of that rank are spread over layers: the same rank in each, or where they remove most output
    error (relative to each layer's output, or absolute)"""
    inputs: Literal["compensated", "original"] = "original"
    """where calibration inputs come from; the same statistics serve all rows only with the original model"""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    figure: Path | None = None
    """draw the table as .png and .svg, with its numbers beside as .csv"""

    def run(self) -> None:
        from eora_lab.experiment.compare import compare, format_row, header
        from eora_lab.model.load import load_model

        base = Recipe(
            self.compressor,
            group_size=self.group_size,
            sym=self.sym,
            zero_point=self.zero_point,
            scale_dtype=self.scale_dtype,
            mse=self.mse,
            sparsity=self.sparsity,
            desc_act=self.desc_act,
            true_sequential=self.true_sequential,
            rounds=self.rounds,
            inputs=self.inputs,
        )
        recipes = [
            replace(base, bits=bits, method=method, rank=rank, factor_bits=few)
            for bits in self.bits
            for method in self.method
            for rank in (self.rank if method != "none" else (0,))
            for few in (self.factor_bits if method != "none" else (16,))
        ]
        model, tokenizer = load_model(self.model)
        windows = self.evaluation.tokens(tokenizer)
        batches = self.calibration.batches(model, tokenizer)
        print(
            f"{self.model}, statistics from {self.inputs} inputs: {len(batches)} x {batches.shape[1]} tokens of "
            f"{self.calibration.source}; perplexity on {len(windows)} x {windows.shape[1]} of {self.evaluation.source}"
        )
        print(header(), flush=True)
        rows = []
        budgets = tuple(Budget(objective) for objective in self.budget)
        for row in compare(model, batches, windows, recipes, budgets):
            rows.append(row)
            print(format_row(row), flush=True)
        if self.figure:
            from eora_lab.experiment.compare import table
            from eora_lab.files import write_atomically
            from eora_lab.plots import plot_comparison, save

            frame, numbers = table(rows, self.model, self.evaluation.source), self.figure.with_suffix(".csv")
            write_atomically(numbers, lambda to: frame.to_csv(to, index=False))
            for path in (numbers, *save(plot_comparison(frame), self.figure)):
                print(f"wrote {path}")
