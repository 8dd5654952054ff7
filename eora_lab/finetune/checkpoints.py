"""Checkpoints, as the transformers Trainer writes them: which ones are whole, and what becomes of half ones."""

import re
import shutil
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from eora_lab.errors import EoraLabError, one_line
from eora_lab.files import read_json, read_tensors

NAME = re.compile(r"checkpoint-(\d+)")
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint of all in a folder, whole or not, the newest first."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """The newest whole checkpoint that a training of so many steps goes on from.

    One that is at the end is none: the Trainer would take one more step.
    """
    return next((path for step, path in checkpoints(folder).items() if step < steps and is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether all files that a training goes on from are there and undamaged; the Trainer would go on without some."""
    try:
        step = read_json(checkpoint / "trainer_state.json").get("global_step")
        read_tensors(checkpoint / "adapter_model.safetensors")
        for name in ARCHIVES:
            with zipfile.ZipFile(checkpoint / name) as archive:
                if archive.testzip():
                    return False
    except Exception:  # damage has many names
        return False
    return checkpoint.name == f"checkpoint-{step}"


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Within this context, checkpoints are written: one that is not written to its end is removed.

    Raises EoraLabError when a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        at = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, RuntimeError) and "torch.serialization" not in at:  # torch.save raises nothing better
            raise
        newest = next(iter(checkpoints(folder).values()), None)
        if newest and not is_whole(newest):
            shutil.rmtree(newest, ignore_errors=True)
        raise EoraLabError(
            f"cannot write a checkpoint into {folder}: {one_line(error)}; make room, and start the training again with "
            "the same settings to go on from the last one"
        ) from error
