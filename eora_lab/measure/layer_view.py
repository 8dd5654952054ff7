"""A layer at every rank in few numbers: what the explorable of a page or a notebook shows."""

import base64
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from eora_lab.calibrate.statistics import output_energy
from eora_lab.measure.explore import Exploration

PAIR = ("svd", "eora")  # the best for the weights, and the best for the outputs: their maps and spectra are given
BINS = 40  # rows and columns of a map
POINTS = 60  # of a spectrum
DECADES = (-2.0, 3.0)  # of the energies in a map, as logarithms; what lies beyond has the last colour


def rank_stops(highest: int) -> list[int]:
    """0, and ranks that double in two steps up to the highest: 1, 2, 3, 4, 6, 8, 12, ..."""
    steps = {factor << power for factor in (1, 3) for power in range(highest.bit_length())}
    return [0, *sorted({rank for rank in steps if rank < highest} | {highest})]


def layer_view(exploration: Exploration, layer: str, methods: Sequence[str], ranks: Sequence[int]) -> dict:
    """What stays of a layer's error at the ranks, as JSON can hold it.

    methods: those whose losses are given. Ranks beyond the layer's highest are taken as that.

    error:   relative output error without compensation, E|R x|² / E|W x|².
    left:    method -> what stays of it at every rank, as a share.
    spectra: method of `PAIR` -> [direction, its eigenvalue as a share of their sum], about `POINTS` of them: of R Rᵀ
             for SVD, which is the error of the weights, and of R S Rᵀ for EoRA, that of the outputs.
    taken:   method of `PAIR` -> the share of that sum that every rank takes.
    maps:    method of `PAIR` -> a map for every rank, `rows` x `columns` bytes in base64, from 0 at the first of
             `decades` to 255 at the second.
    Raises EoraLabError for an unknown layer or method.
    """
    kept = [min(rank, exploration.highest(layer)) for rank in ranks]
    losses = {method: exploration.losses(layer, method) for method in methods}
    before = losses[methods[0]][0].item()
    maps = {method: [exploration.error_map(layer, method, r, BINS, doubling=True) for r in kept] for method in PAIR}
    rows, columns = maps["eora"][0].shape
    shares = {method: _shares(exploration, layer, method) for method in PAIR}
    return {
        "shape": list(exploration.weight(layer).shape),
        "error": _short(before),
        "left": {m: [_short(values[r].item() / (before or 1.0)) for r in kept] for m, values in losses.items()},
        "spectra": {method: _points(shares[method]) for method in PAIR},
        "taken": {m: [_short(values[:r].sum().item()) for r in kept] for m, values in shares.items()},
        "rows": rows,
        "columns": columns,
        "decades": list(DECADES),
        "maps": {method: [_as_bytes(one) for one in found] for method, found in maps.items()},
    }


def _shares(exploration: Exploration, layer: str, method: str) -> Float[Tensor, " directions"]:
    """Eigenvalues as shares of the sum of all, also of those that a large layer is not solved for."""
    R, S = exploration.residual(layer).double(), exploration.statistics[layer].second_moment.double()
    total = R.square().sum().item() if method == "svd" else output_energy(R, S)
    return exploration.answer(layer, method).spectrum / (total or 1.0)


def _points(shares: Float[Tensor, " directions"]) -> list[tuple[int, float]]:
    """(direction, share) at even steps of the logarithm."""
    places = sorted({round(len(shares) ** (k / POINTS)) for k in range(POINTS + 1)})
    return [(place, _short(shares[place - 1].item())) for place in places]


def _as_bytes(energies: Float[Tensor, "rows columns"]) -> str:
    """Their logarithms, a byte each."""
    low, high = DECADES
    steps = (energies.clamp_min(10.0**low).log10() - low) / (high - low)
    return base64.b64encode((255 * steps.clamp(0, 1)).round().byte().numpy().tobytes()).decode()


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
