"""The pass over a model, from its settings to the report: what is checked, kept and resumed around `run.walk`."""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.contract import Contract, check_blocks
from eora_lab.calibrate.distillation import Targets
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.outputs import collect_output_statistics
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate import needs_outputs
from eora_lab.environment import OwnMemory, peak_memory
from eora_lab.errors import EoraLabError, as_setting
from eora_lab.files import add_tensor
from eora_lab.layer.linear import backends_in_use
from eora_lab.model.digest import model_digest, origin
from eora_lab.model.structure import block_linears, decoder, decoder_blocks, matrices, model_name
from eora_lab.model.unfold import unfold
from eora_lab.model.whole import check_finite
from eora_lab.products import fast_products
from eora_lab.run.adapters import OWN, Adapters
from eora_lab.run.budget import Budget
from eora_lab.run.distil import distil
from eora_lab.run.fit import Steps, check_statistics
from eora_lab.run.folder import RunFolder, open_folder
from eora_lab.run.given import check_given, named_for, origin_of
from eora_lab.run.memory import check_room, needed
from eora_lab.run.ranks import check_budget, given_ranks, spread
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import Report
from eora_lab.run.tiers import tier
from eora_lab.run.walk import walk
from eora_lab.text.batches import Batches, as_tokens

NONE = frozenset[str]()
UNTRIED = Contract({}, NONE, NONE, NONE, NONE)  # of a model that nothing runs through


@fast_products()
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
    outputs: Mapping[str, OutputStatistics] | None = None,
    weights: Mapping | None = None,
    reround: bool = False,
    steps: Steps | None = None,
    judge: Callable[[nn.Module], dict[str, list[float]]] | None = None,
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
    outputs:    of the original model too, from `collect_output_statistics`; they replace the backward pass of methods
                that need one.
    weights:    module name -> W^ made elsewhere, such as `read_checkpoint` gives, in place of the compressor, whose
                settings then do not matter. Linears without one stay as they are.
    reround:    give these weights other codes on their own grids, so that the outputs suffer less (`compress.reround`);
                with recipe.rounds above 1 in turn with the low-rank path.
    steps:      who compresses and compensates a layer, in place of the recipe alone (see `Steps`).
    judge:      measures the model before and after, there with the low-rank path and without: text -> loss of each of
                its windows (`window_losses`). The report keeps them.
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
    check_statistics(statistics, recipe, weights is not None, tokens is not None, outputs is not None)
    check_budget(budget, recipe)
    contract = UNTRIED if tokens is None else check_blocks(model, tokens)
    left = {*chosen, *contract.left}
    names = block_linears(model).keys() if weights is None else set(weights)
    if names <= left:
        raise EoraLabError("nothing is left to compress: the model reads the weights of these linears itself")
    left |= block_linears(model).keys() - names
    steps = steps or Steps(recipe, weights, reround, outputs)
    if weights is not None:
        came["given"] = check_given(model, weights, came.get("checkpoint", ""), progress)
    opened: AbstractContextManager[RunFolder | None] = nullcontext()
    shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
    spreads = bool(budget and budget != Budget()) and statistics is None
    parts = needed(model, recipe, contract, shape, left, weights is not None, spreads)
    predicted = check_room(parts, device)
    if folder:
        about = {"ranks": asked, "budget": budget and asdict(budget)} | _stated(recipe, came) | (notes or {})
        opened = open_folder(folder, about | came | steps.about() | identity(model, tokens, statistics, outputs))
    with opened as run, OwnMemory() as own:
        before = _judged(judge, model) if judge else {}
        started = time.perf_counter()
        todo = run is None or not all(map(run.has_block, range(len(decoder_blocks(model)))))
        if needs_outputs(recipe.method) and not steps.outputs and todo:
            steps.outputs = collect_output_statistics(
                model,
                tokens,
                0.0 if recipe.fit_held_out else recipe.held_out,
                recipe.labels,
                progress=progress,
                contract=contract,
                left=left,
            )
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
        report = _passed(model, tokens, steps, asked, statistics, run, contract, left, progress)
        report.base = came.get("base", recipe.base)
        report.tier = tier(recipe, budget not in (None, Budget()), weights is not None, reround)
        report.seconds = time.perf_counter() - started
        report.peak_memory = peak_memory(device)
        report.needed_memory = predicted
        report.backends = backends_in_use(model)
        report.left = matrices(model, part, but=contract.lent | contract.idle)
        reasons = {why: {name for name in chosen if chosen[name] == why} for why in sorted(set(chosen.values()))}
        found = {why: matrices(model, part, names) for why, names in reasons.items()}
        report.by_choice = {why: left for why, left in found.items() if left}
        if judge:
            states = {"dense": before} | _states(judge, model)
            report.losses = {text: {state: seen[text] for state, seen in states.items()} for text in before}
        if device.type == "cpu":
            report.own_memory = own.peak
        if run:
            run.finish(report, model)
    return report


