"""All commands: the arguments are parsed into one of them, which then runs."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import tyro

from eora_lab.cli.adapter import Adapter
from eora_lab.cli.allocator import keep_freed_memory
from eora_lab.cli.bench import Bench
from eora_lab.cli.board import Board
from eora_lab.cli.chat import Chat
from eora_lab.cli.compare import Compare
from eora_lab.cli.compress import Compress
from eora_lab.cli.demo import Demo
from eora_lab.cli.evaluate import Evaluate
from eora_lab.cli.export import Export
from eora_lab.cli.finetune import Finetune
from eora_lab.cli.generate import Generate
from eora_lab.cli.imatrix import Imatrix
from eora_lab.cli.mend import Mend
from eora_lab.cli.models import Models
from eora_lab.cli.paper import Paper
from eora_lab.cli.sweep import Sweep
from eora_lab.errors import EoraLabError, ToldElsewhere, machine_error, unknown

DEFAULT = warnings.formatwarning
PLUGINS = "eora_lab.plugins"  # the entry points of installed ones
NAMED = (tyro.conf.PositionalMetavarFromFieldName,)  # CHECKPOINT OUTPUT, and not PATH PATH
OPENING = """usage: eora-lab COMMAND ...     `eora-lab COMMAND --help` tells the rest; start with `eora-lab demo`

Compress large language models without training, and compensate the error.
"""
CLOSING = """
--plugin FILE.py, in every command and as often as you like, adds methods, texts and formats of yours.
Exit codes: 0 done, 1 the input cannot be used or the machine failed (one line says why), 2 wrong usage,
3 cells of a sweep failed, 4 --until left some of its cells, 130 stopped."""
COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "compare": Compare,
    "compress": Compress,
    "mend": Mend,
    "evaluate": Evaluate,
    "generate": Generate,
    "export": Export,
    "chat": Chat,
    "adapter": Adapter,
    "finetune": Finetune,
    "sweep": Sweep,
    "board": Board,
    "paper": Paper,
    "imatrix": Imatrix,
    "models": Models,
    "bench": Bench,
}


def run(arguments: list[str]) -> int:
    """Run a command, and print what is wrong in one line. Returns the exit code."""
    warnings.formatwarning = in_one_line
    try:
        command = parsed(with_plugins(arguments))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not isinstance(command, Compress | Mend):
            said = ToldElsewhere if os.environ.get("RANK", "0") != "0" else EoraLabError
            raise said("only compress and mend run in several processes: start this one without torchrun")
        keep_freed_memory()
        return command.run() or 0
    except ToldElsewhere:
        return 1
    except EoraLabError as error:
        print(f"eora-lab: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if not (failure := machine_error(error)):
            raise
        print(f"eora-lab: {failure}", file=sys.stderr)
        return 1


def parsed(arguments: list[str]) -> Any:
    """The command that is asked for. Exits with 2 where there is none, or an option is not its own."""
    name, *rest = arguments or [""]
    if name in COMMANDS:  # its own parser, which names no other command's options
        return tyro.cli(COMMANDS[name], prog=f"eora-lab {name}", args=rest, config=NAMED)
    if name in ("-h", "--help"):
        print(overview())
        raise SystemExit(0)
    if name == "--version":
        print(f"eora-lab {metadata.version('eora-lab')}")
        raise SystemExit(0)
    print(f"eora-lab: {unknown('command', name, COMMANDS)}" if name else overview(), file=sys.stderr)
    raise SystemExit(2)


def overview() -> str:
    """All commands, a line each."""
    first = {name: inspect.cleandoc(one.__doc__ or "").partition("\n\n")[0] for name, one in COMMANDS.items()}
    lines = [f"  {name:10}{' '.join(text.split()).partition('. ')[0].rstrip('.')}" for name, text in first.items()]
    return "\n".join([OPENING, *lines, CLOSING])


def in_one_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    """A warning of ours without the place in the code that it comes from."""
    return f"warning: {message}\n" if category is UserWarning else DEFAULT(message, category, *where, **line)


def with_plugins(arguments: list[str]) -> list[str]:
    """Load the plugins of installed packages and those of --plugin, and return the other arguments.

    It comes before anything is parsed: settings are checked when they are parsed, and may name what a plugin adds.
    """
    files, rest = [], []
    left = iter(arguments)
    for one in left:
        if one == "--plugin" or one.startswith("--plugin="):
            files.append(one.partition("=")[2] or next(left, ""))
        else:
            rest.append(one)
    if files or metadata.entry_points(group=PLUGINS):
        from eora_lab.run.plugins import load_installed, load_plugin

        load_installed()
        for file in files:
            load_plugin(file)
    return rest
