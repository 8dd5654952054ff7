"""Two streams through the decoder: the hidden states of the model as it is now, and those of the original beside them.

What an input has become since the first block, x̂, is measured together with what it was, x (QEP, arXiv 2504.09629, and
GPTAQ, arXiv 2504.02692). One block's original linears, and one mini-batch's original inputs, are held at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.contract import Contract
from eora_lab.calibrate.experts import experts_of
from eora_lab.calibrate.stream import BlockStream
from eora_lab.model.structure import linears


class DriftStream(BlockStream):
    """The stream of a model that is compressed block by block; beside it, that of the original.

    `begin` has to be called for every block in turn, before any of its linears is replaced. Statistics then have
    `drift`; not those of experts, to which both models may send other tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "nsamples seqlen"],
        held_out: float = 0.0,
        contract: Contract | None = None,
        folder: Path | None = None,
    ):
        super().__init__(model, tokens, held_out, contract, folder)
        self._other = BlockStream(model, tokens, held_out, self.contract, folder and folder / "original")
        self._linears: dict[str, nn.Linear] = {}

    def kept(self) -> list[int]:
        """See `BlockStream`; with those of the original, too."""
        return [index for index in super().kept() if index in self._other.kept()]

    def take(self, index: int) -> bool:
        """See `BlockStream`; those of the original, too."""
        return super().take(index) and self._other.take(index)

    def begin(self, index: int) -> None:
        """Remember block `index` as it is: uncompressed."""
        super().begin(index)
        self._other.begin(index)
        self._linears = linears(list(self.blocks.values())[index])

    def restore(self, index: int) -> None:
        """Put the linears back in block `index` that it had at `begin`."""
        put(list(self.blocks.values())[index], self._linears)

    @contextmanager
    def _original(self, index: int) -> Iterator[None]:
        """Block `index` as it was, within this context."""
        block = list(self.blocks.values())[index]
        now = {name: block.get_submodule(name) for name in self._linears}
        try:
            self.restore(index)
            yield
        finally:
            put(block, now)

    def original_inputs(
        self,
        index: int,
        mini_batch: int,
        measured: Mapping[str, nn.Linear],
        times: Mapping[str, int] | None = None,
    ) -> Mapping[str, Float[Tensor, "... in"]]:
        """Full module name -> x, for linears that every token comes to. times: as for `watch`."""
        prefix, block = list(self.blocks.items())[index]
        routed = {f"{prefix}.{name}" for names in experts_of(block) for name in names}
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable:
            return lambda _module, args: found.update({name: args[0]})

        with self._original(index):
            self._other.watch(index, mini_batch, measured, note, times)
        every = self.sizes[mini_batch]
        return {name: x for name, x in found.items() if name not in routed and x.numel() == every * x.shape[-1]}

    def advance(self, index: int) -> None:
        """Let the outputs of block `index`, as it is now and as it was, be the next block's inputs."""
        super().advance(index)
        with self._original(index):
            self._other.advance(index)

    def loss(self, index: int) -> float:
        """Of block `index` as it is now: mean over held-out tokens of |h - ĥ|² / |h|², h what the original returns.

        Infinite where hidden states are not finite.
        """
        total, count = 0.0, 0
        for mini_batch in (i for i, apart in enumerate(self.apart) if apart):
            with self._original(index):
                wanted = self._other.run(index, mini_batch).double()
            off = self.run(index, mini_batch).double() - wanted
            share = off.square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)
            total, count = total + share.nan_to_num(nan=math.inf, posinf=math.inf).sum().item(), count + share.numel()
        return total / max(count, 1)


def put(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in place, by their names in the block or model."""
    for name, module in modules.items():
        root.set_submodule(name, module)
