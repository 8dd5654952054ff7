"""Measure the inputs of linears while their block runs: who shares an input, what is held out, what experts pool."""

from collections.abc import Callable, Container, Mapping

from torch import Tensor, nn

from eora_lab.calibrate.experts import Halves, draw_together, judged, too_large
from eora_lab.calibrate.processes import ALONE, Processes
from eora_lab.calibrate.shares import add_up, hand_out
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.environment import step


class Inputs:
    """Statistics of linears, a mini-batch after the other.

    Linears that are handed the same tensor (q, k and v; gate and up) share one object. Those of experts are drawn
    towards each other in the end (`draw_together`), or share one where they would take too much memory.

    linears:  full module name -> linear.
    mixtures: names of those that the experts of a mixture have in common.
    apart:    names of those that share an input with another one now and then: they have statistics of their own.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], mixtures: list[list[str]], apart: Container[str] = ()):
        self._linears, self._apart = linears, apart
        self._mixtures = [names for names in mixtures if all(name in linears for name in names)]
        self._one_for_all = {
            name: names[0]
            for names in self._mixtures
            if too_large(len(names), linears[names[0]].in_features)
            for name in names
        }
        self._in_halves = {name for names in self._mixtures for name in judged(names) if name not in self._one_for_all}
        self._found: dict[str, InputStatistics] = {}
        self._halves: dict[int, Halves] = {}
        self._seen: list[tuple[Tensor, InputStatistics]] = []  # of this mini-batch; held so that no id is reused
        self._mini_batch, self._held_out = 0, False
        self._originals: Mapping[str, Tensor] = {}

    def begin(self, mini_batch: int, held_out: bool, originals: Mapping[str, Tensor]) -> None:
        """What comes now is of that mini-batch.

        held_out:  it is measured apart.
        originals: full module name -> input of that linear in the original model, token by token the same.
        """
        self._seen.clear()
        self._mini_batch, self._held_out, self._originals = mini_batch, held_out, originals

    def hook(self, name: str) -> Callable:
        """A forward pre-hook for the linear of that name."""

        @step("statistics")
        def watch(_module, args):
            x, apart = args[0], name in self._apart
            shared = next((statistics for tensor, statistics in self._seen if tensor is x and not apart), None)
            if name not in self._found:
                self._found[name] = shared or self._start(name, x)
            if (one := self._found[name]) is not shared:
                if not apart:
                    self._seen.append((x, one))
                part = self._part(one)
                part.update(x)
                part.update_drift(x, self._originals.get(name))

        return watch

    def _start(self, name: str, x: Tensor) -> InputStatistics:
        """The statistics of a linear that runs for the first time."""
        first = self._one_for_all.get(name, name)
        if first not in self._found:
            self._found[first] = one = InputStatistics(x.shape[-1], x.device, name)
            if name in self._in_halves:
                self._halves[id(one)] = Halves(one)
        return self._found[first]

    def _part(self, one: InputStatistics) -> InputStatistics:
        """Where the tokens of this mini-batch belong."""
        if self._held_out:
            if one.held_out is None:
                one.held_out = InputStatistics(one.in_features, one.device, one.name)
            return one.held_out
        in_two = self._halves.get(id(one))
        return in_two.parts[self._mini_batch % 2] if in_two else one

    @step("statistics")
    def found(
        self, processes: Processes = ALONE, owners: Mapping[str, int] | None = None
    ) -> dict[str, InputStatistics]:
        """Module name -> statistics, in the end; of 0 tokens where none came.

        processes: that measured a share each. owners: module name -> the process that gets its statistics, of theirs.
        """
        for name, linear in self._linears.items():
            if name not in self._found:
                self._found[name] = InputStatistics(linear.in_features, linear.weight.device, name)
        found, homes = self._found, dict[str, int]()
        if processes.count > 1:
            found = self._found = {name: found[name] for name in self._linears}
            homes = add_up(found, self._halves, self._mixtures, owners or {}, processes)
        for halves in self._halves.values():
            halves.join()
        drawn: set[int] = set()
        for names in self._mixtures:
            members = {id(found[name]): found[name] for name in names}
            here = homes.get(names[0], processes.rank) == processes.rank
            if here and len(members) > 1 and not drawn & members.keys():  # w1 and w3 of an expert share one
                draw_together(members.values(), [self._halves[one] for one in members if one in self._halves])
                drawn |= members.keys()
        return hand_out(found, homes, owners or {}, processes) if homes else found
