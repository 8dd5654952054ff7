"""The walk: block by block, measure the inputs, compress the weights, compensate the error, move on.

One block's statistics are held at a time. Linears that share an input share its statistics.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.drift import DriftStream, put
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import BlockStream
from eora_lab.compensate.factors import with_shared
from eora_lab.errors import EoraLabError
from eora_lab.files import read_ahead
from eora_lab.layer.linear import CompensatedLinear, unpacked
from eora_lab.model.structure import decoder_blocks, linear_at, linears
from eora_lab.progress import each, pause
from eora_lab.run.fit import Steps
from eora_lab.run.folder import RunFolder
from eora_lab.run.groups import with_ranks
from eora_lab.run.linear import compress_linears
from eora_lab.run.report import LayerReport

SHARES = (1.0, 0.0)  # of the step towards the original's outputs, that a block is made with; the better one is kept


def walk(
    model: nn.Module,
    tokens: Int[Tensor, "nsamples seqlen"] | None,
    steps: Steps,
    ranks: dict[str, int] | None,
    statistics: Mapping[str, InputStatistics] | None,
    run: RunFolder | None,
    contract: Contract,
    left: Container[str],
    progress: bool,
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
) -> list[LayerReport]:
    """Compress all blocks, and put their layers in place; what the run folder holds already, from there.

    With a run folder the original linears come back once a block is done, and all blocks are put in place from their
    files in the end. Both may be files that the system maps into memory, so that no more than one block takes any.
    Finished blocks are run again to get to the others, unless the folder keeps hidden states.

    The arguments are those of `compress_model`, checked. ranks: module name -> rank; None: those of the recipe.
    contract: of the model. left: linears that stay as they are.
    processes: that share the work, by the owners of linears.
    """
    recipe, blocks = steps.recipe, decoder_blocks(model)
    todo = [index for index in range(len(blocks)) if not (run and run.has_block(index))]
    stream: BlockStream | None = None
    start, hidden = 0, run.hidden if run else None
    if tokens is not None and statistics is None and todo:
        with processes.agree():
            if recipe.inputs == "drift":
                stream = DriftStream(model, tokens, recipe.held_out, contract, hidden)
            else:
                stream = BlockStream(model, tokens, recipe.held_out, contract, hidden, processes)
        start = stream.resume(todo[0])
    needed = range(start, todo[-1] + 1) if todo else range(0)
    ranks = recipe.ranks(model, left) if ranks is None else ranks
    one = _Blocks(model, blocks, steps, ranks, left, contract, stream, statistics or {}, processes, owners or {})
    reports: list[LayerReport] = []
    for index, block in enumerate(each(blocks.values(), "compress", "block", progress)):
        originals = linears(block)
        moving = stream if stream and index in needed else None
        if moving:
            moving.begin(index)
        if run and index not in todo:
            if moving and recipe.inputs == "original":
                moving.advance(index)
            reports += run.load_block(index, model)
        else:
            made = one.with_drift(index, stream) if isinstance(stream, DriftStream) else one.compress(index)
            if run:
                run.save_block(index, made.modules, made.layers)
            reports += made.layers
        if index + 1 in needed:  # not before: while layers are solved, memory may be short
            read_ahead(list(blocks.values())[index + 1].parameters())
        if moving and recipe.inputs != "original" and index < todo[-1]:
            with unpacked(block):
                moving.advance(index)
        if run:
            put(block, originals)
    if run:
        run.drop_hidden()
        run.load_blocks(model)
    return reports


@dataclass
class _Made:
    """A block's compressed layers by name, in place, and what the report says of them."""

    modules: dict[str, CompensatedLinear]
    layers: list[LayerReport]


@dataclass
class _Blocks:
    """How blocks are compressed. known: statistics that were measured before, where no stream measures them."""

    model: nn.Module
    blocks: Mapping[str, nn.Module]
    steps: Steps
    ranks: Mapping[str, int]
    left: Container[str]
    contract: Contract
    stream: BlockStream | None
    known: Mapping[str, InputStatistics]
    processes: Processes
    owners: Mapping[str, int]

    def compress(self, index: int, share: float = 1.0, known: Mapping[str, InputStatistics] | None = None) -> _Made:
        """Compress block `index`. share: of its drift. known: its statistics, where they were measured before."""
        prefix, block = list(self.blocks.items())[index]
        recipe, stream, made = self.steps.recipe, self.stream if known is None else None, _Made({}, [])
        original = recipe.inputs == "original"
        for locals_ in stream.groups(index) if stream and recipe.true_sequential else [list(linears(block))]:
            chosen = [local for local in locals_ if f"{prefix}.{local}" not in self.left]
            if not chosen and not original:
                continue
            found = (
                stream.statistics(index, original, chosen, share > 0, self.owners) if stream else known or self.known
            )
            names = [f"{prefix}.{local}" for local in chosen]
            own = _Made({}, [])
            with self.processes.agree():
                for together, rank in with_ranks(names, self.ranks, self.contract, recipe.shares):
                    pause()
                    first = together[0]
                    if self.owners.get(first, 0) != self.processes.rank:
                        continue
                    if first not in found:
                        raise EoraLabError(f"{first}: no statistics")
                    made_here = compress_linears(self.model, together, found[first], self.steps, rank, share)
                    own.modules |= {layer.name: module for module, layer in made_here}
                    own.layers += [layer for _, layer in made_here]
            del found
            self._exchange(own)
            made.modules |= {name: own.modules[name] for name in names}
            made.layers += sorted(own.layers, key=lambda layer: names.index(layer.name))
        return made

    def _exchange(self, own: _Made) -> None:
        """Put in place, and add, what the other processes made of the linears that they own."""
        if self.processes.count == 1:
            return
        packed = {f"{name}.{key}": t.cpu() for name, m in own.modules.items() for key, t in m.stored().items()}
        for rank, (tensors, layers) in enumerate(self.processes.gather((packed, list(own.layers)))):
            if rank == self.processes.rank:
                continue
            own.layers += layers
            tensors = with_shared(tensors)
            for name in (layer.name for layer in layers):
                stored = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
                own.modules[name] = CompensatedLinear.from_stored(stored, linear_at(self.model, name))
        put(self.model, own.modules)

    def with_drift(self, index: int, stream: DriftStream) -> _Made:
        """Compress block `index` with the share of the drift that leaves least of it on held-out tokens.

        No share at all is not tried where the step leaves less than even the uncompressed block would without it.
        """
        prefix, block = list(self.blocks.items())[index]
        known = None
        if not self.steps.recipe.true_sequential:  # the same for all shares
            chosen = [name for name in linears(block) if f"{prefix}.{name}" not in self.left]
            known = stream.statistics(index, False, chosen) if chosen else {}
        best, lowest = None, math.inf
        for share in SHARES:
            made = self.compress(index, share, known)
            if not any(layer.drift for layer in made.layers) and best is None:
                return made  # there is none, as in the first block
            with unpacked(block):
                loss = stream.loss(index)
            if best is None or loss < lowest:
                best, lowest = made, loss
            stream.restore(index)
            if share and lowest < stream.loss(index):
                break
        assert best is not None
        put(self.model, best.modules)
        return best
