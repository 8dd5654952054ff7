"""The command line: `eora-lab demo | compare | compress | evaluate | generate | models | bench`."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.bench_solver import SHAPES, bench
from eora_lab.compensate.budget import Budget
from eora_lab.errors import EoraLabError
from eora_lab.recipe import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Calibration:
    """Which texts the input statistics are measured on."""

    source: str = "pydoc"
    """pydoc (embedded, no network), mmlu-exemplars, wikitext2, c4, arc, mathqa, gsm8k, mmlu, self (text sampled from
    the model), a text file, a split (wikitext2:validation) or a mix (arc+c4)"""
    nsamples: int = 32
    """sequences"""
    seqlen: int = 512
    """tokens a sequence"""
    share: float = 0.5
    """share of the first source in a mix"""
    first: bool = False
    """take the first windows of the text in order, in place of random ones"""
    seed: int = 0
    """seed of the random windows"""

    def batches(self, model, tokenizer):
        """(nsamples, seqlen) token ids."""
        from eora_lab.calibration import calibration_batches, token_windows

        if self.first:
            return token_windows(tokenizer, self.source, self.nsamples, self.seqlen)
        return calibration_batches(
            tokenizer, self.source, self.nsamples, self.seqlen, self.seed, share=self.share, model=model
        )


@dataclass(frozen=True)
class Evaluation:
    """Which text perplexity is measured on."""

    source: str = "pydoc:heldout"
    """a text source and split, such as wikitext2:test, or a text file"""
    windows: int = 20
    """how many windows, from the start of the text"""
    seqlen: int = 512
    """tokens a window"""

    def tokens(self, tokenizer):
        """(windows, seqlen) token ids."""
        from eora_lab.calibration import token_windows

        return token_windows(tokenizer, self.source, self.windows, self.seqlen)


@dataclass(frozen=True)
class Demo:
    """Compress a real language model to 3 bits and compensate it in four ways (some minutes on two cores).

    SmolLM2-135M, round to nearest in groups of 64, then no compensation, SVD, Act-S and EoRA at rank 64, all on the
    same weights and the same text. Prints a table and draws it. Needs no network after the model was fetched once.
    """

    figures: Path = Path("figures")
    """folder for demo.png and demo.svg"""

    def run(self) -> None:
        rivals = Compare(method=("none", "svd", "act_s", "eora"), figure=self.figures / "demo.png")
        rivals.run()


@dataclass(frozen=True)
class Compare:
    """Print the perplexity of several methods, ranks and bits on one compressed base, same texts for all."""

    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    compressor: str = "rtn"
    """rtn or gptq"""
    bits: tuple[int, ...] = (3,)
    """bits of a weight"""
    group_size: int = 64
    """input channels that share a grid; -1: one grid per output row"""
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
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    figure: Path | None = None
    """draw the table as .png and .svg"""

    def run(self) -> None:
        from eora_lab.compare import compare, format_row, header
        from eora_lab.models import load_model

        recipes = [
            Recipe(
                self.compressor, bits, self.group_size, method=method, rank=rank, factor_bits=few, inputs=self.inputs
            )
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
            from eora_lab.plots import plot_comparison

            for path in plot_comparison(rows, self.figure, self.model, self.evaluation.source):
                print(f"wrote {path}")


@dataclass(frozen=True)
class Compress:
    """Compress a model, compensate it, and keep the result in a run folder.

    The folder holds the packed weights, the low-rank path as a PEFT adapter, the configuration and the report. An
    interrupted run resumes when it is started again with the same settings.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=lambda: Recipe("gptq", bits=4))
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    evaluate: bool = True
    """measure the perplexity before and after"""
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.blocks import collect_statistics
        from eora_lab.evaluate import perplexity
        from eora_lab.models import load_model
        from eora_lab.pipeline import compress_model
        from eora_lab.plan import plan_ranks
        from eora_lab.runs import write_report

        model, tokenizer = load_model(self.model, dtype=self.dtype, device=self.device)
        self.recipe.check(model)
        windows = self.evaluation.tokens(tokenizer) if self.evaluate else None
        batches = self.calibration.batches(model, tokenizer)
        dense = perplexity(model, windows, progress=True) if self.evaluate else None
        ranks = None
        if self.budget != Budget():
            ranks = plan_ranks(model, collect_statistics(model, batches), self.recipe, self.budget)
        about = asdict(self.calibration)
        report = compress_model(
            model, batches, **asdict(self.recipe), ranks=ranks, folder=self.output, calibration=about
        )
        if self.evaluate:
            report.perplexity = {"dense": dense, "compressed": perplexity(model, windows, progress=True)}
            write_report(self.output, report)
        print(report)
        print(f"wrote {self.output}: try  eora-lab generate {self.output} 'The capital of France is'")


