"""ARC (Clark et al. 2018): science questions, each followed by the text of its right answer.

The authors' code writes "question answer. " and takes 20 sequences of ARC-Easy for 10 of ARC-Challenge. The two train
sets stand at 2,251 to 1,119, so shuffling them together gives the same 2 to 1.
"""

from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = " "
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The examples of ARC-Easy, then those of ARC-Challenge.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub.
    """
    columns = ["question", "choices", "answerKey"]
    easy, challenge = (hub.rows("allenai/ai2_arc", config, split, columns) for config in ("ARC-Easy", "ARC-Challenge"))
    return [_format(row) for row in easy + challenge]


def _format(row: dict) -> str:
    answers = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return f"{row['question']} {answers[row['answerKey']]}."
