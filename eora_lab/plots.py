"""Figures: from rows to SVG and PNG. No mathematics here."""

from pathlib import Path

from eora_lab.compare import Row

# Okabe and Ito's palette, told apart by all colour-blind readers
COLOURS = {"none": "#999999", "svd": "#E69F00", "act_s": "#56B4E9", "qera_approx": "#CC79A7", "eora": "#009E73"}
LABELS = {"none": "no compensation", "svd": "SVD", "act_s": "Act-S", "qera_approx": "QERA-approx", "eora": "EoRA"}

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "eora-lab",  # the same bytes every time
    "svg.fonttype": "path",
    "figure.dpi": 150,
}


def plot_comparison(rows: list[Row], path: Path, model: str, text: str) -> list[Path]:
    """Bars of perplexity on a text, one a row, with the dense model as a line. Writes `path` as .png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, rivals = rows[0], rows[1:]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 0.5 * len(rivals) + 1.3), layout="constrained")
        labels = [f"{LABELS.get(r.method, r.method)}{f', rank {r.rank}' if r.rank else ''}" for r in rivals]
        bars = axes.barh(range(len(rivals)), [r.perplexity for r in rivals], height=0.65)
        for bar, row in zip(bars, rivals, strict=True):
            bar.set_color(COLOURS.get(row.method, "#0072B2"))
        axes.bar_label(bars, [f"{r.perplexity:.1f}" for r in rivals], padding=4)
        axes.axvline(dense.perplexity, color="black", linestyle="--", linewidth=1)
        axes.text(dense.perplexity, -0.75, f"dense {dense.perplexity:.1f}", ha="center", va="bottom")
        axes.set_yticks(range(len(rivals)), labels)
        axes.set_ylim(len(rivals) - 0.5, -0.75)
        axes.set_xlim(0, 1.12 * max(r.perplexity for r in rows))
        axes.set_xlabel(f"perplexity on {text} (lower is better)")
        axes.set_title(f"{model} at {rivals[0].base}: what each compensation recovers", loc="left", pad=18)
        return save(figure, path)


def save(figure, path: Path) -> list[Path]:
    """Write a figure as .png and .svg without dates, and close it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        target = path.with_suffix(suffix)
        figure.savefig(target, metadata=metadata)
        written.append(target)
    plt.close(figure)
    return written
