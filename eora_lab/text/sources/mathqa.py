"""MathQA (Amini et al. 2019): problem, choices and rationale, in the order of the authors' code.

A copy without the rationale column (as some mirrors have) gives the right choice in its place. The hub's
allenai/math_qa is a loading script, which `datasets` no longer runs; regisss/math_qa holds the same rows as parquet
(compared by hash in lm-evaluation-harness pull request 3943).
"""

import re

from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = " "
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The formatted problems; one whose right choice cannot be found is left out.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub, or holds something else.
    """
    columns = {"Problem": str, "options": str, "correct": str}
    return hub.texts(_format, "allenai/math_qa", "default", split, columns, hub_id="regisss/math_qa")


def _format(row: dict) -> str | None:
    question = f"Question: {row['Problem']} Choices: {row['options']}."
    if row.get("Rationale"):
        hub.expect(row["Rationale"], str, "Rationale")
        return f"{question} Rationale: {row['Rationale']}."
    answer = _choices(row["options"]).get(row["correct"])
    return f"{question} Answer: {row['correct']} ) {answer}." if answer else None


def _choices(options: str) -> dict[str, str]:
    """ "a ) 38 , b ) 27.675" -> {"a": "38", "b": "27.675"}; some rows hold the choices as a quoted list."""
    _, *pieces = re.split(r"(?:^|[\s,'\[])([a-e]) \) ", options)
    return {letter: text.strip(" ,'\"[]") for letter, text in zip(pieces[::2], pieces[1::2], strict=True)}
