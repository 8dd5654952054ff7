"""What a column of a result store means on an axis: its name with the unit, its values, how far they can be off."""

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

AXES = {
    "rank": "rank",
    "nsamples": "calibration sequences",
    "seqlen": "tokens of a calibration sequence",
    "share": "share of the first text in a mix",
    "group_size": "group size (input channels)",
    "bits": "bits of a weight",
    "grid": "grid of the weights",
    "factor_bits": "bits of an entry of A and B",
    "bits_per_weight": "bits a weight, all counted",
    "nbytes": "bytes of the compressed layers",
    "held_out": "share of samples held out",
    "inputs": "model that calibration inputs come from",
    "source": "calibration text",
    "base_source": "calibration text of the compressor",
    "rank_only": "layers with a low-rank path",
    "skip": "layers left as they are",
    "only": "compressed layers",
    "keep_first": "first blocks left as they are",
    "keep_last": "last blocks left as they are",
    "sparsity": "sparsity",
    "model": "model",
    "compressor": "compressor",
    "method": "compensation",
}
WORDS = {("rank_only", ""): "all", ("group_size", -1): "whole row", ("base_source", ""): "as for the path"}
WORDS |= {("shared_factors", True): "one A", ("shared_factors", False): "an A each"}
WORDS |= {("only", ""): "all", ("skip", ""): "none", ("sparsity", ""): "not pruned", ("tasks", ""): "none"}
SHORT = {"model": "{}", "compressor": "{}", "grid": "{}", "bits": "{}-bit", "sparsity": "{}"}
SHORT |= {
    "source": "calibrated on {}",
    "rank": "rank {}",
    "factor_bits": "{}-bit factors",
    "shared_factors": "{}",
    "group_size": "groups of {}",
}
ERRORS = {"output_error": "error on calibration tokens", "held_out_error": "error on held-out tokens"}
PERCENT = ("acc", "exact_match")
SIX, THREE = 1.5, 3  # decades of an axis up to which each has so many ticks; above, one


def value_name(setting: str, value: object) -> str:
    """A setting's value as a tick shows it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return WORDS.get((setting, value), str(value))


def setting_name(setting: str, value: object) -> str:
    """A setting with its value, short, as a legend or a title shows it."""
    return SHORT.get(setting, f"{setting.replace('_', ' ')} {{}}").format(value_name(setting, value))


def metrics(frame: pandas.DataFrame) -> list[str]:
    """The columns of a store's frame that say how good a model is; the output error where there is nothing else."""
    found = [name for name in frame if name.startswith("perplexity.")]
    found += [name for name in frame if name.startswith("tasks.") and name.endswith(".value")]
    return found or [f"{name}.after" for name in ERRORS if f"{name}.after" in frame]


def metric_name(frame: pandas.DataFrame, metric: str) -> str:
    """A metric with its unit and its good direction."""
    kind, _, rest = metric.partition(".")
    if kind == "perplexity":
        return f"perplexity on {rest}\n(lower is better)"
    if kind == "tasks" and rest.endswith(".margin"):
        return f"{rest.removesuffix('.margin')} margin of the right answer\n(nats, higher is better)"
    if kind == "tasks":
        name = frame[metric.removesuffix("value") + "metric"].dropna().iloc[0]
        unit = "%, " if name in PERCENT else ""
        return f"{rest.removesuffix('.value')} {name}\n({unit}higher is better)"
    if kind in ERRORS:
        return f"{ERRORS[kind]},\nshare of the output's energy"
    return metric.replace("_", " ")


def figures(frame: pandas.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value, low, high) of a metric, each (rows,): low and high one standard error away, NaN where none is known.

    The error of a perplexity is that of the mean loss over windows, exp(loss +- stderr).
    """
    values = frame[metric].to_numpy(dtype=np.float64)
    kind, _, rest = metric.partition(".")

    def column(name: str) -> np.ndarray:
        return frame[name].to_numpy(dtype=np.float64) if name in frame else np.full(len(frame), np.nan)

    if kind == "perplexity":
        factor = np.exp(column(f"loss_stderr.{rest}"))
        return values, values / factor, values * factor
    if kind == "tasks" and rest.endswith(".margin"):
        error = column(f"{metric}_stderr")
        return values, values - error, values + error
    if kind == "tasks":
        prefix = metric.removesuffix("value")
        percent = np.where(frame[prefix + "metric"].isin(PERCENT), 100.0, 1.0)
        error = column(prefix + "stderr")
        return percent * values, percent * (values - error), percent * (values + error)
    return values, np.full(len(frame), np.nan), np.full(len(frame), np.nan)


def plain_log_axis(axes: Axes, which: str, ticks: list | None = None, base: int = 10) -> None:
    """A logarithmic axis with plain numbers on it: on the given ticks alone, or where there is room."""
    getattr(axes, f"set_{which}scale")("log", base=base)
    axis = getattr(axes, f"{which}axis")
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    if ticks is not None:
        axis.set_ticks(ticks)
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(base, subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def spread_metric(axes: Axes, metric: str, values: np.ndarray) -> None:
    """A logarithmic vertical axis where a metric spans more than a factor of three."""
    values = values[np.isfinite(values)]
    if len(values) and not metric.startswith("tasks.") and values.min() > 0 and values.max() > 3 * values.min():
        plain_log_axis(axes, "y")
        decades = np.log10(values.max() / values.min())
        if decades > SIX:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades <= THREE else (1,)))
