"""The pass: block by block, measure the inputs, compress the weights, compensate the error, move on.

One block's statistics are held at a time. Linears that share an input share its statistics.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.calibrate.stream import BlockStream
from eora_lab.compensate import SOLVERS, LowRank
from eora_lab.compensate.eora import eora
from eora_lab.compensate.factors import store_factors
from eora_lab.compress import Compressed, CompressedWeight
from eora_lab.environment import peak_memory
from eora_lab.errors import EoraLabError, naming
from eora_lab.layer.linear import CompensatedLinear
from eora_lab.model.structure import block_linears, decoder_blocks, fingerprint, linears
from eora_lab.run.folder import RunFolder
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import LayerReport, Report


@torch.no_grad()
def compress_model(
    model: nn.Module,
    batches: Int[Tensor, "nsamples seqlen"],
    compressor: str = "rtn",
    bits: int = 3,
    group_size: int = 64,
    method: str = "eora",
    rank: int = 64,
    inputs: str = "compensated",
    *,
    ranks: dict[str, int] | None = None,
    folder: Path | str | None = None,
    calibration: dict | None = None,
    statistics: dict[str, InputStatistics] | None = None,
    weights: Mapping[str, CompressedWeight] | None = None,
    progress: bool = True,
    **settings,
) -> Report:
    """Compress every linear of the decoder blocks and put the compensated layers in place. Returns the report.

    Embeddings and lm_head stay as they are.

    batches:    calibration token ids.
    compressor ... inputs, and `settings`: the fields of `Recipe`, which says what they are.
    ranks:      module name -> rank, in place of one rank for all (see `plan_ranks`); others get rank 0.
    folder:     keep the run there, and resume it from there if it was interrupted.
    calibration: how the batches were made (source, seed, ...), to be kept in the folder's config.json.
    statistics: of the original model, from `collect_statistics`; they replace the pass, so inputs must be "original".
    weights:    module name -> W^ made elsewhere, such as a `GptqCheckpoint`, in place of the compressor, whose settings
                are then mere notes. Linears without one stay as they are.
    Raises EoraLabError before anything is changed when a setting does not fit the model, and on NaN or Inf in
    activations, with the layer's name.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    recipe = Recipe(
        compressor=compressor, bits=bits, group_size=group_size, method=method, rank=rank, inputs=inputs, **settings
    )
    recipe.check(model, ranks, given=weights)
    if statistics is not None and inputs != "original":
        raise EoraLabError('statistics measured before are of the original model: pass inputs="original"')
    blocks = decoder_blocks(model)
    about = {"ranks": ranks} | asdict(recipe) | (calibration or {}) | identity(model, batches)
    if weights is not None:
        about["given"] = check_given(model, weights, progress)
    run = RunFolder(folder, about) if folder else None
    ranks = recipe.ranks(model) if ranks is None else ranks
    stream = BlockStream(model, batches, held_out=recipe.held_out) if statistics is None else None
    report = Report()
    for index, (prefix, block) in enumerate(
        tqdm(blocks.items(), desc=compressor, unit="block", disable=not progress, leave=False)
    ):
        if run and run.has_block(index):
            if stream and inputs == "original":
                stream.advance(index)
            report.layers += run.load_block(index, model)
        else:
            modules, layers = {}, []
            for names in stream.groups(index) if recipe.true_sequential else [list(linears(block))]:
                found = stream.statistics(index, inputs == "original", names) if stream else statistics
                for local in names:
                    name = f"{prefix}.{local}"
                    if weights is not None and name not in weights:
                        continue
                    if name not in found:
                        raise EoraLabError(f"{name}: no statistics")
                    given = weights[name] if weights else None
                    modules[name], layer = compress_linear(model, name, found[name], recipe, ranks.get(name, 0), given)
                    layers.append(layer)
            if run:
                run.save_block(index, modules, layers)
            report.layers += layers
        if stream and inputs == "compensated" and index + 1 < len(blocks):
            stream.advance(index)
    report.seconds = time.perf_counter() - started
    report.peak_memory = peak_memory(next(model.parameters()).device)
    if run:
        run.finish(report, model)
    return report


