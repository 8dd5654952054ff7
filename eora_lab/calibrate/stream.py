"""Walk a decoder block by block: find the blocks and their linears, and stream hidden states through them.

Only module structure is used (the list of blocks, `nn.Linear`, which linears are handed the same tensor), so any
decoder-only transformers model works and no architecture is named here. Models whose blocks cannot be run one by one
exactly are refused (`eora_lab.calibrate.contract`).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from eora_lab.calibrate.calls import BlockCalls
from eora_lab.calibrate.contract import Contract, check_blocks
from eora_lab.calibrate.experts import experts_of
from eora_lab.calibrate.hidden import HiddenFiles, HiddenStates
from eora_lab.calibrate.inputs import Inputs
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.environment import step
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import block_linears, decoder_blocks, linears
from eora_lab.model.unfold import unfold
from eora_lab.products import fast_products
from eora_lab.progress import each
from eora_lab.text.batches import Batches, as_tokens

BATCH = 4  # sequences that run through a block at once


class _Enough(Exception):
    pass


def in_mini_batches(
    tokens: Shaped[Tensor, "nsamples seqlen"], held_out: float
) -> list[tuple[Shaped[Tensor, "batch seqlen"], bool]]:
    """Parts of BATCH samples, each with whether it is held out, as the last ones are.

    Raises EoraLabError when the held-out share leaves no sample on one of its sides.
    """
    kept = len(tokens) - round(held_out * len(tokens))
    if held_out and not 0 < kept < len(tokens):
        raise EoraLabError(f"holding out {held_out} of {len(tokens)} samples leaves none on one side")
    sides = tokens.split([kept, len(tokens) - kept])
    return [(part, i == 1) for i in (0, 1) for part in sides[i].split(BATCH) if len(part)]


class BlockStream:
    """Hidden states of a token set on their way through the decoder.

    tokens:     (nsamples, seqlen) token ids; they travel in mini-batches of BATCH.
    held_out:   share of the samples, the last ones, that is measured apart.
    contract:   from `check_blocks`, where the blocks were tried before; else they are now.
    folder:     where hidden states are kept, in files that another stream may take up; None: in memory.
    processes:  that share the mini-batches: each streams its own.
    hidden:     the input of the next block, (..., batch, seqlen, hidden_size), one a mini-batch.
    numbers:    of these mini-batches among all.
    sizes:      how many tokens each has.
    apart:      whether it is of the held-out ones.
    Raises EoraLabError when the held-out share leaves no sample on one of its sides, and with the name of a block that
    cannot be run by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "nsamples seqlen"],
        held_out: float = 0.0,
        contract: Contract | None = None,
        folder: Path | None = None,
        processes: Processes = ALONE,
    ):
        self.blocks, self.processes = decoder_blocks(model), processes
        mini_batches = processes.share(in_mini_batches(tokens.to(next(model.parameters()).device), held_out))
        self.contract = contract = contract or check_blocks(model, tokens)
        self.numbers = [number for number, _ in mini_batches]
        self.sizes = [part.numel() for _, (part, _) in mini_batches]
        self.apart = [held for _, (_, held) in mini_batches]
        self._calls = BlockCalls(model, self.blocks, contract.rest)
        self._order: tuple[int, list[list[str]], dict[str, int]] = (-1, [], {})  # block, its `groups`, `_times`
        self.hidden = HiddenFiles(folder) if folder else HiddenStates()
        for _, (part, _) in mini_batches:
            with step("forward"):
                entered = self._calls.enter(part)
            self.hidden.append(entered)

    def resume(self, first: int) -> int:
        """Go on from kept hidden states, of block `first` or of the last one before. Returns the block that is next.

        That is the first one where none are kept, or blocks hand each other more than hidden states. Raises
        EoraLabError where files cannot be read back that were just written.
        """
        kept = self.kept() if self.hidden else list(range(first + 1))  # without texts there is nothing to keep
        kept = [index for index in kept if index <= first] if self._calls.alone else []
        every = self.processes.gather(kept)
        common = sorted((index for index in kept if all(index in one for one in every)), reverse=True)
        for index in common:
            with self.processes.agree():
                whole = self.take(index)
            if self.processes.all(whole):
                return index
        if common:  # even those of the first block: what is there now may be of any
            raise EoraLabError("hidden states do not come back from the disk as they were written: keep them in memory")
        return 0

    def kept(self) -> list[int]:
        """Blocks whose inputs lie in files, all of them."""
        return self.hidden.kept()

    def take(self, index: int) -> bool:
        """Let kept hidden states be the inputs of block `index`. Returns whether they are whole."""
        return self.hidden.take(index)

    def begin(self, index: int) -> None:
        """Block `index` is next; none of its linears is replaced yet."""
        self.hidden.begin(index)

    @step("forward")
    @torch.no_grad()
    def run(self, index: int, mini_batch: int) -> Float[Tensor, "... hidden"]:
        """Block `index`, as it is now, on the current hidden states of that mini-batch."""
        return self._calls.run(mini_batch, list(self.blocks)[index], self.hidden[mini_batch])

    @torch.no_grad()
    def watch(
        self,
        index: int,
        mini_batch: int,
        measured: Mapping[str, nn.Linear],
        hook: Callable[[str], Callable],
        times: Mapping[str, int] | None = None,
    ) -> tuple[Float[Tensor, "... hidden"] | None, dict[str, int]]:
        """Run block `index` with a forward pre-hook for each of its linears that are measured.

        times: name -> how often every token comes to it; the run ends once all have. None or empty: with the block.
        Returns what the block does, None where it was stopped before; and these times, as `_times` tells them.
        """
        came, size, waiting = Counter[str](), self.sizes[mini_batch], dict(times or {})

        def counted(name: str) -> Callable:
            inner = hook(name)

            def watching(module, args):
                inner(module, args)
                came[name] += vectors(args[0])
                if name in waiting and came[name] == waiting[name] * size:
                    del waiting[name]
                    if not waiting:
                        raise _Enough

            return watching

        with hooked(measured, counted):
            try:
                return self.run(index, mini_batch), _times(came, size)
            except _Enough:
                return None, dict(times or {})

    def outputs(self, index: int) -> Iterator[Float[Tensor, "... hidden"]]:
        """Run block `index` on the current hidden states, a mini-batch at a time."""
        for mini_batch in range(len(self.hidden)):
            yield self.run(index, mini_batch)

    def original_inputs(
        self,
        index: int,  # noqa: ARG002
        mini_batch: int,  # noqa: ARG002
        measured: Mapping[str, nn.Linear],  # noqa: ARG002
        times: Mapping[str, int] | None = None,  # noqa: ARG002
    ) -> Mapping[str, Float[Tensor, "... in"]]:
        """Full module name -> what the original model hands that linear, where this is known; see `DriftStream`."""
        return {}

    def groups(self, index: int) -> list[list[str]]:
        """The linears of block `index` in the order they run, those that are handed the same tensor together.

        So are those that the experts of a mixture have in common. Seen on the first mini-batch; what does not run there
        comes last, each alone.
        """
        if self._order[0] == index:
            return self._order[1]
        block = list(self.blocks.values())[index]
        seen: list[tuple[Tensor, list[str]]] = []
        came: Counter[str] = Counter()
        common = {name: names for names in experts_of(block) for name in names}

        def watch(name: str):
            def hook(_module, args):
                came[name] += vectors(args[0])
                if any(name in names for _, names in seen):  # it runs once more
                    return
                for x, names in seen:
                    if x is args[0]:
                        names += common.get(name, [name])
                        return
                seen.append((args[0], list(common.get(name, [name]))))

            return hook

        def ran() -> tuple[list[list[str]], dict[str, int]]:
            with hooked(linears(block), watch):
                next(self.outputs(index))
            return [names for _, names in seen], _times(came, self.sizes[0])

        groups, times = self.processes.first(ran)
        rest = [name for name in linears(block) if not any(name in group for group in groups)]
        groups += [list(group) for group in dict.fromkeys(tuple(common.get(name, [name])) for name in rest)]
        self._order = index, groups, times
        return groups

    def statistics(
        self,
        index: int,
        keep_outputs: bool,
        only: Sequence[str] | None = None,
        drift: bool = True,
        owners: Mapping[str, int] | None = None,
    ) -> dict[str, InputStatistics]:
        """Run block `index` and measure the input of each of its linears; full module name -> statistics.

        Linears that are handed the same tensor (q, k and v; gate and up) share one object; see `Inputs`.
        only: names within the block; others are left out.
        keep_outputs: let the outputs be the next block's input, as when the block is used uncompressed.
        drift: measure it too, where there is a stream that can.
        owners: full module name -> the process that gets its statistics, where there are several.
        Raises EoraLabError on NaN or Inf, naming the layer.
        """
        prefix = list(self.blocks)[index]
        block = self.blocks[prefix]
        mixtures, wanted = experts_of(block), set(linears(block) if only is None else only)
        # experts are measured together: what one sees counts for the others too
        needed = wanted.union(*(names for names in mixtures if wanted & set(names)))
        measured = {f"{prefix}.{name}": linear for name, linear in linears(block).items() if name in needed}
        inputs = Inputs(measured, [[f"{prefix}.{name}" for name in names] for names in mixtures], self.contract.apart)
        known, _, seen = self._order
        times: dict[str, int] = {}
        if known == index and not keep_outputs and needed <= seen.keys():
            times = {f"{prefix}.{name}": seen[name] for name in needed}
        with self.processes.agree():
            for i, held_out in enumerate(self.apart):
                original = self.original_inputs(index, i, measured, times) if drift else {}
                inputs.begin(self.numbers[i], held_out, original)
                output, seen = self.watch(index, i, measured, inputs.hook, times)
                if keep_outputs:
                    assert output is not None
                    self.hidden[i] = output
                else:
                    times = seen if seen.keys() == measured.keys() else {}
        found = inputs.found(self.processes, owners)
        return {name: one for name, one in found.items() if name.removeprefix(f"{prefix}.") in wanted}

    def advance(self, index: int) -> None:
        """Let the outputs of block `index`, as it is now, be the next block's input."""
        with self.processes.agree():
            for i, output in enumerate(self.outputs(index)):
                self.hidden[i] = output


