"""Try every family of transformers on a small model, and write docs/families.md: `python -m docs.families`.

    python -m docs.families                    those that are not recorded for these versions; hours in all
    python -m docs.families llama qwen3_moe    these, whatever is recorded
    python -m docs.families --again            all of them anew
    python -m docs.families --page             only the page, from what is recorded

Every family runs in a process of its own, with a limit of time. What is seen of it (`docs/family_check.py`) goes into
data/measured/families.jsonl at once, so that a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

from docs.family_page import PAGE, page
from docs.family_record import RECORD, Family, keep, read, versions

QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
KINDS = {"text": "causal-lm", "image": "image-text-to-text"}
LIMIT = 180


def in_a_process(mapping: str, name: str, limit: float) -> Family:
    """`check` in a process of its own, which is killed after that many seconds."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    seen = Family(mapping, name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = context.Process(target=_check, args=(sender, mapping, name, Path(folder)))
        process.start()
        sender.close()
        try:
            if receiver.poll(limit):
                seen = receiver.recv()
            else:
                seen.errors["time"] = f"it took more than {limit:.0f} s"
                process.kill()
        except EOFError:
            process.join()
            seen.errors["process"] = f"it ended with exit code {process.exitcode}"
        process.join()
    return seen


def _check(sender: Connection, mapping: str, name: str, folder: Path) -> None:
    """In the process: send what is seen. What libraries print is thrown away."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    import torch

    from docs.family_check import check

    torch.set_num_threads(1)
    sender.send(check(mapping, name, folder))


def families(kind: str | None, names: list[str]) -> list[tuple[str, str]]:
    """(mapping, name) of all families, or of those that are asked for. Exits when there is none of a name."""
    from docs.family_check import MAPPINGS

    chosen = [KINDS[kind]] if kind else list(MAPPINGS)
    known = [(mapping, name) for mapping in chosen for name in MAPPINGS[mapping][0]]
    if missing := set(names) - {name for _, name in known}:
        raise SystemExit(f"transformers has no such family: {', '.join(sorted(missing))}")
    return [one for one in known if not names or one[1] in names]


def try_all(todo: list[tuple[str, str]], workers: int, limit: float) -> Generator[Family, None, None]:
    """Families as they are done, with a progress bar."""
    from tqdm import tqdm

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(todo), unit="family") as bar:
        running = [pool.submit(in_a_process, *one, limit) for one in todo]
        try:
            for one in as_completed(running):
                seen = one.result()
                bar.update()
                bar.write(f"{seen.mapping:18} {seen.name:28} {seen.verdict:10} {seen.seconds:6.1f} s  {seen.reason}")
                yield seen
        finally:
            pool.shutdown(cancel_futures=True)


def to_try(chosen: list[tuple[str, str]], record: Path = RECORD) -> list[tuple[str, str]]:
    """Those of the families that are not recorded for the versions that are here."""
    here = versions()
    known = {key for key, one in read(record).items() if one.versions == here}
    return [one for one in chosen if one not in known]


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit code 0 whatever is seen, 130 when it is stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m docs.families", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="model types, as config.json names them")
    parser.add_argument("--kind", choices=KINDS, help="one mapping only: decoders of text, or those that also see")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for one family")
    parser.add_argument("--again", action="store_true", help="also those that are recorded for these versions")
    parser.add_argument("--page", action="store_true", help="try nothing, write the page")
    asked = parser.parse_args(arguments)
    if not asked.page:
        os.environ.update(QUIET)
        multiprocessing.get_context("forkserver").set_forkserver_preload(["docs.family_check", "peft"])
        chosen = families(asked.kind, asked.names)
        todo = chosen if asked.again or asked.names else to_try(chosen)
        try:
            with contextlib.closing(try_all(todo, asked.workers, asked.limit)) as tried:
                for seen in tried:
                    keep(seen)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
    PAGE.write_text(page(read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
