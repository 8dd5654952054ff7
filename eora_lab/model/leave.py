"""Which linears stay as they are by choice: by pattern, by block, and those that choose where tokens go."""

import re

from torch import nn

from eora_lab.errors import EoraLabError, meant
from eora_lab.model.structure import decoder_blocks, linears

SHOWN = 8  # last parts of names that an error lists

# Whole parts of a name that tell what chooses for the layers around it. They are small, and no low-rank correction of
# their output makes a wrong choice good.
DEFAULTS: dict[str, str] = {
    "router": r"(?<![^.])(gate|router)(?![^.])",  # picks the experts that a token goes to
    "indexer": r"(?<![^.])indexer(?![^.])",  # of sparse attention: picks the tokens that are read
}
ONE_ROW = "one row"  # one output: a number by which a token's others are scaled, such as the gate of a shared expert


def by_default(name: str, module: nn.Module) -> tuple[str, int]:
    """Why a module is left unless it is asked for, and where the part of its name begins that says so.

    No reason and -1 for all others.
    """
    for reason, pattern in DEFAULTS.items():
        if found := re.search(pattern, name):
            return reason, found.start()
    if isinstance(module, nn.Linear) and module.out_features == 1:
        return ONE_ROW, name.rfind(".") + 1
    return "", -1


def left_by_choice(
    model: nn.Module, skip: str = "", only: str = "", keep_first: int = 0, keep_last: int = 0
) -> dict[str, str]:
    """Module name -> why it stays as it is, of the decoder blocks: linears, and routers that are none.

    skip:       regular expression; linears whose full name it matches stay.
    only:       regular expression; linears whose full name it does not match stay. Those of `DEFAULTS` and of one row
                are compressed where a match reaches into the part of the name that tells them.
    keep_first: blocks at the start that stay; keep_last: at the end.
    Raises EoraLabError where a pattern matches nothing, or nothing is left to compress.
    """
    blocks = decoder_blocks(model)
    names: list[str] = []
    left: dict[str, str] = {}
    matched = {"skip": not skip, "only": not only}
    for index, (prefix, block) in enumerate(blocks.items()):
        own = [f"{prefix}.{local}" for local in linears(block)]
        names += own
        for name, module in block.named_modules(prefix=prefix):
            default, start = by_default(name, module)
            if name not in own and not (default and next(module.parameters(recurse=False), None) is not None):
                continue
            ends = [found.end() for found in re.finditer(only, name)]
            skipped = bool(skip and re.search(skip, name))
            matched = {"skip": matched["skip"] or skipped, "only": matched["only"] or bool(ends)}
            reasons = {
                default: bool(default) and not (only and max(ends, default=0) > start),
                "first blocks": index < keep_first,
                "last blocks": index >= len(blocks) - keep_last,
                "skip": skipped,
                "only": not ends,
            }
            if reason := next((reason for reason, holds in reasons.items() if holds), ""):
                left[name] = reason
    for setting, pattern in (("skip", skip), ("only", only)):
        if not matched[setting]:
            raise EoraLabError(
                f"{setting} {pattern!r} matches no linear in the decoder blocks: {_named(names, pattern)}"
            )
    if left.keys() >= set(names):
        why = ", ".join(dict.fromkeys(left[name] for name in names))
        asked = {"skip": skip, "only": only, "keep_first": keep_first, "keep_last": keep_last}
        by = ", ".join(f"{setting} {value}" for setting, value in asked.items() if value) or "the defaults"
        raise EoraLabError(f"nothing is left to compress in the {len(blocks)} blocks by {by} ({why}): {_named(names)}")
    return left


def _named(names: list[str], pattern: str = "") -> str:
    """What linears are called, for a message about a pattern."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    more = ", ..." if len(last) > SHOWN else ""
    return f"names are like {names[0]}, and end in {', '.join(last[:SHOWN])}{more}{meant(pattern, last)}"
