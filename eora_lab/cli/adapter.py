"""`eora-lab adapter`: export, check and solve adapters."""

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
    """Write the low-rank path of a run folder as an adapter of other tools, with a card that says how to run it."""

    run_folder: Annotated[Path, tyro.conf.Positional]
    """a finished run folder"""
    output: Annotated[Path, tyro.conf.Positional]
    """adapter folder to write; a .gguf file with --format gguf"""
    universal: bool = False
    """pad every layer to one rank, for loaders that know one rank and one scaling (SGLang, GPTQModel), and write
    experts one by one; without it, each layer keeps its own, and experts are written as peft takes them"""
    format: Literal["peft", "gguf", "mlx"] = "peft"
    """gguf: for llama.cpp, beside a GGUF file of the base model; every layer keeps its own rank. mlx: for mlx-lm"""
    factor_type: Literal["F16", "F32", "BF16", "Q8_0"] = "F16"
    """gguf: how factors are held. F16 is what a run holds; Q8_0 takes half of its bytes"""

    def run(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.files import check_empty, check_place
        from eora_lab.formats.gguf_adapter import write_gguf_adapter
        from eora_lab.formats.made_for import CARD
        from eora_lab.formats.mlx_adapter import write_mlx_adapter
        from eora_lab.formats.peft import write_adapter
        from eora_lab.model.load import load_skeleton
        from eora_lab.run import card
        from eora_lab.run.folder import read_config, read_report
        from eora_lab.run.stored import check_output, modules_of, run_factors, run_made_for

        if self.universal and self.format != "peft":
            raise EoraLabError(f"--universal is of PEFT adapters: leave it out with --format {self.format}")
        if self.factor_type != "F16" and self.format != "gguf":
            raise EoraLabError(f"--factor-type is of GGUF adapters: leave it out with --format {self.format}")
        factors, report = run_factors(self.run_folder), read_report(self.run_folder)
        settings = read_config(self.run_folder)["settings"]
        model = settings["model"]
        if self.format == "gguf":
            check_place(self.output, (".gguf",))
            if self.output.exists():
                raise EoraLabError(f"{self.output} is there already: choose another name")
            made_for = run_made_for(self.run_folder, {"export": self.factor_type})
            short = write_gguf_adapter(self.output, factors, load_skeleton(model), self.factor_type, made_for)
            if short:
                print(f"{short} factors are F16: their rows are no multiples of 32, which Q8_0 needs")
            text = card.card_text(settings, report, made_for, {"llama.cpp": card.GGUF})
            card.write_card(self.output.with_suffix(".md"), text)
            base = str(settings.get("checkpoint", ""))
            base = base if base.endswith(".gguf") and not settings.get("reround") else "BASE.gguf"
            print(f"wrote {self.output}: try  {shlex.join(['llama-server', '-m', base, '--lora', str(self.output)])}")
            return
        made_for = run_made_for(self.run_folder, {"export": self.universal if self.format == "peft" else self.format})
        if self.format == "mlx":
            check_empty(self.output)
            write_mlx_adapter(self.output, factors, model, load_skeleton(model), made_for)
            text = card.card_text(settings, report, made_for, {"MLX": card.MLX})
            card.write_card(self.output / CARD, text)
        else:
            check_output(self.output, made_for)
            modules = modules_of(self.run_folder)
            write_adapter(self.output, factors, model, self.universal, made_for, modules)
            card.write_peft_card(self.output, settings, report, made_for, modules)
        print(f"wrote {self.output}: try  {shlex.join(['eora-lab', 'adapter', 'check', str(self.output)])}")


@dataclass(frozen=True)
class Check:
    """Name what other tools would get wrong about an adapter. Exit code 1 when one would.

    A PEFT adapter is looked at as peft, vLLM, SGLang, GPTQModel and llama.cpp's converter do, a .gguf file as llama.cpp
    does, a folder for MLX as mlx-lm does. Experts of a mixture have no form that all of them take: it says which one
    takes this one.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """adapter folder, or a .gguf file"""
    model: str | None = None
    """its base model: embedded model, hub id, or folder, which may be a GPTQ checkpoint; or the run folder that it is
    to be used with; by default what the adapter names. Of a .gguf adapter: the .gguf file of its base"""
    fix: Path | None = None
    """write a universal PEFT adapter, which all of them load alike, to this folder"""

    def run(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.formats.mlx_adapter_check import is_mlx

        other = self.path.suffix == ".gguf" or is_mlx(self.path)
        if other and self.fix:
            raise EoraLabError(
                f"{self.path} is no PEFT adapter, which is what --fix writes: export it again from its run"
            )
        if self.path.suffix == ".gguf":
            self._check_gguf()
        elif other:
            self._check_mlx()
        else:
            self._check_peft()

    def _check_gguf(self) -> None:
        from eora_lab.formats.gguf_adapter_check import check_gguf_adapter

        found = check_gguf_adapter(self.path, self.model)
        base = "" if self.model else ", as far as can be told without its base (--model BASE.gguf)"
        self._say("llama.cpp", found, f"llama.cpp loads it{base}")

    def _check_mlx(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.formats.mlx_adapter_check import check_mlx_adapter, read_mlx
        from eora_lab.model.load import load_skeleton
        from eora_lab.run.folder import is_run, read_config
        from eora_lab.run.stored import shapes_of

        tensors, config = read_mlx(self.path)
        name = self.model or config.get("model")
        if not isinstance(name, str):
            raise EoraLabError(f"{self.path} names no base model: give it with --model")
        model = read_config(name)["settings"]["model"] if is_run(Path(name)) else name
        found = list(check_mlx_adapter(tensors, config, shapes_of(name), load_skeleton(model, quantised=True)))
        self._say("mlx", found, "mlx-lm loads it")

    def _say(self, loader: str, problems: list[str], well: str) -> None:
        """Print the problems of the one loader of a form. Raises EoraLabError where there are any."""
        from eora_lab.errors import EoraLabError
        from eora_lab.formats.adapter_check import Finding

        for problem in problems:
            print(Finding(loader, problem))
        if problems:
            raise EoraLabError(f"{len(problems)} problems in {self.path}: export it again from its run")
        print(f"{self.path}: {well}")

    def _check_peft(self) -> None:
        from eora_lab.errors import EoraLabError, naming
        from eora_lab.files import digest, file_digest
        from eora_lab.formats.adapter_check import Finding, check_adapter, fix_adapter
        from eora_lab.formats.adapter_config import names_another
        from eora_lab.formats.fused import fused_linears
        from eora_lab.formats.made_for import WEIGHTS, MadeFor, read_made_for
        from eora_lab.formats.peft import read_files, served_rank, write_adapter
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
            kept = ["those of experts"] if modules is not None and fused_linears(modules) else []
            kept += ["what is not applied"] if any("does not apply" in one.problem for one in findings) else []
            but = f", but for {' and '.join(kept)}" if kept else ""
            raise EoraLabError(
                f"{len(findings)} problems in {self.path}: --fix FOLDER writes an adapter without them{but}"
            )
        if not findings:
            rank = served_rank(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
            print(f"{self.path}: peft, vLLM (--max-lora-rank {rank}), SGLang, GPTQModel and llama.cpp load it alike")


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
        from eora_lab.run.card import write_peft_card
        from eora_lab.run.folder import load_original, load_run, read_config
        from eora_lab.run.stored import check_output, run_made_for
        from eora_lab.run.task_adapter import solve_and_report

        recipe = Recipe(**asdict(self.path), **asdict(self.measured))
        made_for = run_made_for(self.run_folder, {"solve": asdict(recipe), "calibration": asdict(self.calibration)})
        check_output(self.output, made_for)
        original = load_original(self.run_folder, self.device, self.base)
        dtype = next(original.parameters()).dtype
        model, tokenizer, run = load_run(self.run_folder, dtype, self.device, model=self.base)
        say_start(start_text(tokenizer))
        batches = self.calibration.batches(original, tokenizer)
        factors, report = solve_and_report(model, original, batches, recipe)
        write_adapter(self.output, factors, model_name(model), made_for=made_for, model=model)
        report.base = run.base
        settings = read_config(self.run_folder)["settings"] | {"imatrix": None}  # it was of the run's own path
        settings |= asdict(self.path) | asdict(self.calibration)
        write_peft_card(self.output, settings, report, made_for, model)
        chat = ["eora-lab", "chat", str(self.run_folder), "--adapter", f"{self.output.name}={self.output}"]
        print(f"wrote {self.output}: try  {shlex.join(chat)}")


@dataclass(frozen=True)
class Adapter:
    """Export, check or solve adapters."""

    command: Annotated[
        Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Solve, tyro.conf.subcommand("solve")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.command.run()
