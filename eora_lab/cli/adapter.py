"""`eora-lab adapter`: export, check and solve PEFT adapters."""

import shlex
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.options import say_start
from eora_lab.run.recipe import PassSettings, PathSettings, Recipe
from eora_lab.text.settings import Calibration


@dataclass(frozen=True)
class Export:
    """Write the low-rank path of a run folder as an adapter of other tools."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """a finished run folder"""
    output: Annotated[Path, tyro.conf.Positional]
    """adapter folder to write; a .gguf file with --format gguf"""
    universal: bool = False
    """pad every layer to one rank, for loaders that know one rank and one scaling (vLLM, SGLang, GPTQModel), and write
    experts one by one; without it, each layer keeps its own, and experts are written as peft takes them"""
    format: Literal["peft", "gguf"] = "peft"
    """gguf: for llama.cpp, beside a GGUF file of the base model; every layer keeps its own rank"""

    def run(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.files import check_place
        from eora_lab.formats.gguf_adapter import write_gguf_adapter
        from eora_lab.formats.peft import write_adapter
        from eora_lab.model.load import load_skeleton
        from eora_lab.run.folder import read_config
        from eora_lab.run.stored import check_output, modules_of, run_factors, run_made_for

        factors, settings = run_factors(self.run_folder), read_config(self.run_folder)["settings"]
        model, base = settings["model"], str(settings.get("checkpoint", ""))
        if self.format == "gguf":
            if self.universal:
                raise EoraLabError("--universal is of PEFT adapters: llama.cpp takes every layer at its own rank")
            check_place(self.output, (".gguf",))
            if self.output.exists():
                raise EoraLabError(f"{self.output} is there already: choose another name")
            write_gguf_adapter(self.output, factors, load_skeleton(model))
            base = base if base.endswith(".gguf") else "BASE.gguf"
            print(f"wrote {self.output}: try  {shlex.join(['llama-server', '-m', base, '--lora', str(self.output)])}")
            return
        made_for = run_made_for(self.run_folder, {"export": self.universal})
        check_output(self.output, made_for)
        write_adapter(self.output, factors, model, self.universal, made_for, modules_of(self.run_folder))
        print(f"wrote {self.output}: try  {shlex.join(['eora-lab', 'adapter', 'check', str(self.output)])}")


@dataclass(frozen=True)
class Check:
    """Name what peft, vLLM, SGLang and GPTQModel would get wrong about a PEFT adapter. Exit code 1 when one would.

    Experts of a mixture have no form that all of them take: it says which one takes this one.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """adapter folder"""
    model: str | None = None
    """its base model: embedded model, hub id, or folder, which may be a GPTQ checkpoint; or the run folder that it is
    to be used with; by default what the adapter names"""
    fix: Path | None = None
    """write a universal adapter, which all of them load alike, to this folder"""

    def run(self) -> None:
        from eora_lab.errors import EoraLabError, naming
        from eora_lab.files import digest, file_digest
        from eora_lab.formats.adapter_check import Finding, check_adapter, fix_adapter
        from eora_lab.formats.adapter_config import names_another
        from eora_lab.formats.fused import fused_linears
        from eora_lab.formats.made_for import WEIGHTS, MadeFor, read_made_for
        from eora_lab.formats.peft import read_files, write_adapter
        from eora_lab.run.folder import is_run, read_config
        from eora_lab.run.stored import belongs_elsewhere, check_output, modules_of, shapes_of

        tensors, config = read_files(self.path)
        name = self.model or config.get("base_model_name_or_path")
        if not name:
            raise EoraLabError(f"{self.path} names no base model: give it with --model")
        made_for = read_made_for(self.path) or MadeFor("", "", "")
        fixed = replace(made_for, work=digest({"fix": file_digest(self.path / WEIGHTS)}))
        if self.fix:
            check_output(self.fix, fixed)
        try:
            shapes, modules = shapes_of(name), modules_of(name)
        except EoraLabError as error:
            raise EoraLabError(f"the base model of {self.path} is needed (--model names another): {error}") from error
        model = read_config(name)["settings"]["model"] if is_run(Path(name)) else name
        if not made_for.weights and (named := names_another(config, model)):
            print(f"eora-lab: {self.path} names {named} as its base model, not {model}", file=sys.stderr)
        with naming(str(self.path)):
            findings = check_adapter(tensors, config, shapes, modules)
        if other := belongs_elsewhere(made_for, name):
            findings.append(Finding("any", other))
        for finding in findings:
            print(finding)
        if self.fix:
            if other:
                raise EoraLabError(f"{self.path} {other}")
            with naming(str(self.path)):
                mended = fix_adapter(tensors, config, shapes, modules)
            write_adapter(self.fix, mended, model, True, fixed, modules)
            print(f"wrote {self.fix}, at rank {read_files(self.fix)[1]['r']} in every layer")
        elif findings:
            but = ", but for those of experts" if modules is not None and fused_linears(modules) else ""
            raise EoraLabError(
                f"{len(findings)} problems in {self.path}: --fix FOLDER writes an adapter without them{but}"
            )
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
        from eora_lab.run.stored import check_output, run_made_for
        from eora_lab.run.task_adapter import solve_adapter

        recipe = Recipe(**asdict(self.path), **asdict(self.measured))
        made_for = run_made_for(self.run_folder, {"solve": asdict(recipe), "calibration": asdict(self.calibration)})
        check_output(self.output, made_for)
        original = load_original(self.run_folder, self.device, self.base)
        model, tokenizer, _ = load_run(self.run_folder, next(original.parameters()).dtype, self.device, model=self.base)
        say_start(start_text(tokenizer))
        batches = self.calibration.batches(original, tokenizer)
        factors = solve_adapter(model, original, batches, recipe)
        write_adapter(self.output, factors, model_name(model), made_for=made_for, model=model)
        chat = ["eora-lab", "chat", str(self.run_folder), "--adapter", f"{self.output.name}={self.output}"]
        print(f"wrote {self.output}: try  {shlex.join(chat)}")


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
