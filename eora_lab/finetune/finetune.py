"""Fine-tune the low-rank path on top of a frozen compressed model, from one start or another.

What it starts from decides much (EoRA paper, tables 3, 11 and 12): EoRA, the SVD of the weight error (LoftQ with its W^
kept), or LoRA's own start, where B A is zero and training must mend the compression first.
"""

from pathlib import Path

from torch import nn

from eora_lab.errors import EoraLabError, as_setting, check_seed
from eora_lab.files import locked, read_json, write_json
from eora_lab.finetune.checkpoints import last_checkpoint
from eora_lab.finetune.settings import Init, Training
from eora_lab.finetune.trainer import train
from eora_lab.formats.names import Factors
from eora_lab.formats.peft import write_adapter
from eora_lab.model.structure import model_name
from eora_lab.run.adapters import made_for, use_only
from eora_lab.run.recipe import Recipe
from eora_lab.run.task_adapter import solve_adapter
from eora_lab.text.batches import Batches, as_tokens

CALIBRATION_TOKENS = 16384  # of the training text, to solve the start from
AGAIN = "delete it, and start the training again to go on from its last checkpoint"


def finetune(
    model: nn.Module,
    original: nn.Module,
    tokens: Batches,
    held_out: Batches,
    folder: Path | str,
    training: Training,
    init: Init = "eora",
    rank: int = 64,
    seed: int = 0,
) -> list[dict]:
    """Train an adapter of one rank in every layer, from one start. Returns the log, as log.json in the folder holds it.

    The folder becomes a PEFT adapter. Interrupted, it resumes from its last checkpoint, to the same result; finished,
    its log is returned.

    model:    compressed, from `load_run`. Its W^ stays frozen; it is left with the trained adapter in use.
    original: the model that it was made from, to solve the start from.
    tokens:   training sequences (nsamples, seqlen), which the steps go through in seeded order, more than once where
              they must.
    held_out: sequences to measure the loss on.
    Log:      {"step", "loss"} every few steps, the mean training loss since the entry before, nats a token;
              {"step", "eval_loss"}, on the held-out sequences, step 0 first.
    Raises EoraLabError when a setting does not fit, when the folder cannot be written or another process trains there,
    and when the loss is no longer finite.
    """
    folder = Path(folder)
    check_seed(seed)
    if rank < 1:
        raise EoraLabError(f"the rank must be at least 1, not {rank}")
    tokens, held_out = as_tokens(model, tokens, "training sequences"), as_tokens(model, held_out, "held-out sequences")
    log = finished(folder)
    if log is None:
        with locked(folder):
            checkpoint = last_checkpoint(folder, training.steps)
            start: Factors | None = None
            if init != "lora" and checkpoint is None:
                sequences = -(-CALIBRATION_TOKENS // tokens.shape[1])
                start = solve_adapter(model, original, tokens[:sequences], Recipe(method=init, rank=rank))
            factors, log = train(model, start, rank, tokens, held_out, folder, training, seed, checkpoint)
            write_adapter(folder, factors, model_name(model), made_for=made_for(model, "finetune"), model=model)
            write_json(folder / "log.json", log)
    use_only(model, folder)
    return log


def finished(folder: Path) -> list[dict] | None:
    """The log of a fine-tuning that ran to its end. Raises EoraLabError when it is damaged."""
    path = folder / "log.json"
    if not path.exists():
        return None
    try:
        log = read_json(path, list)
        as_setting(tuple[dict[str, float], ...], log, "its content")
    except EoraLabError as error:
        raise EoraLabError(f"{path} cannot be used: {error}; {AGAIN}") from error
    if not all(any(key in entry for entry in log) for key in ("loss", "eval_loss")):
        raise EoraLabError(f"{path} is no log of a training; {AGAIN}")
    return log
