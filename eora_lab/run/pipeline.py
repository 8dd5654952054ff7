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
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.environment import peak_memory
from eora_lab.errors import EoraLabError
from eora_lab.files import add_tensor
from eora_lab.layer.linear import backends_in_use
from eora_lab.model.digest import model_digest, origin
from eora_lab.model.structure import block_linears, decoder, matrices, model_name
from eora_lab.model.unfold import unfold
from eora_lab.model.whole import check_finite
from eora_lab.run.budget import Budget
from eora_lab.run.fit import Steps, check_statistics
from eora_lab.run.folder import RunFolder, open_folder
from eora_lab.run.given import check_given, named_for, origin_of
from eora_lab.run.ranks import given_ranks, spread
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import Report
from eora_lab.run.walk import walk
from eora_lab.text.batches import Batches, as_tokens

UNTRIED = Contract({}, *[frozenset()] * 4)  # of a model that nothing runs through


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
    recipe = recipe or Recipe()
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
    if folder:
        about = {"ranks": asked, "budget": budget and asdict(budget)} | _stated(recipe, came) | (notes or {})
        opened = open_folder(folder, about | came | steps.about() | identity(model, tokens, statistics))
    with opened as run:
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
        report = Report(walk(model, tokens, steps, asked, statistics, run, contract, left, progress))
        report.base = came.get("base", recipe.base)
        report.seconds = time.perf_counter() - started
        report.peak_memory = peak_memory(next(model.parameters()).device)
        report.backends = backends_in_use(model)
        report.left = matrices(model, part, but=contract.lent | contract.idle)
        reasons = {why: {name for name in chosen if chosen[name] == why} for why in sorted(set(chosen.values()))}
        found = {why: matrices(model, part, names) for why, names in reasons.items()}
        report.by_choice = {why: left for why, left in found.items() if left}
        if judge:
            after = judge(model)
            report.perplexity = {text: {"dense": before[text], "compressed": after[text]} for text in before}
        if run:
            run.finish(report, model)
    return report


def _stated(recipe: Recipe, given: dict) -> dict:
    """The settings that a run keeps: of the base only where it is made here."""
    return {key: value for key, value in asdict(recipe).items() if not given or key not in recipe.base_settings()}


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