def compress_linear(
    model: nn.Module,
    name: str,
    statistics: InputStatistics,
    recipe: Recipe,
    rank: int,
    given: Compressed | None = None,
) -> tuple[CompensatedLinear, LayerReport]:
    """Compress one linear, unless W^ is given, compensate it at `rank`, and put it in place.

    Raises EoraLabError with the layer's name, such as where a weight is not finite.
    """
    linear = model.get_submodule(name)
    weight = linear.weight.float()
    tokens, usable = statistics.tokens, statistics.or_identity(recipe.held_out > 0)
    data_free, statistics = usable is not statistics, usable
    with naming(name):
        fit = in_turns(weight, linear.weight.dtype, statistics, recipe, rank, given)
        residual, low_rank = fit.residual, fit.low_rank
        factors = store_factors(low_rank, recipe.factor_bits, (residual, statistics) if recipe.refit else None)
    module = CompensatedLinear(linear, fit.compressed, factors)
    model.set_submodule(name, module)
    left = residual - module.lora_B.float() @ module.lora_A.float()

    def energies(second_moment: Tensor) -> tuple[float, float, float]:
        """Of the output, its error before, its error after."""
        return (
            output_energy(weight, second_moment) or 1.0,
            output_energy(residual, second_moment),
            output_energy(left, second_moment),
        )

    signal, before, after = energies(statistics.second_moment)
    held_out = energies(statistics.held_out.second_moment) if statistics.held_out else None
    return module, LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        rank=module.rank,
        error_before=before / signal,
        error_after=after / signal,
        spectrum=spectrum_summary(low_rank, weight.shape, before if SOLVERS[recipe.method] is eora else None),
        tokens=tokens,
        held_out_before=held_out and held_out[1] / held_out[0],
        held_out_after=held_out and held_out[2] / held_out[0],
        shrinkage=fit.shrinkage,
        nbytes=module.nbytes,
        seconds_compress=fit.seconds_compress,
        seconds_solve=fit.seconds_solve,
        data_free=data_free,
    )


@dataclass
class Fit:
    """A weight compressed and compensated: R = W - W^ and the answer to it."""

    compressed: Compressed
    residual: Float[Tensor, "out in"]
    low_rank: LowRank
    shrinkage: float
    loss: float  # output energy of what is left
    seconds_compress: float = 0.0
    seconds_solve: float = 0.0


def in_turns(
    weight: Float[Tensor, "out in"],
    dtype: torch.dtype,
    statistics: InputStatistics,
    recipe: Recipe,
    rank: int,
    given: Compressed | None,
) -> Fit:
    """Compress W, compensate; then compress W - B A, compensate again, for as many rounds as the recipe says.

    A round that does not lower the loss, which greedy compressors can cause, ends it. dtype: of the model.
    """
    best, target, seconds = None, weight, [0.0, 0.0]
    for _ in range(recipe.rounds if rank else 1):
        start = time.perf_counter()
        compressed = given or recipe.compress(target, statistics)
        compressed_at = time.perf_counter()
        residual = weight - compressed.dense(dtype).to(weight)
        low_rank, shrinkage = recipe.compensate(residual, statistics, rank)
        seconds[0] += compressed_at - start
        seconds[1] += time.perf_counter() - compressed_at
        path = low_rank.dense()
        loss = output_energy(residual - path, statistics.second_moment)
        if best and loss >= best.loss:
            break
        best, target = Fit(compressed, residual, low_rank, shrinkage, loss), weight - path
    best.seconds_compress, best.seconds_solve = seconds
    return best


def spectrum_summary(low_rank: LowRank, shape: torch.Size, error_energy: float | None) -> dict[int, float]:
    """Share of the error energy that ranks 1, 2, 4, ... and the layer's own remove, in the solver's metric.

    error_energy: E|R x|², where that is the solver's metric. It is needed where the spectrum ends early; without it the
    summary is then empty.
    """
    spectrum = low_rank.spectrum
    total = spectrum.sum().item() if len(spectrum) == min(shape) else error_energy
    if total is None:
        return {}
    ranks = sorted({2**k for k in range(16)} | {low_rank.rank})
    return {r: spectrum[:r].sum().item() / total if total else 1.0 for r in ranks if 0 < r <= len(spectrum)}


def check_given(model: nn.Module, weights: Mapping, progress: bool = True) -> str:
    """A digest of weights that came compressed.

    Raises EoraLabError when one belongs to no linear, is of another shape, or cannot be a compression of that linear:
    when it is further from W than zero is. (Unrelated weights of the same size are sqrt(2) |W| away; round to nearest
    in 2 bits about |W| / 2.)
    """
    from tqdm.auto import tqdm

    modules, digest = block_linears(model), hashlib.sha256()
    for name in tqdm(weights, desc="compressed weights", unit="layer", disable=not progress, leave=False):
        if name not in modules:
            raise EoraLabError(f"{name} comes compressed, but is no linear in the decoder blocks of this model")
        given, weight = weights[name], modules[name].weight.float()
        if given.codes.shape != weight.shape:
            raise EoraLabError(
                f"{name} comes compressed as {tuple(given.codes.shape)}, but is {tuple(weight.shape)} in this model: "
                "it is not the original model"
            )
        distance = (weight - given.dense().to(weight)).norm()
        if not distance <= weight.norm():
            raise EoraLabError(
                f"{name} comes compressed, but {distance / weight.norm():.2f} times the weight's norm away from it: "
                "this is not the model that it was made from"
            )
        for tensor in given.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def identity(model: nn.Module, batches: Int[Tensor, "nsamples seqlen"]) -> dict[str, str]:
    """Which model and which tokens: what a resumed run must share with the interrupted one, beside its settings."""
    return {
        "model": model.config.name_or_path,
        "dtype": str(model.dtype),
        "weights": fingerprint(model),
        "tokens": hashlib.sha256(batches.cpu().numpy().tobytes()).hexdigest(),
    }
