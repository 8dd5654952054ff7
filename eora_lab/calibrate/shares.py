"""Statistics of which every process measured a share: added up at one place, and handed to the owners of the linears.

Sums are added up, which are the same in any order (`eora_lab.calibrate.moments`); what is made of them is made once.
Those of the experts of a mixture come together at one place, for they are drawn towards each other.
"""

from collections.abc import Mapping
from typing import NamedTuple

from eora_lab.calibrate.experts import Halves
from eora_lab.calibrate.moments import M, Moments
from eora_lab.calibrate.processes import Processes
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.errors import EoraLabError


class Seen(NamedTuple):
    """What a process saw of a linear: the first linear that shares its statistics, and tokens of their parts."""

    first: str
    tokens: list[int]
    held_out: int | None

    @property
    def any(self) -> int:
        """Tokens in all; 0 where none came."""
        return sum(self.tokens) + (self.held_out or 0)


def add_up(
    found: dict[str, M],
    halves: dict[int, Halves],
    mixtures: list[list[str]],
    owners: Mapping[str, int],
    processes: Processes,
) -> dict[str, int]:
    """Add the statistics of all processes up, in place. Returns module name -> the process that has them then.

    found:    module name -> statistics, of the same modules in the same order everywhere.
    halves:   id of statistics -> the two parts that they are measured in.
    mixtures: names of linears that experts have in common; their statistics come to one process.
    owners:   module name -> the process that compresses it, of those that matter.
    Elsewhere statistics are empty afterwards. Raises EoraLabError where linears share their input in one process alone.
    """
    every = processes.gather(_seen(found, halves))
    place = {name: i for i, name in enumerate(found)}
    first = {name: min((seen[name].first for seen in every), key=place.__getitem__) for name in found}
    with processes.agree():
        for name in found:
            if any(seen[name].any and seen[name].first != first[name] for seen in every):
                raise EoraLabError(f"{name} shares its input with {first[name]} now and then: run it in one process")
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault(first[name], []).append(name)
    homes = _homes(groups, first, mixtures, owners)
    for one, names in groups.items():
        statistics, home = found[one], homes[one]
        told = [max((seen[name] for name in names), key=lambda what: what.any) for seen in every]
        for part, tokens in _parts(statistics, halves, told):
            if tokens:
                processes.add_up(part.sums(), home)
            part.tokens = tokens
        if home != processes.rank:
            halves.pop(id(statistics), None)
            statistics = _empty(statistics)
        found.update(dict.fromkeys(names, statistics))
    return {name: homes[first[name]] for name in found}


def hand_out(
    found: Mapping[str, M], homes: Mapping[str, int], owners: Mapping[str, int], processes: Processes
) -> dict[str, M]:
    """Module name -> statistics, of the linears that this process owns. homes: from `add_up`."""
    groups: dict[int, list[str]] = {}
    for name in found:
        groups.setdefault(id(found[name]), []).append(name)
    for names in groups.values():
        one, home = found[names[0]], homes[names[0]]
        for to in sorted({owners[name] for name in names if name in owners} - {home}):
            if processes.rank in (home, to):
                _hand_over(one, home, to, processes)
    return {name: one for name, one in found.items() if owners.get(name) == processes.rank}


def _hand_over(one: Moments, source: int, to: int, processes: Processes) -> None:
    """Write the statistics of process `source` into those of process `to`, which are empty."""
    held = one.held_out.tokens if one.held_out else None
    one.tokens, one.pooled_tokens, held = processes.hand_over((one.tokens, one.pooled_tokens, held), source, to)
    if held is not None and one.held_out is None:
        one.held_out = _empty(one)
        one.held_out.tokens = held
    for part in filter(None, (one, one.held_out)):
        for mean in part.means().values():
            processes.hand_over(mean, source, to)


def _seen(found: Mapping[str, M], halves: Mapping[int, Halves]) -> dict[str, Seen]:
    first: dict[int, str] = {}
    seen = {}
    for name, one in found.items():
        parts = halves[id(one)].parts if id(one) in halves else [one]
        tokens = [part.tokens for part in parts]
        seen[name] = Seen(first.setdefault(id(one), name), tokens, one.held_out.tokens if one.held_out else None)
    return seen


def _homes(
    groups: Mapping[str, list[str]], first: Mapping[str, str], mixtures: list[list[str]], owners: Mapping[str, int]
) -> dict[str, int]:
    """The first of those that share statistics -> the process where they are added up."""
    homes: dict[str, int] = {}
    for names in mixtures:
        members = {first[name] for name in names}
        known = [homes[one] for one in members if one in homes]  # gate and up of an expert share theirs
        homes |= dict.fromkeys(members, known[0] if known else owners.get(names[0], 0))
    for one, names in groups.items():
        homes.setdefault(one, next((owners[name] for name in names if name in owners), 0))
    return homes


def _parts(one: Moments, halves: dict[int, Halves], told: list[Seen]) -> list[tuple[Moments, int]]:
    """The parts of these statistics that any process has, with the tokens of all."""
    counts = [sum(counts) for counts in zip(*(seen.tokens for seen in told if seen.any), strict=True)] or [0]
    parts: list[Moments] = [one]
    if len(counts) > 1:
        assert isinstance(one, InputStatistics)
        parts = [*halves.setdefault(id(one), Halves(one)).parts]
    held_out = [seen.held_out for seen in told if seen.held_out is not None]
    if held_out:
        one.held_out = one.held_out or _empty(one)
        parts.append(one.held_out)
        counts.append(sum(held_out))
    return list(zip(parts, counts, strict=True))


def _empty(one: M) -> M:
    return type(one)(one.features, one.device, one.name)
