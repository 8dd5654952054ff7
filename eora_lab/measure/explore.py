"""What every rank of every method buys in a layer: each is solved once, at the highest rank, and cut after that."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.compensate import LowRank, solve
from eora_lab.compress import residual
from eora_lab.errors import EoraLabError
from eora_lab.model.structure import block_linears
from eora_lab.run.fit import Steps
from eora_lab.run.recipe import Recipe


class Exploration:
    """The layers of a model, compressed by a recipe, and what compensation leaves of their errors.

    Errors are judged on the tokens that the statistics were measured on. Residuals and solves are kept.

    model:      as it is, uncompressed; it is not changed.
    statistics: module name -> statistics, from `collect_statistics`.
    recipe:     how weights are compressed; its method and rank do not matter.
    highest:    the highest rank that is looked at; None: that of the layer. Small ones spare large models much time.
    outputs:    module name -> statistics of the gradients at its output, for methods that need them.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: dict[str, InputStatistics],
        recipe: Recipe | None = None,
        highest: int | None = None,
        outputs: Mapping[str, OutputStatistics] | None = None,
    ):
        self._linears = block_linears(model)
        self.statistics = {name: found.or_identity(False) for name, found in statistics.items()}
        self.recipe, self._highest, self._outputs = recipe or Recipe(), highest, outputs or {}
        self._residuals: dict[str, Tensor] = {}
        self._answers: dict[tuple[str, str], LowRank] = {}
        self._losses: dict[tuple[str, str], Tensor] = {}
        self._directions: dict[tuple[str, str], Tensor] = {}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that there are statistics of, in order."""
        return [name for name in self._linears if name in self.statistics]

    def weight(self, layer: str) -> Float[Tensor, "out in"]:
        """W. Raises EoraLabError for an unknown layer."""
        if layer not in self._linears or layer not in self.statistics:
            raise EoraLabError(f"no layer {layer!r} with statistics; names are like {next(iter(self._linears))}")
        return self._linears[layer].weight.float()

    def highest(self, layer: str) -> int:
        """The highest rank that is looked at in a layer."""
        full = min(self.weight(layer).shape)
        return full if self._highest is None else min(full, self._highest)

    @torch.no_grad()
    def residual(self, layer: str) -> Float[Tensor, "out in"]:
        """R = W - W^."""
        if layer not in self._residuals:
            compressed = Steps(self.recipe).compress(layer, self.weight(layer), self.statistics[layer])
            self._residuals[layer] = residual(self._linears[layer].weight, compressed)
        return self._residuals[layer]

    def answer(self, layer: str, method: str) -> LowRank:
        """The compensation at the highest rank, to be cut by `truncate`. Raises EoraLabError for an unknown method."""
        if (layer, method) not in self._answers:
            error, highest = self.residual(layer), self.highest(layer)
            solved = solve(method, error, self.statistics[layer], highest, self._outputs.get(layer))
            self._answers[layer, method] = solved
        return self._answers[layer, method]

    def losses(self, layer: str, method: str) -> Float[Tensor, " ranks"]:
        """Relative output error E|(R - B A) x|² / E|W x|² at the ranks 0, 1, ... of a method. float64."""
        if (layer, method) not in self._losses:
            S = self.statistics[layer].second_moment.double()
            losses = self.answer(layer, method).losses(self.residual(layer), S)
            self._losses[layer, method] = losses / (output_energy(self.weight(layer).double(), S) or 1.0)
        return self._losses[layer, method]

    @torch.no_grad()
    def error_map(
        self, layer: str, method: str, rank: int, bins: int = 64, doubling: bool = False
    ) -> Float[Tensor, "rows columns"]:
        """Where the output error lies: mean energy of (R - B A) Q Λ^½ in bins x bins blocks, S = Q Λ Qᵀ.

        Rows are output channels; columns are eigenvectors of S, the loudest first. The sum of all energies is the
        loss E|(R - B A) x|². Values are relative to the mean without compensation.

        doubling: columns are even steps of the logarithm of the direction's number, for the first few hold most; where
            these are less than one direction wide, it fills several.
        """
        answer = self.answer(layer, method)
        RT = self._in_directions(layer, "residual", self.residual(layer))
        AT = self._in_directions(layer, method, answer.A)
        energy = torch.addmm(RT, answer.B[:, :rank].float(), AT[:rank], alpha=-1).square()
        rows = min(bins, energy.shape[0])
        if doubling:
            energy = energy @ _steps(energy.shape[1], bins).to(energy)
        columns = min(bins, energy.shape[1])
        return F.adaptive_avg_pool2d(energy[None], (rows, columns))[0].cpu() / RT.square().mean().cpu()

    def _in_directions(self, layer: str, name: str, matrix: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """matrix Q Λ^½, kept under a name."""
        if (layer, name) not in self._directions:
            T = self.statistics[layer].root().flip(1)  # (in, in), loudest first
            self._directions[layer, name] = (matrix.double() @ T).float()
        return self._directions[layer, name]


def _steps(directions: int, bins: int) -> Float[Tensor, "directions bins"]:
    """What takes the mean of the directions in each of `bins` even steps of log2 from 1 to the number of directions."""
    edges = (directions + 1) ** (torch.arange(bins + 1, dtype=torch.float64) / bins)  # 1 to directions + 1
    number = torch.arange(1, directions + 1, dtype=torch.float64)[:, None]
    first = edges[:-1].floor().clamp_max(directions)
    last = torch.maximum(first, (edges[1:] - 1e-9).floor().clamp_max(directions))
    inside = ((number >= first) & (number <= last)).float()
    return inside / inside.sum(0)
