"""A claim of README or guides: words with measured numbers in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from docs.records import Numbers
from eora_lab.run.intervals import Interval


@dataclass(frozen=True)
class Claim:
    """Words of a text with a format field for every number; lines and columns do not count."""

    text: str
    record: str
    numbers: Callable[[Any], Numbers]  # from the record


def interval(one: Interval) -> Numbers:
    return one.difference, one.low, one.high


SPAN = "{:+.3f} [{:+.3f}, {:+.3f}]"
