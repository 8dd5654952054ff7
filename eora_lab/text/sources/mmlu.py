"""MMLU (Hendrycks et al. 2021): the dev questions of all 57 subjects with the letter of the answer, in lm-eval's form.

The authors' example for MMLU takes the validation split, `mmlu:validation` here; dev is the split meant for prompts.
"""

from eora_lab.errors import EoraLabError
from eora_lab.text import hub

DEFAULT_SPLIT = "dev"
JOIN = "\n\n"
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The formatted questions of the split, subject by subject.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub, or holds something else.
    """
    columns = {"question": str, "choices": list, "answer": int}
    return hub.texts(_format, "cais/mmlu", "all", split, columns, mirror_configs=["*"])


def _format(row: dict) -> str:
    for choice in row["choices"]:
        hub.expect(choice, str, "a choice")
    if len(row["choices"]) != 4 or row["answer"] not in range(4):
        raise EoraLabError(f"{len(row['choices'])} choices and the answer {row['answer']}, not 4 and one of 0 to 3")
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}\nAnswer: {'ABCD'[row['answer']]}"
