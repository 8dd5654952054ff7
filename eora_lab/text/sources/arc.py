"""ARC (Clark et al. 2018): science questions, each followed by the text of its right answer.

The authors' code writes "question answer. " and takes 20 sequences of ARC-Easy for 10 of ARC-Challenge. The two train
sets stand at 2,251 to 1,119, so shuffling them together gives the same 2 to 1.
"""

from eora_lab.errors import EoraLabError
from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = " "
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The examples of ARC-Easy, then those of ARC-Challenge.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub, or holds something else.
    """
    columns = {"question": str, "choices": dict, "answerKey": str}
    sets = (hub.texts(_format, "allenai/ai2_arc", config, split, columns) for config in ("ARC-Easy", "ARC-Challenge"))
    return [text for one in sets for text in one]


def _format(row: dict) -> str:
    labels, choices, key = (row["choices"].get("label"), row["choices"].get("text"), row["answerKey"])
    hub.expect(labels, list, "label of choices")
    hub.expect(choices, list, "text of choices")
    if len(labels) != len(choices) or labels.count(key) != 1:
        raise EoraLabError(f"{len(choices)} choices with the labels {labels}, and the answer {key!r}")
    answer = choices[labels.index(key)]
    hub.expect(answer, str, "the answer")
    return f"{row['question']} {answer}."
