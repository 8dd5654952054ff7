"""The help topics of Python itself (`pydoc_data.topics`): English prose and code that every Python install carries.

Many short topics repeat sections of long ones ("while" is part of "compound"). Such a topic is left out, so that the
held-out text is not calibration text in disguise. What is left is some 370,000 characters; they differ a little from
one Python version to the next.
"""

from eora_lab.errors import EoraLabError

DEFAULT_SPLIT = "calibration"
JOIN = "\n\n"
PACKING = "running"

SHORTEST_PARAGRAPH = 60  # characters; shorter ones are headings and signatures, which repeat by chance


def texts(split: str) -> list[str]:
    """The topics of "calibration" (about two thirds of the characters) or "heldout" (the rest), by name.

    Raises:
        EoraLabError: no such split.
    """
    if split not in ("calibration", "heldout"):
        raise EoraLabError(f"pydoc has no split {split!r}; it has calibration and heldout")
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {"calibration": [], "heldout": []}
    size = {"calibration": 0, "heldout": 0}
    for name in _distinct(topics):  # longest first, each to the part that is further behind its share
        part = "calibration" if size["calibration"] <= 2 * size["heldout"] else "heldout"
        parts[part].append(name)
        size[part] += len(topics[name])
    return [topics[name] for name in sorted(parts[split])]


def _distinct(topics: dict[str, str]) -> list[str]:
    """Names of the topics, longest first, without those that repeat a paragraph of a longer one."""
    kept: list[str] = []
    seen = ""
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
        if not any(len(paragraph) >= SHORTEST_PARAGRAPH and paragraph in seen for paragraph in paragraphs):
            kept.append(name)
            seen += " ".join(paragraphs) + " "
    return kept
