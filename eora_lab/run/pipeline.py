"""The pass: block by block, measure the inputs, compress the weights, compensate the error, move on.

One block's statistics are held at a time. Linears that share an input share its statistics.
"""

import hashlib
import time
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.contract import Contract, check_blocks
from eora_lab.calibrate.statistics import InputStatistics, output_energy
from eora_lab.calibrate.stream import BlockStream, collect_statistics
from eora_lab.compensate import SOLVERS, LowRank
from eora_lab.compensate.eora import eora
from eora_lab.compensate.factors import store_factors
from eora_lab.compress import residual
from eora_lab.environment import OwnMemory, peak_memory
from eora_lab.errors import EoraLabError, naming
from eora_lab.files import add_tensor
from eora_lab.layer.linear import CompensatedLinear, backends_in_use
from eora_lab.model.digest import model_digest, origin
from eora_lab.model.structure import block_linears, decoder, decoder_blocks, linear_at, linears, matrices, model_name
from eora_lab.model.unfold import unfold
from eora_lab.model.whole import check_finite
from eora_lab.run.budget import Budget
from eora_lab.run.fit import Steps, check_statistics, fit_layer
from eora_lab.run.folder import RunFolder, open_folder
from eora_lab.run.given import check_given, named_for, origin_of
from eora_lab.run.memory import check_room, needed
from eora_lab.run.ranks import given_ranks, spread
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import LayerReport, Report
from eora_lab.text.batches import Batches, as_tokens

NONE = frozenset[str]()
UNTRIED = Contract({}, NONE, NONE, NONE, NONE)  # of a model that nothing runs through


