"""C4, English (Raffel et al. 2020): the general half of the paper's task mixes, from the first shard only."""

from operator import itemgetter

from eora_lab.errors import EoraLabError
from eora_lab.text import hub

DEFAULT_SPLIT = "train"
JOIN = "\n\n"
PACKING = "documents"

# enough for some hundred windows of 2048 tokens (about 3 % of the documents are longer), and little memory
LIMIT = 20_000
FIRST_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


def texts(split: str) -> list[str]:
    """The first `LIMIT` documents of the split's first shard.

    Raises:
        EoraLabError: no such split, it is neither in the mirror nor on the hub, or it holds something else.
    """
    if split not in FIRST_SHARD:
        raise EoraLabError(f"c4 has no split {split!r}; it has {' and '.join(FIRST_SHARD)}")
    place = "allenai/c4", "en", split
    return hub.texts(itemgetter("text"), *place, {"text": str}, data_file=FIRST_SHARD[split], limit=LIMIT)