def vectors(x: Float[Tensor, "... in"]) -> int:
    """How many there are."""
    return x.numel() // x.shape[-1]


def _times(came: Mapping[str, int], size: int) -> dict[str, int]:
    """Name -> how often all `size` tokens came to a linear; without those that some did not come to."""
    return {name: count // size for name, count in came.items() if not count % size}


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[[str], Callable]) -> Iterator[None]:
    """Forward pre-hooks of modules by their names, within this context."""
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@fast_products()
def collect_statistics(
    model: nn.Module,
    batches: Batches,
    held_out: float = 0.0,
    progress: bool = True,
    only: str = "",
    processes: Processes = ALONE,
    owners: Mapping[str, int] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of every block linear of the model as it is; module name -> InputStatistics.

    Linears that are no plain product to the model (`Contract.left`), which no pass compresses, have none.

    batches:  token ids (nsamples, seqlen): a tensor, an array, or a list of sequences.
    held_out: share of the samples, the last ones, that is measured apart (`.held_out`).
    only:     regular expression; layers whose name it does not match are not measured, and the pass ends after the last
              that is.
    processes: that share the batches, each with the same model.
    owners:   module name -> the one of them that gets its statistics.
    Shared inputs share one object. Holds the statistics of all blocks; `compress_model` needs one block's at a time.
    Raises EoraLabError when no layer matches, when these are no token ids of the model, and with the name of a block
    that cannot be run by itself.
    """
    unfold(model)
    decoder_blocks(model)  # is it such a model at all
    stream = BlockStream(model, as_tokens(model, batches), held_out, processes=processes)
    wanted = [
        [
            name
            for name in linears(block)
            if re.search(only, f"{prefix}.{name}") and f"{prefix}.{name}" not in stream.contract.left
        ]
        for prefix, block in stream.blocks.items()
    ]
    if not any(wanted):
        raise EoraLabError(f"no layer matches {only!r}; names are like {next(iter(block_linears(model)))}")
    last = max(index for index, names in enumerate(wanted) if names)
    found: dict[str, InputStatistics] = {}
    for index in each(range(last + 1), "statistics", "block", progress):
        if wanted[index]:
            found |= stream.statistics(index, True, wanted[index], owners=owners)
        else:
            stream.advance(index)
    return found
