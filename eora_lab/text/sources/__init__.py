"""Named texts for calibration and evaluation: one source a file, one line each in `SOURCES`.

A source is a module with four names:

- `texts(split) -> list[str]`: the documents, rows or formatted task examples of a split, in a fixed order;
- `DEFAULT_SPLIT`: the split to calibrate on;
- `JOIN`: what stands between two texts when they become running text;
- `PACKING`: how `eora_lab.text.tokens` cuts sequences out of them:
  "running" (random windows of the joined text), "examples" (shuffled examples joined until a sequence is full) or
  "documents" (a random window of one document that is longer than a sequence).
"""

from eora_lab.text.sources import arc, c4, gsm8k, mathqa, mmlu, mmlu_exemplars, pydoc, wikitext2

SOURCES = {
    "wikitext2": wikitext2,
    "c4": c4,
    "arc": arc,
    "mathqa": mathqa,
    "gsm8k": gsm8k,
    "mmlu": mmlu,
    "pydoc": pydoc,
    "mmlu-exemplars": mmlu_exemplars,
}
