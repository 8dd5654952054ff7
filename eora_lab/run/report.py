"""What a compression pass did: numbers a layer, numbers in all, as JSON and as a printed table."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from statistics import fmean
from typing import Any, get_type_hints

from eora_lab.environment import OTHER
from eora_lab.errors import EoraLabError, as_setting, one_line
from eora_lab.run.intervals import paired_bootstrap

STATES = {  # of `Report.losses`
    "dense": "original model",
    "bare": "compressed, without the adapter",
    "compressed": "compressed, with the adapter",
}
SHORT = {"bare": "without the path"}
WHEN = ("before", "after")
LISTED = 5  # kinds of matrices left that a line names


@dataclass(frozen=True)
class LayerReport:
    """One linear. Errors are relative output errors E|(W - W')x|² / E|Wx|² on the calibration tokens.

    With drift, W - W' is what is left of what the layer aims at.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    error_before: float  # of W^
    error_after: float  # of W^ + B A
    spectrum: dict[int, float]  # rank -> share of the error energy that it removes, in the solver's metric
    tokens: int
    held_out_before: float | None  # errors on the held-out tokens, if there are any
    held_out_after: float | None
    shrinkage: float  # share of the identity in S that the solver used
    nbytes: int  # compressed weight and factors, as stored
    seconds_compress: float
    seconds_solve: float
    pooled_tokens: float = 0.0  # of other experts, that the statistics of an expert were drawn towards
    diagonal: bool = False  # of S only the diagonal was known: errors are as if input channels were not correlated
    error_given: float | None = None  # of W^ as it came, where it was rounded again
    nats_before: float | None = None  # loss a token that the error of W^ adds, to second order, with gradients known
    nats_after: float | None = None  # of W^ + B A
    drift: float = 0.0  # share of the step towards the outputs of the original model that the layer took
    data_free: bool = False  # too few tokens reached it: compressed, compensated and judged as if S were the identity
    A_of: str = ""  # the layer whose A it uses, where layers share it: there it is stored and counted


@dataclass(frozen=True)
class Ratio:
    """Of two perplexities, with its paired 95 % interval over windows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class Report:
    """All layers of one pass, and the totals."""

    layers: list[LayerReport] = field(default_factory=list)
    base: str = ""  # how the weights were compressed, in short
    tier: str = ""  # what was needed for it beside the weights, one of `eora_lab.run.tiers.TIERS`
    seconds: float = 0.0
    peak_memory: int = 0  # bytes: of the process, or of the GPU when the model is there
    own_memory: int = 0  # of it on the CPU, bytes that are no pages of files, which the system takes back as it likes
    needed_memory: int = 0  # as predicted before: of `own_memory`, or of the GPU
    steps: dict[str, float] = field(default_factory=dict)  # step -> seconds: loading, checks, forward, statistics, ...
    backends: dict[str, int] = field(default_factory=dict)  # who multiplies one row of input -> how many layers
    losses: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # text -> one of `STATES` -> nats by window
    # of a step of distillation, if one followed, which layers' errors do not know of: KL(original || model), nats a
    # held-out token, "before" and "after" it; "share" of it that was taken; "seconds"
    distilled: dict[str, float] = field(default_factory=dict)
    left: dict[str, int] | None = None  # matrices of the decoder that stayed as they are -> weights; None: not counted
    by_choice: dict[str, dict[str, int]] = field(default_factory=dict)  # why -> those of `left` that were to stay

    @property
    def weights(self) -> int:
        """How many weights were compressed."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def perplexity(self) -> dict[str, dict[str, float]]:
        """text -> state of the model -> exp of the mean of its losses."""
        return {text: {one: math.exp(fmean(found[one])) for one in found} for text, found in self.losses.items()}

    def ratio(self, text: str, state: str, to: str) -> Ratio | None:
        """The perplexity in one state by that in another; None with fewer than two windows."""
        a, b = self.losses[text][to], self.losses[text][state]
        if len(a) < 2:
            return None
        found = paired_bootstrap(a, b)
        return Ratio(*map(math.exp, (found.difference, found.low, found.high)))

    @property
    def coverage(self) -> float | None:
        """Share of the decoder's weights in matrices that was compressed; None for reports that did not count them."""
        if self.left is None:
            return None
        return self.weights / max(self.weights + sum(self.left.values()), 1)

    @property
    def overlooked(self) -> dict[str, int]:
        """Matrices that stayed as they are though nobody chose that -> weights."""
        rest = Counter(self.left or {})
        for chosen in self.by_choice.values():
            rest.subtract(chosen)
        return {name: count for name, count in rest.items() if count > 0}

    @property
    def overlooked_share(self) -> float:
        """Of the decoder's weights in matrices."""
        return sum(self.overlooked.values()) / max(self.weights + sum((self.left or {}).values()), 1)

    def coverage_line(self) -> str:
        """How much was compressed, and what was left, by choice with the reason and else, the largest first."""
        chosen = [
            (f"{name} ", count, f", {why}") for why, part in self.by_choice.items() for name, count in part.items()
        ]
        others = [(f"{name} ", count, "") for name, count in self.overlooked.items()]
        line = f"{self.coverage:.1%} of the decoder's weights in matrices compressed"
        for what, left in (("left by choice", chosen), ("left as they are", others)):
            left.sort(key=lambda item: -item[1])
            names = ", ".join(f"{name}({count / 1e6:.2g} M{why})" for name, count, why in left[:LISTED])
            more = f" and {len(left) - LISTED} more" if len(left) > LISTED else ""
            line += f"; {what}: {names}{more}" if left else ""
        return line

    @property
    def nbytes(self) -> int:
        """Bytes of all compressed weights and factors, as stored."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for a compressed weight, grids and factors included."""
        return 8 * self.nbytes / max(self.weights, 1)

    def steps_line(self) -> str:
        """Where the time went, the longest steps first; those of less than 1 % together."""
        shown = {name: seconds for name, seconds in self.steps.items() if seconds >= sum(self.steps.values()) / 100}
        rest = shown.pop(OTHER, 0.0) + sum(self.steps[name] for name in self.steps.keys() - shown.keys() - {OTHER})
        parts = [*sorted(shown.items(), key=lambda one: -one[1]), (OTHER, rest)]
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts)

    def to_json(self) -> str:
        """The report and its totals."""
        totals = {
            "weights": self.weights,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "coverage": self.coverage,
            "perplexity": self.perplexity,
        }
        return json.dumps(totals | asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`. Raises EoraLabError for anything else."""
        try:
            return cls.from_data(json.loads(text))
        except ValueError as error:
            raise EoraLabError(f"this is no report: {one_line(error)}") from error

    @classmethod
    def from_data(cls, data: object) -> "Report":
        """A report from its JSON value. Raises EoraLabError when something is missing, or is of another type."""
        older: dict = {"left": None}  # what reports of former versions do not have
        if isinstance(data, dict) and "losses" not in data:  # they had a perplexity, as one window has it
            found = as_setting(dict[str, dict[str, float]], data.get("perplexity", {}), "perplexity")
            older["losses"] = {
                text: {one: [math.log(value) if value > 0 else math.nan] for one, value in states.items()}
                for text, states in found.items()
            }
        values = checked(cls, older | data if isinstance(data, dict) else data)
        for text, states in values.get("losses", {}).items():
            windows = {len(losses) if all(map(math.isfinite, losses)) else 0 for losses in states.values()}
            if not {"dense", "compressed"} <= states.keys() <= STATES.keys() or len(windows) > 1 or 0 in windows:
                raise EoraLabError(f"losses.{text} must be numbers for every window, of {', '.join(STATES)}")
        return cls(**values | {"layers": [layer_report(layer) for layer in values["layers"]]})

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [f"{'layer':{width}}  {'shape':>11}  rank  error before  error after  captured  seconds"]
        for layer in self.layers:
            shape = f"{layer.out_features}x{layer.in_features}"
            captured = 1 - layer.error_after / layer.error_before if layer.error_before else 0.0
            seconds = layer.seconds_compress + layer.seconds_solve
            lines.append(
                f"{layer.name:{width}}  {shape:>11}  {layer.rank:4}  {layer.error_before:12.5f}"
                f"  {layer.error_after:11.5f}  {captured:8.1%}  {seconds:7.2f}"
            )
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """The totals, one line each."""

        def mean(field: str) -> float:
            return sum(getattr(layer, field) for layer in self.layers) / max(len(self.layers), 1)

        what = f"{self.base}: " if self.base else ""  # older reports do not say
        lines = [
            f"{what}{self.weights / 1e6:.1f} M weights at {self.bits_per_weight:.2f} bits = {self.nbytes / 1e6:.1f} MB"
        ]
        if self.tier:
            lines.append(f"tier {self.tier}")
        if using := sum(bool(layer.A_of) for layer in self.layers):
            lines.append(f"{using} of {len(self.layers)} layers use A of another one that reads the same input")
        if self.left is not None:
            lines.append(self.coverage_line())
        before, after = mean("error_before"), mean("error_after")
        if self.layers and self.layers[0].error_given is not None:
            lines.append(f"rounded again on its own grid: output error {mean('error_given'):.5f} -> {before:.5f}")
        lines.append(f"output error {before:.5f} -> {after:.5f}, mean of layers, calibration tokens")
        if self.layers and self.layers[0].held_out_after is not None:
            before, after = mean("held_out_before"), mean("held_out_after")
            lines.append(f"output error {before:.5f} -> {after:.5f}, mean of layers, held-out tokens")
        if self.layers and self.layers[0].nats_before is not None:
            before, after = (sum(getattr(one, f"nats_{when}") or 0.0 for one in self.layers) for when in WHEN)
            lines.append(f"predicted loss {before:.4f} -> {after:.4f} nats a token, to second order, all layers added")
        lines += self._costs()
        if any(layer.drift for layer in self.layers):
            lines.append(f"towards the outputs of the original model: {mean('drift'):.0%} of the step, mean of layers")
        if self.distilled:
            found = self.distilled
            lines.append(
                f"distilled: KL(original || this) {found['before']:.4g} -> {found['after']:.4g} nats a held-out "
                f"token, {found['share']:.0%} of the step, {found['seconds']:.1f} s; errors above are those before it"
            )
        if any(layer.diagonal for layer in self.layers):
            lines.append("only mean squares were known (imatrix): output errors are as if channels were not correlated")
        if self.backends:
            lines.append(f"computed by {', '.join(f'{name} ({n} layers)' for name, n in self.backends.items())}")
        return "\n".join([*lines, *self._starved(), *self._perplexities()])

    def _costs(self) -> list[str]:
        """Of time and memory."""
        lines = [f"{self.seconds:.1f} s, peak memory {self.peak_memory / 1e9:.2f} GB"]
        if self.steps:
            lines.append(f"{sum(self.steps.values()):.1f} s in all: {self.steps_line()}")
        if self.own_memory:
            own, needed = self.own_memory / 1e9, self.needed_memory / 1e9
            lines.append(f"{own:.2f} GB of it are no pages of files; {needed:.2f} GB were predicted")
        return lines

    def _starved(self) -> list[str]:
        """Of layers that few tokens came to."""
        lines = []
        alone = [layer.name for layer in self.layers if not layer.tokens and not layer.data_free]
        if alone:
            lines.append(
                f"{len(alone)} linears of experts saw no token, and were compressed by those of their layer: "
                f"{', '.join(alone)}"
            )
        few = [layer.name for layer in self.layers if layer.data_free]
        if few:
            lines.append(f"{len(few)} layers saw too few tokens and were compressed without data: {', '.join(few)}")
        return lines

    def _perplexities(self) -> list[str]:
        """A line a text."""
        lines = []
        for text, values in self.perplexity.items():
            states = ", ".join(f"{SHORT.get(state, state)} {value:.2f}" for state, value in values.items())
            pairs = [("compressed", "dense"), *([("compressed", "bare")] if "bare" in values else [])]
            found = [(state, to, self.ratio(text, state, to)) for state, to in pairs]
            ratios = "".join(f"; {state} / {SHORT.get(to, to)} {ratio}" for state, to, ratio in found if ratio)
            lines.append(f"perplexity on {text}: {states}{ratios}")
        return lines


def layer_report(data: object) -> LayerReport:
    """A LayerReport from its JSON value, where the ranks of the spectrum are text. Raises as `Report.from_data`."""
    if isinstance(data, dict) and isinstance(spectrum := data.get("spectrum"), dict):
        data = data | {"spectrum": {int(rank) if rank.isdecimal() else rank: share for rank, share in spectrum.items()}}
    return LayerReport(**checked(LayerReport, data))


def checked(kind: type, data: object) -> dict[str, Any]:
    """The fields of a dataclass in a JSON value. Raises EoraLabError when one is missing or of another type."""
    if not isinstance(data, Mapping):
        raise EoraLabError(f"a {kind.__name__} must be names with values, not {type(data).__name__}")
    hints = {name: list if name == "layers" else hint for name, hint in get_type_hints(kind).items()}
    for one in fields(kind):
        needed = one.name == "layers" or (one.default is MISSING and one.default_factory is MISSING)
        if needed and one.name not in data:
            raise EoraLabError(f"a {kind.__name__} without {one.name}: it is no report, or of another version")
    return {name: as_setting(hint, data[name], name) for name, hint in hints.items() if name in data}
