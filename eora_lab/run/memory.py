"""What memory a pass takes, said before it begins: that of the largest block, the tokens, and what is there already.

Weights that lie in mapped files do not count: the system reads and drops their pages as it likes. They do so where the
dtype asked for is that of the files.
"""

from collections.abc import Container, Mapping

import torch
from torch import nn

from eora_lab.calibrate.backward import GRAPHS, LOGITS
from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.experts import JUDGED, experts_of, too_large
from eora_lab.calibrate.stream import BATCH
from eora_lab.compensate import needs_outputs
from eora_lab.environment import free_memory, own_memory
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import decoder_blocks, linears
from eora_lab.run.distil import SHARES, SUMS, sums
from eora_lab.run.groups import sharing
from eora_lab.run.recipe import Recipe

FLOAT, DOUBLE = 4, 8
MATRICES = 4  # of a layer's size, in float32: W, R, what is left of it, a temporary one
CHOLESKY = 6  # of S's size, in float64, that GPTQ's factor passes through
ITERATIVE = ("gptq", "sparsegpt")  # compressors that need it
EIGEN = 4  # of the smaller side's size squared, in float64: a matrix, its eigenvectors, LAPACK's workspace
SCORES = 6  # copies of logits while a loss and its gradient are taken, in float32
GRAPH = 1  # what gradients need of a block, in the inputs and outputs of its linears, in float32; 0.7 was measured
WIDTHS = 8  # activations of a mini-batch in a block, in its widest layer's outputs
SLACK = 2**28  # bytes: what libraries and the allocator keep
ADVICE = {
    "statistics of all blocks": "leave the budget out, which is planned on all of them",
    "statistics of a block": "measure one input at a time (--true-sequential), or hold out no samples",
    "statistics of gradients": "take a method that needs none (--method eora)",
    "gradients": "take shorter sequences (--calibration.seqlen), or a method that needs none (--method eora)",
    "distillation": "leave the step of distillation out",
    "hidden states": "keep them on disk (--hidden-states disk), or take fewer calibration tokens "
    "(--calibration.nsamples, --calibration.seqlen)",
    "activations": "take shorter sequences (--calibration.seqlen)",
    "work on a layer": "compress with rtn, which needs no factor of S, or take a machine with more memory",
}


