"""MMLU (Hendrycks et al. 2021): the dev questions of all 57 subjects with the letter of the answer, in lm-eval's form.

The authors' example for MMLU takes the validation split, `mmlu:validation` here; dev is the split meant for prompts.
"""

from eora_lab.text import hub

DEFAULT_SPLIT = "dev"
JOIN = "\n\n"
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The formatted questions of the split, subject by subject.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub.
    """
    columns = ["question", "choices", "answer"]
    return [_format(row) for row in hub.rows("cais/mmlu", "all", split, columns, mirror_configs=["*"])]


def _format(row: dict) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}\nAnswer: {'ABCD'[row['answer']]}"
