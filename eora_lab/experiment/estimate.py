"""What a sweep will take: memory from the shape of the model, time from cells that ran before, else roughly."""

import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from eora_lab.compensate import needs_outputs
from eora_lab.environment import free_memory
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cells import Cell
from eora_lab.model.load import load_skeleton
from eora_lab.model.structure import block_linears, decoder_blocks
from eora_lab.run.walk import SHARES
from eora_lab.text.settings import Evaluation

SHARED_INPUTS = 4 / 7  # q, k and v read one input, gate and up another
TASK_TOKENS = 140  # read for a question: its prompt with each of the choices (ARC; few-shot prompts are longer)
WHOLE_TEXT, WHOLE_TASK = 300_000, 2000  # tokens of WikiText-2's test split, questions of a task
SLOWER = 2  # than a matrix product alone: unpacking, eigenvectors, attention
WORKSPACE = 1.2  # activations, logits, a layer's temporary matrices


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, read from its configuration alone."""

    parameters: int
    layers: dict[str, tuple[int, int]]  # (out, in) of every linear in the blocks, by name
    blocks: int
    model: nn.Module  # without weights

    def compressed(self, cell: Cell) -> list[tuple[int, int]]:
        """(out, in) of the linears that a cell compresses: all of them where its patterns cannot be followed."""
        try:
            left = cell.recipe.left(self.model) if cell.recipe else {}
        except EoraLabError:  # the cell itself will say what is wrong
            left = {}
        return [shape for name, shape in self.layers.items() if name not in left]


@lru_cache(maxsize=8)
def model_shape(name: str) -> Shape | None:
    """Sizes of a model; None where its configuration cannot be read before its weights are (GGUF, no network)."""
    if name.lower().endswith(".gguf"):
        return None
    try:
        model = load_skeleton(name)
        blocks = decoder_blocks(model)
    except EoraLabError:  # the cell itself will say what is wrong
        return None
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in block_linears(model).items()}
    return Shape(sum(p.numel() for p in model.parameters()), shapes, len(blocks), model)


def memory(cell: Cell) -> int | None:
    """Bytes that a cell needs at its highest point, or None when the model's sizes are unknown."""
    shape = model_shape(cell.model)
    if shape is None:
        return None
    weights = shape.parameters * getattr(torch, cell.dtype).itemsize
    if cell.recipe is None:
        return int(WORKSPACE * weights)
    moments = int(SHARED_INPUTS * sum(4 * inputs**2 for _, inputs in shape.layers.values()))  # S is float32
    if needs_outputs(cell.recipe.method):
        moments += sum(4 * outputs**2 for outputs, _ in shape.layers.values())  # F of all layers, whatever the inputs
    if drifts(cell):
        moments *= 4  # S and D, of held-out tokens too
    largest = max(max(pair) for pair in shape.compressed(cell))
    return int(WORKSPACE * (2 * weights + (moments if cell.shared else moments / shape.blocks) + 6 * 8 * largest**2))


def measuring(cell: Cell, shape: Shape) -> float:
    """Floating-point operations of what a cell measures, roughly."""
    judged = cell.evaluation
    read = len(judged.perplexity) * (judged.windows * judged.window_length if judged.windows else WHOLE_TEXT)
    read += len(cell.tasks) * (cell.limit or WHOLE_TASK) * TASK_TOKENS
    return 2.0 * shape.parameters * read


def calibrating(cell: Cell, shape: Shape) -> float:
    """Floating-point operations of the pass over calibration text and of compression, roughly."""
    tokens = cell.calibration.nsamples * cell.calibration.seqlen
    total = 4.0 * shape.parameters * tokens
    chosen = shape.compressed(cell)
    for _, in_features in shape.layers.values() if cell.shared else chosen:
        total += 2.0 * SHARED_INPUTS * tokens * in_features**2  # S
    if drifts(cell):
        total *= 2  # two streams, S and D
    gptq = sum(2.0 * out_features * in_features**2 for out_features, in_features in chosen)
    return total + tries(cell) * gptq


