"""The page of the site that sets the paper's figures beside those measured here, made from the records."""

from eora_lab.experiment.checklist import GPU, Entry, checklist, spell
from eora_lab.experiment.paper_runs import measured

OPENING = f"""# The paper as a checklist

Every table of the paper ([arXiv 2410.21271](https://arxiv.org/abs/2410.21271)): what of it is measured here, on
SmolLM2-135M at small scale (a quarter of the ranks, groups of 64, WikiText-2 perplexity and 200 questions of ARC-Easy,
whatever the table measures), how EoRA fares against each rival, and what the rest costs. Minutes are those of two
processor cores: spent as recorded, to go at the same pace, roughly. Times and memory of one {GPU} are **predictions**
from the shapes of the paper's models, in float32; nothing of it was measured. `eora-lab paper` prints the same.

"""
HEAD = (
    f"| table | what it shows | EoRA against rivals, here | measured | to go here | one {GPU}, predicted | command |\n"
)
GAPS = """
EoRA minus each rival: of log perplexities in nats a token (below 0 EoRA is better), of ARC in the mean score of a
question (above 0 EoRA is better; ARC-Easy here, ARC-Challenge published), of margins in nats. Paired 95 % intervals.

"""


def page() -> str:
    """The page, in Markdown."""
    entries = checklist()
    text = OPENING + HEAD + "|---|---|---|---|---|---|---|\n" + "".join(map(_line, entries))
    seen: set[tuple] = set()
    for one in entries:
        cells = tuple(sorted(str(cell.config()) for row in one.rows for cell in row.cells.values()))
        if one.done and one.done == one.cells and cells not in seen:
            text += _section(one)
        seen.add(cells)
    return text


def _line(one: Entry) -> str:
    here = f"{one.done} of {one.cells} cells" + (f", {spell(one.spent)}" if one.done else "") if one.cells else ""
    full = f"{spell(one.gpu_seconds)}, {one.gpu_memory / 1e9:.0f} GB" if one.gpu_seconds and one.gpu_memory else ""
    verdict = one.verdict if one.cells else one.why
    cells = [one.table, one.shows, verdict, here, spell(one.left) if one.left else "", full, f"`{one.command}`"]
    return f"| {' | '.join(cells)} |\n"


def _section(one: Entry) -> str:
    assert one.store is not None  # it is measured
    table = measured(one.rows, one.store).astype("string").fillna("").to_markdown(index=False, disable_numparse=True)
    text = f"\n## {one.table}: {one.shows}\n\n    {one.command}\n\n{table}\n{GAPS}"
    text += (
        "| base | rank | measure | against | published | here | gap | EoRA is |\n|---|---|---|---|---|---|---|---|\n"
    )
    for pair in one.gaps.dropna(subset="here").itertuples():
        printed, gap = (f"{value:+.3f}" if value == value else "" for value in (pair.published, pair.gap))
        here = f"{pair.here:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]"
        base = f"{pair.base} {pair.extra}".strip()
        cells = [base, str(pair.rank), pair.task, pair.against, printed, here, gap, pair.verdict]
        text += f"| {' | '.join(cells)} |\n"
    return text + f"\nLikely reason of the gaps: {one.why}.\n"