def needed(
    model: nn.Module,
    recipe: Recipe,
    contract: Contract,
    tokens: tuple[int, int] | None,
    left: Container[str] = (),
    given: bool = False,
    spread: bool = False,
    on_disk: bool = False,
) -> dict[str, int]:
    """Bytes that a pass takes beside what the process holds, by what they are for; roughly, for the largest block.

    tokens: (nsamples, seqlen) that this process streams, or None where statistics are given.
    left: linears that stay as they are. given: W^ is.
    spread: a budget is spread over the layers first, for which the statistics of all blocks are held.
    on_disk: hidden states are, all but those of a mini-batch.
    """
    itemsize = next(model.parameters()).dtype.itemsize
    held = FLOAT * (2 if recipe.held_out else 1)
    each = held * (2 if recipe.inputs == "drift" else 1)  # S, and D
    every, statistics, gradients, work, widest, wide, pulls, paths = 0, 0, 0, 0, 0, 0, [0], 0
    for prefix, block in decoder_blocks(model).items():
        own = {f"{prefix}.{local}": linear for local, linear in linears(block).items()}
        inputs = {contract.shared.get(name, name): linear.in_features for name, linear in own.items()}
        drawn = 0
        for names in ([f"{prefix}.{local}" for local in mixture] for mixture in experts_of(block)):
            if too_large(len(names), own[names[0]].in_features):
                inputs = {name: size for name, size in inputs.items() if name not in names[1:]}
            else:
                drawn += 2 * min(JUDGED, len(names)) * own[names[0]].in_features ** 2
        sizes = [each * size**2 for size in inputs.values()]
        every += sum(sizes)
        block_needs = max(sizes, default=0) if recipe.true_sequential else sum(sizes) + FLOAT * drawn
        statistics = max(statistics, block_needs)
        chosen = [linear for name, linear in own.items() if name not in left]
        gradients += held * sum(linear.out_features**2 for linear in chosen)
        kept = sum(stored(linear, recipe, given) for linear in chosen)
        as_one = sharing([name for name in own if name not in left], contract, recipe.shares)
        shapes = [(sum(own[n].out_features for n in one), own[one[0]].in_features) for one in as_one]
        layers = [of_layer(*shape, recipe, given) for shape in shapes]
        dense = sum(linear.weight.nbytes for linear in chosen)  # as the compressed block runs on
        work = max([work, kept + dense, *(kept + needs for needs in layers)])
        widest = max([widest, *(linear.out_features for linear in own.values())])
        wide += sum(linear.in_features + linear.out_features for linear in own.values())
        pulls.append(sum(sums(linear.out_features, linear.in_features) for linear in chosen))
        paths += sum(2 * recipe.rank * (linear.in_features + linear.out_features) for linear in chosen)
    parts = {"statistics of all blocks": every} if spread else {"statistics of a block": statistics}
    if needs_outputs(recipe.method):
        parts["statistics of gradients"] = gradients
    if tokens is not None:
        config = getattr(model, "config", None)
        config = config.get_text_config() if config is not None else None
        hidden = getattr(config, "hidden_size", widest) * itemsize
        together = min(BATCH, tokens[0]) * tokens[1]
        streams = 2 if recipe.inputs == "drift" else 1
        parts["hidden states"] = streams * (together if on_disk else tokens[0] * tokens[1]) * hidden
        if needs_outputs(recipe.method) or recipe.distil:
            scores = min(LOGITS, together * getattr(config, "vocab_size", LOGITS))
            parts["gradients"] = min(GRAPH * wide * together * FLOAT, GRAPHS) + SCORES * scores * FLOAT
        if recipe.distil:
            targets = tokens[0] * tokens[1] * hidden
            measured = max(min(sum(pulls), SUMS), max(pulls))
            parts["distillation"] = targets + measured + (1 + len(SHARES)) * paths
        parts["activations"] = WIDTHS * together * widest * itemsize
    return parts | {"work on a layer": work + SLACK}


def stored(linear: nn.Linear, recipe: Recipe, given: bool) -> int:
    """Bytes of a compressed layer until its block is done: as packed, and its factors as stored and as multiplied."""
    size, sides = linear.weight.numel(), linear.in_features + linear.out_features
    bits = 8 if given else recipe.bits or 8  # given ones are rarely wider
    return size * bits // 8 + (2 + linear.weight.dtype.itemsize) * recipe.rank * sides


def of_layer(rows: int, columns: int, recipe: Recipe, given: bool) -> int:
    """Bytes while a layer, or those that share A, row under row, are compressed and compensated."""
    size = rows * columns
    judged = MATRICES * FLOAT * size
    compressed = 0 if given or recipe.compressor not in ITERATIVE else CHOLESKY * DOUBLE * columns**2 + 3 * FLOAT * size
    solved = 0
    if recipe.method != "none":  # W, R, and in float64, as a Krylov space may not do: R, R S, eigenvectors
        solved = 2 * (FLOAT + DOUBLE) * size + EIGEN * DOUBLE * min(rows, columns) ** 2
    return max(judged, compressed, solved)


def check_room(parts: Mapping[str, int], device: torch.device, sharing: int = 1) -> int:
    """The bytes that the process will hold at the most, as predicted: what it holds now, and `needed`.

    sharing: processes that need as much of this machine's memory; each has its own GPU.

    Raises EoraLabError where that is more than there is, naming what would make it fit: each of what alone would, or
    what is largest.
    """
    wanted, free = sum(parts.values()), free_memory(device)
    if free is not None and device.type == "cpu":
        free //= sharing
    if free is not None and wanted > free:
        largest = sorted(parts, key=parts.__getitem__, reverse=True)
        enough = [part for part in largest if wanted - parts[part] <= free] or largest[:1]
        raise EoraLabError(
            f"this pass needs about {wanted / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free, most of it for "
            f"{largest[0]} ({parts[largest[0]] / 1e9:.1f} GB): {'; or '.join(ADVICE[part] for part in enough)}"
        )
    held = own_memory() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    return held + wanted