def solving(cell: Cell, shape: Shape) -> float:
    """Floating-point operations of the compensation of all layers, roughly, with the backward pass that it may need."""
    once = sum(2.0 * n * k**2 + 25.0 * min(n, k) ** 3 for n, k in shape.compressed(cell))  # R S, eigenvectors
    total = tries(cell) * once
    if cell.recipe and needs_outputs(cell.recipe.method):
        tokens = cell.calibration.nsamples * cell.calibration.seqlen
        total += 6.0 * shape.parameters * tokens  # forward twice, backward
        total += sum(2.0 * tokens * out_features**2 for out_features, _ in shape.layers.values())  # F
    return total


def tries(cell: Cell) -> int:
    """How often a block is compressed and compensated, rounds apart."""
    return len(SHARES) if drifts(cell) else 1


def drifts(cell: Cell) -> bool:
    """Whether layers aim at the outputs of the original model."""
    return cell.recipe is not None and cell.recipe.inputs == "drift"


def work(cells: list[Cell]) -> float | None:
    """Floating-point operations of cells, roughly; None when a model's sizes are unknown.

    What cells share counts once: a calibration pass with the base, and the solve of a method.
    """
    total, seen = 0.0, set()
    for cell in cells:
        shape = model_shape(cell.model)
        if shape is None:
            return None
        total += measuring(cell, shape)
        if cell.recipe is None:
            continue
        solve = replace(cell, evaluation=Evaluation(()), tasks=(), recipe=replace(cell.recipe, rank=0))
        base = replace(solve, recipe=replace(cell.recipe, rank=0, method="none"), budget="uniform")
        for key, part in ((base, calibrating), (solve, solving)):
            if key not in seen or not cell.shared:
                total += part(cell, shape)
                seen.add(key)
    return total


@lru_cache(maxsize=4)
def speed(device: str) -> float:
    """Floating-point operations a second of this machine in a float32 matrix product, measured in a moment."""
    matrix = torch.ones(1024, 1024, device=device)
    times = []
    for _ in range(5):  # the best of some: others may use the machine too
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(times)


def seconds(cells: list[Cell], finished: list[dict], device: str = "cpu") -> tuple[float | None, str]:
    """How long cells will take one after another, and on what that rests.

    finished: cells of the store (`ResultStore.cells`). Those with the same model and compressor are the best guess.
    """
    past: dict[tuple, list[float]] = {}
    for cell in finished:
        if cell["status"] == "done" and "total" in cell["cost"]:
            past.setdefault(_kind(cell["config"]), []).append(cell["cost"]["total"])
    known = [past.get(_kind(cell.config()), []) for cell in cells]
    if all(known):
        return float(sum(sum(times) / len(times) for times in known)), "from finished cells"
    operations = work(cells)
    if operations is None:
        return None, "unknown"
    return SLOWER * operations / speed(device), "rough"


def _kind(config: dict) -> tuple:
    names = ("model", "compressor", "method", "source", "nsamples", "seqlen", "perplexity", "windows", "tasks", "limit")
    return tuple(str(config.get(name)) for name in names)


def check_memory(cells: list[Cell], device: str = "cpu", processes: int = 1) -> int | None:
    """The largest memory of all cells, times the processes. Raises EoraLabError when it is more than there is."""
    needs = [need for cell in cells if (need := memory(cell)) is not None]
    if not needs:
        return None
    largest, there = processes * max(needs), free_memory(device)
    if there is not None and largest > there:
        raise EoraLabError(
            f"this sweep needs about {largest / 1e9:.1f} GB on {device} and {there / 1e9:.1f} GB are free: use a "
            "smaller model, dtype bfloat16, inputs compensated (statistics of one block at a time), or a larger machine"
        )
    return largest