@dataclass(frozen=True)
class Evaluate:
    """Measure the perplexity of a model or of a run folder."""

    model: Annotated[str, tyro.conf.Positional] = "smollm2-135m"
    """embedded model, hub id, model folder, or run folder"""
    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")] = Evaluation()
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.evaluate import perplexity
        from eora_lab.runs import load_model_or_run

        model, tokenizer = load_model_or_run(self.model, self.dtype, self.device)
        windows = self.evaluation.tokens(tokenizer)
        value = perplexity(model, windows, progress=True)
        print(f"perplexity {value:.4f} on {len(windows)} x {windows.shape[1]} tokens of {self.evaluation.source}")


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a model or a run folder."""

    model: Annotated[str, tyro.conf.Positional]
    """embedded model, hub id, model folder, or run folder"""
    prompt: Annotated[str, tyro.conf.Positional]
    """text to continue"""
    tokens: int = 48
    """how many tokens to add at the most"""
    temperature: float = 0.0
    """0: always the likeliest token"""
    seed: int = 0
    """seed of the sampling"""
    dtype: Dtype = "float32"
    """type that the model is held in"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.generate import generate
        from eora_lab.runs import load_model_or_run

        model, tokenizer = load_model_or_run(self.model, self.dtype, self.device)
        print(self.prompt + generate(model, tokenizer, self.prompt, self.tokens, self.temperature, self.seed))


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
        columns = "{:>12} {:>9} {:>12} {:>8}  {:>15} {:>14}"
        print(columns.format("out x in", "ours s", "reference s", "ratio", "loss/reference", "loss/residual"))
        for row in bench(self.shapes, self.rank, self.seed):
            times = f"{row.seconds:.2f}", f"{row.reference_seconds:.2f}", f"{row.reference_seconds / row.seconds:.0f}x"
            losses = f"{row.loss / row.reference_loss:.7f}", f"{row.loss / row.total:.5f}"
            print(columns.format(row.shape, *times, *losses), flush=True)


@dataclass(frozen=True)
class Models:
    """List the models that need no hub, and how to name any other."""

    def run(self) -> None:
        from eora_lab.models import EMBEDDED

        for name, description in EMBEDDED.items():
            print(f"{name:16} {description}")
        print(f"{'OWNER/NAME':16} a decoder-only model of the Hugging Face hub, from its safetensors")
        print(f"{'FOLDER':16} a local folder with config.json, safetensors and tokenizer files, or a .gguf file")


COMMANDS = {
    "demo": Demo,
    "compare": Compare,
    "compress": Compress,
    "evaluate": Evaluate,
    "generate": Generate,
    "models": Models,
    "bench": Bench,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the input cannot be used (one line says why), 2 wrong usage, 130 stopped."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="eora-lab",
        description="Compress large language models without training, and compensate the error. "
        "Start with `eora-lab demo`; `eora-lab COMMAND --help` tells the rest.",
        args=arguments,
    )
    try:
        command.run()
    except EoraLabError as error:
        print(f"eora-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eora-lab: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
