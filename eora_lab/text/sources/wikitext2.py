"""WikiText-2 (Merity et al. 2016) as running text, the usual calibration and perplexity text of the GPTQ line of work.

The raw form is preferred; a mirror that only has the tokenised one serves too, with its `<unk>` written unk,
so that no tokenizer takes it for a special token.
"""

from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = "\n\n"  # the rows are lines; empty ones stay, as in GPTQ
PACKING = "running"


def texts(split: str) -> list[str]:
    """The lines of the split, empty ones included.

    Raises:
        EoraLabError: the split is neither in the mirror nor on the hub, or holds something else.
    """
    place = "Salesforce/wikitext", "wikitext-2-raw-v1", split
    return hub.texts(_format, *place, {"text": str}, mirror_configs=["wikitext-2-v1"])


def _format(row: dict) -> str:
    return row["text"].replace("<unk>", "unk")