@torch.no_grad()
def compress_model(
    model: nn.Module,
    batches: Batches | None,
    recipe: Recipe | None = None,
    *,
    ranks: Mapping | Budget | None = None,
    folder: Path | str | None = None,
    notes: dict | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
    weights: Mapping | None = None,
    reround: bool = False,
    steps: Steps | None = None,
    judge: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = True,
) -> Report:
    """Compress the linears of the decoder blocks and put the compensated layers in place. Returns the report.

    Embeddings and lm_head stay as they are, and so do linears whose weight the model reads itself (Mamba's dt_proj) and
    those that the recipe leaves (`Selection`); the report says what was left, and why.

    batches:    calibration token ids (nsamples, seqlen): a tensor, an array, or a list of sequences. None with
                `statistics`: then nothing runs through the model, and whether a linear is a plain product to it is not
                tried.
    recipe:     what to do; `Recipe()` if not given.
    ranks:      in place of one rank for all: a budget that is spread over the layers, with recipe.rank as the average,
                or module name -> rank (others get rank 0).
    folder:     keep the run there, and resume it from there if it was interrupted.
    notes:      how the batches were made (source, seed, ...), to be kept in the folder's config.json.
    statistics: of the original model, from `collect_statistics` or `read_imatrix`; they replace the pass, so inputs
                must be "original".
    weights:    module name -> W^ made elsewhere, such as `read_checkpoint` gives, in place of the compressor, whose
                settings then do not matter. Linears without one stay as they are.
    reround:    give these weights other codes on their own grids, so that the outputs suffer less (`compress.reround`);
                with recipe.rounds above 1 in turn with the low-rank path.
    steps:      who compresses and compensates a layer, in place of the recipe alone (see `Steps`).
    judge:      measures the model, before and after: text -> perplexity. The report keeps both.
    Raises EoraLabError before anything is changed when a setting does not fit the model, or its blocks cannot be run
    one by one exactly (`check_blocks`), and on NaN or Inf in activations, with the layer's name.
    """
    recipe, device = recipe or Recipe(), next(model.parameters()).device
    budget = ranks if isinstance(ranks, Budget) else None
    asked = None if ranks is None or isinstance(ranks, Budget) else given_ranks(ranks)
    unfold(model)
    came, weights = origin_of(weights), named_for(model, weights)
    recipe.check_fit(model, asked, given=weights)
    chosen = recipe.left(model, weights)
    tokens = None if batches is None else as_tokens(model, batches)
    check_finite(model)
    check_statistics(statistics, recipe, weights is not None, tokens is not None)
    contract = UNTRIED if tokens is None else check_blocks(model, tokens)
    left = {*chosen, *contract.left}
    names = block_linears(model).keys() if weights is None else set(weights)
    if names <= left:
        raise EoraLabError("nothing is left to compress: the model reads the weights of these linears itself")
    left |= block_linears(model).keys() - names
    steps = steps or Steps(recipe, weights, reround)
    if weights is not None:
        came["given"] = check_given(model, weights, came.get("checkpoint", ""), progress)
    opened: AbstractContextManager[RunFolder | None] = nullcontext()
    shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
    spreads = bool(budget and budget != Budget()) and statistics is None
    parts = needed(model, recipe, contract, shape, left, weights is not None, spreads)
    predicted = check_room(parts, device)
    if folder:
        about = {"ranks": asked, "budget": budget and asdict(budget)} | _stated(recipe, came) | (notes or {})
        opened = open_folder(folder, about | came | steps.about() | identity(model, tokens, statistics))
    with opened as run, OwnMemory() as own:
        before = judge(model) if judge else {}
        started = time.perf_counter()
        if budget and budget != Budget():

            def plan() -> dict[str, int]:
                nonlocal statistics
                found = statistics
                if found is None:
                    found = collect_statistics(model, tokens, recipe.held_out, progress)
                if recipe.inputs == "original":
                    statistics = found
                return spread(model, found, steps, budget, progress, left)

            asked = run.planned(plan) if run else plan()
            recipe.check_fit(model, asked, given=weights)  # they may come from a file
        part = decoder(model)
        report = Report(_walk(model, tokens, steps, asked, statistics, run, contract, left, progress))
        report.base = came.get("base", recipe.base)
        report.seconds = time.perf_counter() - started
        report.peak_memory = peak_memory(device)
        report.needed_memory = predicted
        report.backends = backends_in_use(model)
        report.left = matrices(model, part, but=contract.lent | contract.idle)
        reasons = {why: {name for name in chosen if chosen[name] == why} for why in sorted(set(chosen.values()))}
        found = {why: matrices(model, part, names) for why, names in reasons.items()}
        report.by_choice = {why: left for why, left in found.items() if left}
        if judge:
            after = judge(model)
            report.perplexity = {text: {"dense": before[text], "compressed": after[text]} for text in before}
        if device.type == "cpu":
            report.own_memory = own.peak
        if run:
            run.finish(report, model)
    return report


def _stated(recipe: Recipe, given: dict) -> dict:
    """The settings that a run keeps: of the base only where it is made here."""
    return {key: value for key, value in asdict(recipe).items() if not given or key not in recipe.base_settings()}


def _walk(
    model: nn.Module,
    tokens: Int[Tensor, "nsamples seqlen"] | None,
    steps: Steps,
    ranks: dict[str, int] | None,
    statistics: Mapping[str, InputStatistics] | None,
    run: RunFolder | None,
    contract: Contract,
    left: Container[str],
    progress: bool,
) -> list[LayerReport]:
    """Block by block; blocks that the run folder holds already are put in place from there.

    With a run folder the original linears come back once a block is done, and all blocks are put in place from their
    files in the end. Both may be files that the system maps into memory, so that no more than one block takes any.

    left: linears that stay as they are.
    """
    from tqdm.auto import tqdm

    recipe, blocks = steps.recipe, decoder_blocks(model)
    ranks = recipe.ranks(model, left) if ranks is None else ranks
    original = recipe.inputs == "original"
    stream = None
    if tokens is not None and statistics is None:
        stream = BlockStream(model, tokens, recipe.held_out, contract)
    reports: list[LayerReport] = []
    bar = tqdm(blocks.items(), desc="compress", unit="block", disable=not progress, leave=False)
    for index, (prefix, block) in enumerate(bar):
        originals = linears(block)
        if run and run.has_block(index):
            if stream and original:
                stream.advance(index)
            reports += run.load_block(index, model)
        else:
            modules, layers = {}, []
            for locals_ in stream.groups(index) if stream and recipe.true_sequential else [list(linears(block))]:
                chosen = [local for local in locals_ if f"{prefix}.{local}" not in left]
                if not chosen and not original:
                    continue
                found = stream.statistics(index, original, chosen) if stream else statistics or {}
                for name in (f"{prefix}.{local}" for local in chosen):
                    if name not in found:
                        raise EoraLabError(f"{name}: no statistics")
                    modules[name], layer = compress_linear(model, name, found[name], steps, ranks.get(name, 0))
                    layers.append(layer)
            if run:
                run.save_block(index, modules, layers)
            reports += layers
        if stream and not original and index + 1 < len(blocks):
            stream.advance(index)
        _put_back(block, originals if run else {})
    if run:
        run.load_blocks(model)
    return reports


