"""The page docs/families.md, from what is recorded of every family."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from docs.family_record import ENOUGH, WORDS, Family
from docs.records import ROOT

PAGE = ROOT / "docs" / "families.md"
TITLES = {"causal-lm": "Decoders of text", "image-text-to-text": "Decoders that also see"}
LISTED = 3  # kinds of matrices that a row names
LONG = 160  # letters of a reason

MEANINGS = {
    "full": f"every step is right, and {100 * ENOUGH:.0f} % or more of the decoder's matrices are compressed",
    "partial": "every step is right, and less is compressed",
    "no adapter": "every other step is right, and peft refuses the adapter or gets it wrong, as `adapter check` says, "
    "or the package does not write one",
    "wrong": "a step ends without an error, and with numbers that it should not give",
    "error": "a step ends with an error, or after its time",
    "refused": "the package says in one line why it takes no such model, before anything is changed",
    "not built": "no small model is made here, or it gives no logits on text alone: nothing was tried",
}

HEAD = """# Models, family by family

Every model type of transformers' mappings for causal language models and for image-text-to-text models was tried on a
small model with random weights: its configuration with fewer and narrower layers, every kind of layer and experts kept.
It says whether the package handles a family's structure, and nothing about how good a compressed model is.

A family goes through these steps, in float32:

1. `load_model`: logits as transformers' own, which loads the same folder.
2. `collect_statistics`: S of every layer as hooks see it in plain forward passes, and the same number of tokens.
3. `compress_model` by RTN 3-bit, GPTQ 4-bit and Wanda 2:4: logits nearer to the original with EoRA than without.
4. `load_run` of the run folder: the same logits, bit by bit.
5. The run's adapter in peft, on transformers' own model: logits as with B A added to the weights.
6. `generate` with and without a cache: logits as in one pass over the finished text, wherever the original's are.
7. Coverage: the share of the decoder's weights in matrices that was compressed, at the size that the family's
   configuration has by default (with `*`: of the small model). Embeddings and the head do not count.

The logits error is that of RTN 3-bit without EoRA -> with it: squared, relative to the variance of the original logits.
"""


def page(known: Mapping[tuple[str, str], Family]) -> str:
    """The whole page."""
    parts = [HEAD, "| verdict | meaning |\n|---|---|", *(f"| {word} | {MEANINGS[word]} |" for word in WORDS), ""]
    parts += [made_with(known.values()), ""]
    for mapping, title in TITLES.items():
        found = sorted((one for one in known.values() if one.mapping == mapping), key=lambda one: one.name)
        parts += [f"## {title}", "", counts(found), ""]
        parts += [
            "| family | class | verdict | coverage | logits error | what is left, or why |",
            "|---|---|---|---|---|---|",
        ]
        parts += [*map(row, found), ""]
    return "\n".join(parts)


def made_with(found: Iterable[Family]) -> str:
    """Versions and command. A page whose rows are of several versions names them all."""
    found = list(found)
    all_of = {
        name: ", ".join(sorted({one.versions[name] for one in found}))
        for name in dict.fromkeys(name for one in found for name in one.versions)
    }
    commits = ", ".join(sorted({one.commit[:10] + "+" * one.commit.endswith("+") for one in found if one.commit}))
    said = ", ".join(f"{name} {version}" for name, version in all_of.items()) + (f" ({commits})" if commits else "")
    return f"Made by `make families` (`python -m docs.families --help`) with {said or 'nothing yet'}."


def counts(found: list[Family]) -> str:
    """How many families have which verdict."""
    tried = [one for one in found if one.decoder_only]
    words = Counter(one.verdict for one in tried)
    said = ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])
    others = Counter(one.verdict for one in found if not one.decoder_only)
    apart = ", ".join(f"{others[word]} {word}" for word in WORDS if others[word])
    return f"{len(tried)} families: {said}." + (
        f" Beside them {len(found) - len(tried)} masked language models and encoder-decoders: {apart}." if apart else ""
    )


def row(one: Family) -> str:
    """A line of the table."""
    share = "" if one.coverage is None else f"{100 * one.coverage:.1f} %" + ("" if one.whole else "*")
    error = " -> ".join(f"{value:.2g}" for value in one.logits.get("rtn", []))
    why = [cut(one.reason)] if one.reason else []
    if one.left:
        more = f" and {len(one.left) - LISTED} more" if len(one.left) > LISTED else ""
        why.append("left: " + ", ".join(f"`{name.removesuffix('.weight')}`" for name in one.left[:LISTED]) + more)
    why += map(cut, one.notes)
    return f"| {one.name} | {one.model} | {one.verdict} | {share} | {error} | {'; '.join(why)} |"


def cut(text: str) -> str:
    """Text for a cell: short, and without what Markdown takes for its own."""
    text = text if len(text) <= LONG else text[: LONG - 3].rstrip() + "..."
    return re.sub(r"([|*<>_\[\]])", r"\\\1", text)
