"""The pass over a model, from its settings to the report: what is checked, kept and resumed around `run.walk`."""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.contract import UNTRIED, Contract, check_blocks
from eora_lab.calibrate.distillation import Targets
from eora_lab.calibrate.output_statistics import OutputStatistics
from eora_lab.calibrate.outputs import collect_output_statistics
from eora_lab.calibrate.processes import Processes
from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.calibrate.stream import collect_statistics
from eora_lab.compensate import needs_outputs
from eora_lab.environment import OwnMemory, peak_memory, seconds_by_step, step, timed
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
from eora_lab.run.folder import RunFolder
from eora_lab.run.given import check_given, named_for, origin_of
from eora_lab.run.groups import check_ranks
from eora_lab.run.memory import check_room, needed
from eora_lab.run.owners import owners
from eora_lab.run.ranks import check_budget, given_ranks, spread
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import Report
from eora_lab.run.shared import open_shared
from eora_lab.run.tiers import tier
from eora_lab.run.walk import walk
from eora_lab.text.batches import Batches, as_tokens

Place = Literal["memory", "disk"]


@timed()
@fast_products()
@torch.no_grad()
def compress_model(
    model: nn.Module,
    batches: Batches | None,
    recipe: Recipe | None = None,
    *,
    ranks: Mapping | Budget | None = None,
    folder: Path | str | None = None,
    hidden_states: Place = "memory",
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

    Where a process group of torch.distributed is up, its processes share the work: each calls this with the same model
    and arguments, streams its share of the batches, compresses the linears that it owns, and ends with the same layers
    in place. The first one alone writes and shows progress.

    Embeddings and lm_head stay as they are, and so do linears whose weight the model reads itself (Mamba's dt_proj) and
    those that the recipe leaves (`Selection`); the report says what was left, and why.

    batches:    calibration token ids (nsamples, seqlen): a tensor, an array, or a list of sequences. None with
                `statistics`: then nothing runs through the model, and whether a linear is a plain product to it is not
                tried.
    recipe:     what to do; `Recipe()` if not given.
    ranks:      in place of one rank for all: a budget that is spread over the layers, with recipe.rank as the average,
                or module name -> rank (others get rank 0).
    folder:     keep the run there, and resume it from there if it was interrupted.
    hidden_states: of the calibration texts, between two blocks: in memory, or on disk, in files of the folder until the
                run is finished. It then resumes without running finished blocks again.
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
                its windows (`window_losses`). The report keeps them. Every process calls it, and gets the same answer.
    Raises EoraLabError before anything is changed when a setting does not fit the model, or its blocks cannot be run
    one by one exactly (`check_blocks`), and on NaN or Inf in activations, with the layer's name.
    """
    recipe, device = recipe or Recipe(), next(model.parameters()).device
    processes = Processes.of_group()
    progress = progress and not processes.rank
    budget = ranks if isinstance(ranks, Budget) else None
    asked = None if ranks is None or isinstance(ranks, Budget) else given_ranks(ranks)
    with processes.agree():
        check_shareable(recipe, processes)
        on_disk = _on_disk(hidden_states, folder)
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
        check_ranks(asked or {}, contract, recipe.shares)
        steps = steps or Steps(recipe, weights, reround, outputs)
        if weights is not None:
            came["given"] = check_given(model, weights, came.get("checkpoint", ""), progress)
        shape = None if tokens is None else (-(-tokens.shape[0] // processes.count), tokens.shape[1])
        spreads = bool(budget and budget != Budget()) and statistics is None
        parts = needed(model, recipe, contract, shape, left, weights is not None, spreads, on_disk)
        predicted = check_room(parts, device, processes.here)
        told = bool(folder) or processes.count > 1
        about = {"ranks": asked, "budget": budget and asdict(budget)} | _stated(recipe, came) | (notes or {})
        about |= came | steps.about() | (identity(model, tokens, statistics, outputs) if told else {})
    processes.check_alike(about)
    owned = owners(model, recipe, contract, left, weights is not None, processes.count)
    opened: AbstractContextManager[RunFolder | None] = nullcontext()
    if folder:
        opened = open_shared(folder, about, len(decoder_blocks(model)), processes, on_disk)
    with opened as run, OwnMemory() as own:
        before = _judged(judge, model) if judge else {}
        started = time.perf_counter()
        todo = run is None or not all(map(run.has_block, range(len(decoder_blocks(model)))))
        if needs_outputs(recipe.method) and not steps.outputs and todo:
            steps.outputs = collect_output_statistics(
                model,
                tokens,
                recipe.held_out,
                recipe.labels,
                progress=progress,
                contract=contract,
                left=left,
                processes=processes,
                owners=owned,
            )
        if budget and budget != Budget():

            def plan() -> dict[str, int]:
                nonlocal statistics
                found = statistics
                if found is None:
                    found = collect_statistics(model, tokens, recipe.held_out, progress, "", processes, owned)
                if recipe.inputs == "original":
                    statistics = found
                return spread(model, found, steps, budget, contract, progress, left, processes, owned)

            asked = run.planned(plan) if run else plan()
            recipe.check_fit(model, asked, given=weights)  # they may come from a file
        part = decoder(model)
        targets = _targets(model, tokens, recipe, run, contract)
        report = Report(walk(model, tokens, steps, asked, statistics, run, contract, left, progress, processes, owned))
        report.distilled = _distilled(model, targets, recipe, run, progress)
        report.base = came.get("base", recipe.base)
        report.tier = tier(recipe, budget not in (None, Budget()), weights is not None, reround)
        report.seconds = time.perf_counter() - started
        report.peak_memory = max(processes.gather(peak_memory(device)))
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
            report.own_memory = max(processes.gather(own.peak))
        report.steps = seconds_by_step()
        if run:
            run.finish(report, model)
    return report


def _on_disk(hidden_states: str, folder: Path | str | None) -> bool:
    """Whether hidden states are kept on disk. Raises EoraLabError for another place, and where there is no folder."""
    on_disk = as_setting(Place, hidden_states, "hidden_states") == "disk"
    if on_disk and not folder:
        raise EoraLabError("hidden states on disk lie in the folder of a run: give folder=, or leave them in memory")
    return on_disk


def check_shareable(recipe: Recipe, processes: Processes) -> None:
    """Raise EoraLabError for what one process does alone."""
    if processes.count == 1:
        return
    if recipe.inputs == "drift":
        raise EoraLabError('inputs="drift" runs in one process: take "compensated", or start it without torchrun')
    if recipe.distil:
        raise EoraLabError("distil runs in one process: leave it out, or start it without torchrun")


def _targets(
    model: nn.Module, tokens: Tensor | None, recipe: Recipe, run: RunFolder | None, contract: Contract
) -> Targets | None:
    """Of a step of distillation that is still to be made, while the model is the original."""
    if tokens is None or not recipe.distil or (run and run.is_distilled):
        return None
    return Targets(model, tokens, recipe.held_out, contract)


def _distilled(
    model: nn.Module, targets: Targets | None, recipe: Recipe, run: RunFolder | None, progress: bool
) -> dict[str, float]:
    """Make the step that the recipe asks for, or put in place what it gave before."""
    if not recipe.distil:
        return {}

    def make() -> dict[str, float]:
        return distil(model, targets, recipe, progress) if targets else {}

    return run.distilled(model, make) if run else make()


@step("judging")
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
