"""What a grid asks, and what its answers cost, in words made from the cells."""

from typing import TYPE_CHECKING

from eora_lab.plots import method_name
from eora_lab.plots.findings import touched, varied
from eora_lab.plots.scales import AXES, value_name
from eora_lab.plots.words import listed

if TYPE_CHECKING:
    import pandas

SHARED = (
    *("model", "compressor", "bits", "grid", "group_size", "sparsity", "method", "rank", "inputs", "source"),
    *("nsamples", "seqlen", "windows", "window_length", "limit"),
)  # settings that are told where all cells have the same
LISTED = 8  # values of a setting that are named
MINUTES = 120  # up to which seconds are told


def question(frame: "pandas.DataFrame", measures: list[str]) -> dict:
    """What a grid asks: a sentence, the settings that it varies with their values, and what all cells share."""
    if not len(frame):
        return {"sentence": "The store has no cells yet", "varied": [], "shared": ""}
    different = varied(frame)
    axes = []
    for name in different:
        found = frame.loc[touched(frame, name), name].dropna().drop_duplicates().tolist()
        numbers = all(isinstance(value, int | float) for value in found)
        values = [_of(name, value) for value in (sorted(found) if numbers else found)]
        more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
        axes.append([_axis(name), ", ".join(values[:LISTED]) + more])
    what = listed(measures) if measures else "the result"
    sentence = f"How does {what} depend on {listed(axis for axis, _ in axes)}?" if axes else f"What is {what}?"
    shared = [name for name in SHARED if name in frame and frame[name].dropna().map(str).nunique() == 1]
    if set(frame["method"].dropna()) == {"none"}:
        shared = [name for name in shared if name != "rank"]
    told = [f"{_axis(name)} {_of(name, frame[name].dropna().iloc[0])}" for name in shared if name not in different]
    return {"sentence": sentence, "varied": axes, "shared": "; ".join(told)}


def _axis(name: str) -> str:
    return AXES.get(name, name.replace("_", " "))


def _of(name: str, value: object) -> str:
    return method_name(str(value)) if name == "method" else value_name(name, value)


def told_cost(found: list[dict]) -> list[str]:
    """Time, memory, and what machine and code the numbers come from; more than one is said."""
    done = [one for one in found if one["status"] == "done"]
    times = [one["cost"]["total"] for one in done if "total" in one["cost"]]
    if not times:
        return []
    peak = max((one["cost"].get("peak_memory", 0) for one in done), default=0)
    count = f"{len(times)} cell{'' if len(times) == 1 else 's'}"
    lines = [f"{count} took {duration(sum(times))} in all, the longest {duration(max(times))}"]
    if peak:
        lines[0] += f"; at most {peak / 1e9:.1f} GB of memory"
    machines = {_machine(one["environment"].get("machine", {})) for one in done}
    lines.append(f"machine: {'; '.join(sorted(machines))}")
    commits = sorted({str(one["environment"].get("commit", ""))[:10] for one in done} - {""})
    if commits:
        lines.append(f"code: {', '.join(commits)}" + (" (not all of the same)" if len(commits) > 1 else ""))
    return lines


def _machine(machine: dict) -> str:
    device = machine.get("gpu") or machine.get("processor") or "unknown"
    threads = machine.get("threads", "?")
    return f"{device}, {threads} thread{'' if threads == 1 else 's'}"


def duration(seconds: float) -> str:
    """Time in the unit that a reader expects."""
    if seconds < MINUTES:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < MINUTES else f"{minutes / 60:.1f} h"
