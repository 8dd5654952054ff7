"""The command line, `eora-lab`: one command a file."""

import os
import sys

import tyro

from eora_lab.cli.adapter import Adapter
from eora_lab.cli.bench import Bench
from eora_lab.cli.chat import Chat
from eora_lab.cli.compare import Compare
from eora_lab.cli.compensate import Compensate
from eora_lab.cli.compress import Compress
from eora_lab.cli.demo import Demo
from eora_lab.cli.evaluate import Evaluate
from eora_lab.cli.export import Export
from eora_lab.cli.finetune import Finetune
from eora_lab.cli.generate import Generate
from eora_lab.cli.models import Models
from eora_lab.cli.paper import Paper
from eora_lab.cli.sweep import Sweep
from eora_lab.errors import EoraLabError

COMMANDS = {
    "demo": Demo,
    "compare": Compare,
    "compress": Compress,
    "compensate": Compensate,
    "evaluate": Evaluate,
    "generate": Generate,
    "export": Export,
    "chat": Chat,
    "adapter": Adapter,
    "finetune": Finetune,
    "sweep": Sweep,
    "paper": Paper,
    "models": Models,
    "bench": Bench,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the input cannot be used (one line says why), 2 wrong usage, 130 stopped."""
    os.environ.setdefault("MPLBACKEND", "agg")  # figures go to files, no window opens
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="eora-lab",
            description="Compress large language models without training, and compensate the error. "
            "Start with `eora-lab demo`; `eora-lab COMMAND --help` tells the rest.",
            args=arguments,
        )
        command.run()
    except EoraLabError as error:
        print(f"eora-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eora-lab: stopped", file=sys.stderr)
        return 130
    return 0
