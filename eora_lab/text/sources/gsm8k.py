"""GSM8K (Cobbe et al. 2021): question and worked answer with its calculator marks, in lm-eval's form."""

from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = "\n\n"
PACKING = "examples"


def texts(split: str) -> list[str]:
    """The formatted problems of the split.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub, or holds something else.
    """
    return hub.texts(_format, "openai/gsm8k", "main", split, {"question": str, "answer": str})


def _format(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}"
