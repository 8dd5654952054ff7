"""`eora-lab adapter`: export, check and solve PEFT adapters."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.options import say_start
from eora_lab.run.recipe import PassSettings, PathSettings, Recipe
from eora_lab.text.settings import Calibration


@dataclass(frozen=True)
class Export:
    """Write the low-rank path of a run folder as a PEFT adapter."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """a finished run folder"""
    output: Annotated[Path, tyro.conf.Positional]
    """adapter folder to write"""
    universal: bool = False
    """pad every layer to one rank, for loaders that know one rank and one scaling (vLLM, SGLang, GPTQModel); without
    it, each layer keeps its own"""

    def run(self) -> None:
        from eora_lab.formats.peft import write_adapter
        from eora_lab.run.folder import read_config, run_factors

        factors = run_factors(self.run_folder)
        write_adapter(self.output, factors, read_config(self.run_folder)["settings"]["model"], self.universal)
        print(f"wrote {self.output}: try  eora-lab adapter check {self.output}")


@dataclass(frozen=True)
class Check:
    """Name what peft, vLLM, SGLang and GPTQModel would get wrong about a PEFT adapter. Exit code 1 when one would."""

    path: Annotated[Path, tyro.conf.Positional]
    """adapter folder"""
    model: str | None = None
    """its base model in full precision: embedded model, hub id, or folder; by default what the adapter names"""
    fix: Path | None = None
    """write a universal adapter, which all of them load alike, to this folder"""

    def run(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.formats.adapter_check import check_adapter, fix_adapter
        from eora_lab.formats.peft import read_files, write_adapter
        from eora_lab.model.load import load_skeleton
        from eora_lab.model.structure import block_linears

        tensors, config = read_files(self.path)
        name = self.model or config.get("base_model_name_or_path")
        if not name:
            raise EoraLabError(f"{self.path} names no base model: give it with --model")
        try:
            linears = block_linears(load_skeleton(name))
        except EoraLabError as error:
            raise EoraLabError(f"the base model of {self.path} is needed (--model names another): {error}") from error
        shapes = {module: (linear.out_features, linear.in_features) for module, linear in linears.items()}
        findings = check_adapter(tensors, config, shapes)
        for finding in findings:
            print(finding)
        if self.fix:
            write_adapter(self.fix, fix_adapter(tensors, config, shapes), name, universal=True)
            print(f"wrote {self.fix}, at rank {read_files(self.fix)[1]['r']} in every layer")
        elif findings:
            raise EoraLabError(f"{len(findings)} problems in {self.path}: --fix FOLDER writes an adapter without them")
        if not findings:
            print(f"{self.path}: peft, vLLM (--max-lora-rank {config['r']}), SGLang and GPTQModel load it alike")


@dataclass(frozen=True)
class Solve:
    """Compensate the compressed model of a run folder once more, for other texts: an adapter for a task.

    The compressed weights stay as they are, so several such adapters can share them (eora-lab chat --adapter).
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """a finished run folder"""
    output: Annotated[Path, tyro.conf.Positional]
    """adapter folder to write"""
    path: Annotated[PathSettings, tyro.conf.arg(name="")] = field(default_factory=PathSettings)
    measured: Annotated[PassSettings, tyro.conf.arg(name="")] = field(default_factory=PassSettings)
    calibration: Calibration = field(default_factory=Calibration)
    device: str = "cpu"
    """cpu or cuda"""
    base: str | None = None
    """the base model of the run, where it is no longer in its place"""

    def run(self) -> None:
        from eora_lab.formats.peft import write_adapter
        from eora_lab.model.start import start_text
        from eora_lab.model.structure import model_name
        from eora_lab.run.folder import load_original, load_run
        from eora_lab.run.task_adapter import solve_adapter

        recipe = Recipe(**asdict(self.path), **asdict(self.measured))
        original = load_original(self.run_folder, self.device, self.base)
        model, tokenizer, _ = load_run(self.run_folder, next(original.parameters()).dtype, self.device, model=self.base)
        say_start(start_text(tokenizer))
        batches = self.calibration.batches(original, tokenizer)
        factors = solve_adapter(model, original, batches, recipe)
        write_adapter(self.output, factors, model_name(model))
        print(f"wrote {self.output}: try  eora-lab chat {self.run_folder} --adapter {self.output.name}={self.output}")


@dataclass(frozen=True)
class Adapter:
    """Export, check or solve PEFT adapters."""

    command: Annotated[
        Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Solve, tyro.conf.subcommand("solve")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.command.run()
