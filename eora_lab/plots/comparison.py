"""The demo's figure: compensations of one compressed model as bars."""

import pandas
from matplotlib.figure import Figure

from eora_lab.plots.looks import INK, looks, method_name
from eora_lab.plots.style import panels, styled
from eora_lab.plots.words import number, tell


def plot_comparison(frame: pandas.DataFrame) -> Figure:
    """Bars of perplexity, a row of `experiment.compare.table` each, with the dense model (its first row) as a line."""
    dense, rivals = frame.iloc[0], frame.iloc[1:]
    look = looks(list(dict.fromkeys(rivals["method"])))
    several = rivals["base"].nunique() > 1
    labels = [_label(row, several) for _, row in rivals.iterrows()]
    with styled():
        figure, [[axes]] = panels(1, 1, 0.4 * len(rivals) + 1.6)
        places = range(len(rivals))
        colours = [look[method].colour for method in rivals["method"]]
        bars = axes.barh(places, rivals["perplexity"], height=0.65, color=colours)
        axes.bar_label(bars, [number(value) for value in rivals["perplexity"]], padding=4)
        axes.axvline(dense["perplexity"], color=INK, linestyle="--", linewidth=1)
        axes.text(dense["perplexity"], -0.75, f"dense {number(dense['perplexity'])}", ha="center", va="bottom")
        axes.set_yticks(places, labels)
        axes.set_ylim(len(rivals) - 0.5, -0.75)
        axes.set_xlim(0, 1.12 * frame["perplexity"].max())
        axes.set_xlabel(f"perplexity on {dense['text']} (lower is better)")
        axes.set_ylabel("compensation")
    said = ", ".join(f"{label} {number(value)}" for label, value in zip(labels, rivals["perplexity"], strict=True))
    alt = f"Bars of perplexity on {dense['text']}, lower is better: {said}; dense {number(dense['perplexity'])}."
    base = "" if several else f", {rivals['base'].iloc[0]}"
    return tell(figure, _headline(dense, rivals, several), alt, below=f"{dense['model']}{base}")


def _headline(dense: pandas.Series, rivals: pandas.DataFrame, several: bool) -> str:
    best = rivals.loc[rivals["perplexity"].idxmin()]
    text = f"{_label(best, several)} comes nearest to the dense {number(dense['perplexity'])}: "
    text += f"perplexity {number(best['perplexity'])}"
    bare = rivals[(rivals["base"] == best["base"]) & (rivals["method"] == "none")]["perplexity"]
    return text + (f", against {number(bare.iloc[0])} uncompensated" if len(bare) and best["method"] != "none" else "")


def _label(row: pandas.Series, several: bool) -> str:
    """What a bar stands for."""
    parts = [row["base"]] if several else []
    parts.append(method_name(row["method"]))
    if row["rank"]:
        parts.append(f"rank {row['rank']}")
        parts += [f"{row['factor_bits']}-bit factors"] if row["factor_bits"] != 16 else []
        parts += [f"{row['budget']} budget"] if row["budget"] != "uniform" else []
    return ", ".join(parts)
