"""The command line, `eora-lab`: one command a file.

This file imports next to nothing, so that `main` is there to catch a Ctrl-C while the rest is imported.
"""

import io
import os
import signal
import sys

RESUMED = ("compress", "mend", "finetune", "sweep", "paper")
STOPPED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as shells count


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 the input cannot be used or the machine failed (one line says why),
    2 wrong usage, 3 cells of a sweep failed, 4 it ran out of time, 130 stopped, 143 terminated."""
    os.environ.setdefault("MPLBACKEND", "agg")  # figures go to files, no window opens
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # half-written files go on the way out
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file that cannot show a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            from eora_lab.cli.commands import run

            return run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        again = "; the same command goes on where it was" if set(arguments[:1]) & set(RESUMED) else ""
        print(f"eora-lab: stopped{again}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return BROKEN_PIPE