def _put_back(block: nn.Module, originals: Mapping[str, nn.Linear]) -> None:
    """Let linears have their places in the block again."""
    for name, linear in originals.items():
        block.set_submodule(name, linear)


def compress_linear(
    model: nn.Module, name: str, statistics: InputStatistics, steps: Steps, rank: int
) -> tuple[CompensatedLinear, LayerReport]:
    """Compress one linear, compensate it at `rank`, and put it in place.

    Raises EoraLabError with the layer's name, such as where a weight is not finite.
    """
    linear, recipe = linear_at(model, name), steps.recipe
    usable = statistics.or_identity(recipe.held_out > 0)
    with naming(name):
        fit = fit_layer(name, linear.weight, usable, steps, rank)
        factors = store_factors(fit.low_rank, recipe.factor_bits, (fit.residual, usable) if recipe.refit else None)
    module = CompensatedLinear(linear, fit.compressed, factors)
    model.set_submodule(name, module)
    weight = linear.weight.float()
    left = fit.residual - module.lora_B.float() @ module.lora_A.float()

    def energies(seen: InputStatistics) -> tuple[float, float, float]:
        """Of the output, its error before, its error after."""
        signal, before, after = (output_energy(matrix, seen.metric) for matrix in (weight, fit.residual, left))
        return signal or 1.0, before, after

    signal, before, after = energies(usable)
    given = None
    if steps.reround and steps.weights:
        given = output_energy(residual(linear.weight, steps.weights[name]), usable.metric) / signal
    held_out = energies(usable.held_out) if usable.held_out else None
    return module, LayerReport(
        name=name,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        rank=module.rank,
        error_before=before / signal,
        error_after=after / signal,
        spectrum=spectrum_summary(fit.low_rank, weight.shape, before if SOLVERS[recipe.method] is eora else None),
        tokens=statistics.tokens,
        pooled_tokens=statistics.pooled_tokens,
        held_out_before=held_out and held_out[1] / held_out[0],
        held_out_after=held_out and held_out[2] / held_out[0],
        shrinkage=fit.shrinkage,
        nbytes=module.nbytes,
        seconds_compress=fit.seconds_compress,
        seconds_solve=fit.seconds_solve,
        diagonal=statistics.diagonal,
        data_free=usable is not statistics,
        error_given=given,
    )


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


def identity(
    model: nn.Module,
    tokens: Int[Tensor, "nsamples seqlen"] | None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> dict[str, str]:
    """Which model, tokenizer and tokens (nsamples, seqlen): what a resumed run shares with the interrupted one.

    statistics: in place of tokens, where there are none.
    """
    about = {
        "model": model_name(model),
        "dtype": str(model.dtype),
        "weights": model_digest(model),
        "tokenizer": origin(model).tokenizer,
    }
    if tokens is not None:
        return about | {"tokens": tokens_digest(tokens)}
    found = hashlib.sha256()
    for name, one in (statistics or {}).items():
        add_tensor(found, name, one.metric)
    return about | {"statistics": found.hexdigest()}


def tokens_digest(batches: Int[Tensor, "nsamples seqlen"]) -> str:
    """A hash of token sequences and their shape."""
    return hashlib.sha256(f"{tuple(batches.shape)}".encode() + batches.cpu().long().numpy().tobytes()).hexdigest()
