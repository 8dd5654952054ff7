"""Colours, markers and dashes: a method has its own everywhere, and nothing else has them.

All colours stand out by 3 to 1 or more from white and from the dark pages of JupyterLab and of the site, so that one
picture serves both; hence they are about equally light, and markers and dashes tell apart what colours may not.
"""

from typing import Any, NamedTuple

from eora_lab.compensate import SOLVERS

INK, PAPER = "#1f2328", "#ffffff"  # of texts and axes; on dark pages they change places, see `output`
DARK_INK, DARK_PAPER = "#e6e6e6", "#111111"  # the latter is JupyterLab's


class Look(NamedTuple):
    """How a series is drawn: any one of colour, marker and line tells it from the others."""

    colour: str
    marker: str
    line: str | tuple
    name: str = ""  # of a method


LOOKS = {
    "eora": Look("#009E73", "D", "-", "EoRA"),
    "svd": Look("#D17A00", "s", "--", "SVD"),
    "act_s": Look("#3A93D6", "^", "-.", "Act-S"),
    "qera_approx": Look("#D2649A", "X", (0, (3, 1)), "QERA-approx"),
    "lqer": Look("#D5480A", "P", (0, (5, 1, 1, 1, 1, 1)), "LQER"),
    "act_s_released": Look("#1B6FC2", "v", (0, (1, 2)), "Act-S (released)"),
    "none": Look("#868686", "o", ":", "no compensation"),
    "qera_exact": Look("#7468E0", "*", (0, (8, 2)), "QERA-exact"),
    "eora_fisher": Look("#B23FA6", "d", (0, (6, 2)), "EoRA, two-sided"),
    "eora_paper": Look("#8C7A00", "p", (0, (8, 2, 2, 2)), "EoRA (as printed)"),
}
# of methods that have none, such as those of plugins
OTHERS = (
    Look("#CF3A47", "<", (0, (1, 1, 5, 1))),
    Look("#009AA6", ">", (0, (4, 1, 1, 1))),
    Look("#5E8F00", "h", (0, (6, 1, 2, 1))),
    Look("#9B4DFF", "8", (0, (2, 1))),
)
# of all that is no method: compressors, bits, blocks, layers, texts; paler
SERIES = (
    Look("#5B80A8", "o", "-"),
    Look("#A8705A", "s", "--"),
    Look("#6B8A57", "^", "-."),
    Look("#8E6FA6", "D", ":"),
    Look("#A08436", "v", (0, (3, 1))),
    Look("#5A8F86", "P", (0, (5, 1, 1, 1, 1, 1))),
    Look("#AD6680", "X", (0, (1, 2))),
)


def method_name(method: str) -> str:
    """What a method is called in a figure: its own name where it has no other."""
    return LOOKS[method].name if method in LOOKS else method


def looks(series: list[Any]) -> dict[Any, Look]:
    """A look for every series: that of its name where it is a method, else one that no method has.

    Methods without a look of their own get one that no other method has.
    """
    methods = [one for one in series if one in SOLVERS and one not in LOOKS]
    rest = [one for one in series if one not in SOLVERS and one not in LOOKS]
    found = LOOKS | {one: OTHERS[i % len(OTHERS)] for i, one in enumerate(methods)}
    found |= {one: SERIES[i % len(SERIES)] for i, one in enumerate(rest)}
    return {one: found[one] for one in series}
