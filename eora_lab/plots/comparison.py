"""The demo's figure: compensations of one compressed model as bars."""

import pandas
from matplotlib.figure import Figure

from eora_lab.plots.style import looks, method_name, panels, styled


def plot_comparison(frame: pandas.DataFrame) -> Figure:
    """Bars of perplexity, a row of `experiment.compare.table` each, with the dense model (its first row) as a line."""
    dense, rivals = frame.iloc[0], frame.iloc[1:]
    methods = list(dict.fromkeys(rivals["method"]))
    look = looks(methods)
    with styled():
        figure, [[axes]] = panels(1, 1, 7.0, 0.5 * len(rivals) + 1.3)
        places = range(len(rivals))
        colours = [look[method].colour for method in rivals["method"]]
        bars = axes.barh(places, rivals["perplexity"], height=0.65, color=colours)
        axes.bar_label(bars, [f"{value:.1f}" for value in rivals["perplexity"]], padding=4)
        axes.axvline(dense["perplexity"], color="black", linestyle="--", linewidth=1)
        axes.text(dense["perplexity"], -0.75, f"dense {dense['perplexity']:.1f}", ha="center", va="bottom")
        several = rivals["base"].nunique() > 1
        axes.set_yticks(places, [_label(row, several) for _, row in rivals.iterrows()])
        axes.set_ylim(len(rivals) - 0.5, -0.75)
        axes.set_xlim(0, 1.12 * frame["perplexity"].max())
        axes.set_xlabel(f"perplexity on {dense['text']} (lower is better)")
        axes.set_ylabel("compensation")
        base = "" if several else f" at {rivals['base'].iloc[0]}"
        axes.set_title(f"{dense['model']}{base}: what each compensation recovers", pad=18)
    return figure


def _label(row, several: bool) -> str:
    """What a bar stands for."""
    parts = [row["base"]] if several else []
    parts.append(method_name(row["method"]))
    if row["rank"]:
        parts.append(f"rank {row['rank']}")
        parts += [f"{row['factor_bits']}-bit factors"] if row["factor_bits"] != 16 else []
        parts += [f"{row['budget']} budget"] if row["budget"] != "uniform" else []
    return ", ".join(parts)