def _passed(
    model: nn.Module,
    tokens: Tensor | None,
    steps: Steps,
    ranks: dict[str, int] | None,
    statistics: Mapping[str, InputStatistics] | None,
    run: RunFolder | None,
    contract: Contract,
    left: set[str],
    progress: bool,
) -> Report:
    """`walk`, and a step of distillation after it where the recipe asks for one."""
    recipe, targets = steps.recipe, None
    if recipe.distil and tokens is not None and not (run and run.is_distilled):
        targets = Targets(model, tokens, recipe.held_out, contract)
    report = Report(walk(model, tokens, steps, ranks, statistics, run, contract, left, progress))

    def step() -> dict[str, float]:
        return distil(model, targets, recipe, progress) if targets else {}

    if recipe.distil:
        report.distilled = run.distilled(model, step) if run else step()
    return report


def _judged(judge: Callable, model: nn.Module) -> dict[str, list[float]]:
    """What a judge finds. Raises EoraLabError where it is something else."""
    return as_setting(dict[str, list[float]], judge(model), "what the judge finds")


def _states(judge: Callable, model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """What a judge finds of the compressed model, and of it without its path."""
    states, adapters = {"compressed": _judged(judge, model)}, Adapters(model)
    if adapters.active:
        adapters.use(None)
        states["bare"] = _judged(judge, model)
        adapters.use(OWN)
    return states


def _stated(recipe: Recipe, given: dict) -> dict:
    """The settings that a run keeps: of the base only where it is made here."""
    return {key: value for key, value in asdict(recipe).items() if not given or key not in recipe.base_settings()}


def identity(
    model: nn.Module,
    tokens: Int[Tensor, "nsamples seqlen"] | None,
    statistics: Mapping[str, InputStatistics] | None = None,
    outputs: Mapping[str, OutputStatistics] | None = None,
) -> dict[str, str]:
    """Which model, tokenizer and tokens (nsamples, seqlen): what a resumed run shares with the interrupted one.

    statistics: in place of tokens, where there are none. outputs: gradients, where these were measured before.
    """
    about = {
        "model": model_name(model),
        "dtype": str(model.dtype),
        "weights": model_digest(model),
        "tokenizer": origin(model).tokenizer,
    }
    if outputs is not None:
        about["outputs"] = _digest({name: one.second_moment for name, one in outputs.items()})
    if tokens is not None:
        return about | {"tokens": tokens_digest(tokens)}
    return about | {"statistics": _digest({name: one.metric for name, one in (statistics or {}).items()})}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        add_tensor(found, name, tensor)
    return found.hexdigest()


def tokens_digest(batches: Int[Tensor, "nsamples seqlen"]) -> str:
    """A hash of token sequences and their shape."""
    return hashlib.sha256(f"{tuple(batches.shape)}".encode() + batches.cpu().long().numpy().tobytes()).hexdigest()
