"""One experiment: a model, what is done to it, and what is measured. A sweep is a list of these."""

import copy
import re
import time
from collections.abc import Mapping
from dataclasses import field, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.compensate import needs_outputs
from eora_lab.environment import peak_memory
from eora_lab.errors import EoraLabError, at_least, check_pattern, settings, unknown
from eora_lab.experiment.cache import ContentCache, SharedSteps
from eora_lab.experiment.code import code_digest
from eora_lab.files import digest
from eora_lab.measure.evaluate import window_losses
from eora_lab.model import Dtype
from eora_lab.model.digest import model_digest
from eora_lab.model.load import load_model
from eora_lab.model.start import start_text
from eora_lab.model.structure import block_linears
from eora_lab.run.budget import Budget
from eora_lab.run.pipeline import compress_model, tokens_digest
from eora_lab.run.ranks import check_budget
from eora_lab.run.recipe import PathSettings, Recipe
from eora_lab.run.report import Report
from eora_lab.text.settings import Calibration, Evaluation

DENSE = "dense"  # in place of a compressor: the model as it is
LATER = {"skip": "", "keep_first": 0, "keep_last": 0, "rank_only": ""}  # named in a configuration where they differ
GRID = {"grid": "integer"}
LATER |= GRID | {"labels": "model", "distil": False, "shared_factors": False, "preserve": False}
MEASURED = ("perplexity", "tasks")  # fields whose lists are measured together, and are no axis of a grid


@settings
class Cell:
    """Settings of one experiment. `config` is their flat form, `from_config` the way back.

    Cells with inputs="original" and the same model, texts and held-out share use one calibration pass; those that also
    agree on the compressor's settings, one compressed model; and those that differ in the rank alone, one solve.
    """

    model: str = "smollm2-135m"
    dtype: Dtype = "float32"
    recipe: Recipe | None = field(default_factory=Recipe)  # None: the dense model
    rank_only: str = ""  # regular expression; compressed layers whose name it does not match get rank 0
    budget: Literal["uniform", "relative", "absolute", "nats"] = "uniform"  # how ranks are spread, see `Budget`
    calibration: Calibration = field(default_factory=Calibration)
    base_source: str = ""  # what the compressor is calibrated on, where that differs
    evaluation: Evaluation = field(default_factory=Evaluation)
    tasks: tuple[str, ...] = ()  # of lm-eval
    limit: int | None = None  # questions of a task; None: all
    num_fewshot: int | None = None  # None: as the task says

    def check(self) -> None:
        """Raise EoraLabError where settings do not go together, or a number is out of range."""
        at_least(1, limit=self.limit)
        at_least(0, num_fewshot=self.num_fewshot)
        if self.base_source and not self.shared:
            raise EoraLabError(
                'a base_source needs inputs="original" and one round: else compressor and solver see the same inputs'
            )
        check_pattern(self.rank_only)
        if self.rank_only and self.budget != "uniform":
            raise EoraLabError("rank_only chooses layers for one rank; a budget spreads ranks over all of them")
        if self.recipe is not None:
            check_budget(Budget(self.budget), self.recipe)

    def config(self) -> dict:
        """A flat dict of JSON values. What a cell does not use is left out, so that equal cells are equal."""
        unused = set()
        if self.recipe is None:
            unused |= {"rank_only", "budget", "base_source"}
        if not self.tasks:
            unused |= {"limit", "num_fewshot"}
        if self.calibration.column is None:
            unused |= {"column"}
        found: dict[str, Any] = {}
        for part in (self.recipe, self, self.calibration if self.recipe else None, self.evaluation):
            names = [one.name for one in fields(part)] if part else []
            found |= {name: getattr(part, name) for name in names if name not in PARTS and name not in unused}
        if not self.evaluation.perplexity:
            found = {name: value for name, value in found.items() if name not in ("windows", "window_length")}
        later = LATER if not found.get("only") else GRID  # in older cells `only` was what `rank_only` is: told apart
        found = {name: value for name, value in found.items() if name not in later or value != later[name]}
        head = {} if self.recipe else {"compressor": DENSE}
        return head | {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_config(cls, config: Mapping) -> "Cell":
        """A cell from any of its settings and those of its parts; the others keep their defaults.

        Raises EoraLabError for an unknown setting or a value of another type.
        """
        known = {kind: [one.name for one in fields(kind) if one.name not in PARTS] for kind in (cls, *PARTS.values())}
        for name in config:
            if not any(name in names for names in known.values()):
                raise unknown("setting", name, sorted(name for names in known.values() for name in names))
        own = {kind: {name: config[name] for name in names if name in config} for kind, names in known.items()}
        parts: dict[str, Any] = {"recipe": None}
        if config.get("compressor") == DENSE:
            own[cls] |= {"rank_only": "", "budget": "uniform", "base_source": ""}
        else:
            recipe = Recipe(**own[Recipe])
            if recipe.method == "none":  # has no rank, no factors
                plain: dict[str, Any] = {one.name: one.default for one in fields(PathSettings) if one.name != "method"}
                recipe = replace(recipe, **plain | {"rank": 0, "preserve": False})
                own[cls] |= {"rank_only": "", "budget": "uniform"}
            parts["recipe"] = recipe
        parts |= {"calibration": Calibration(**own[Calibration]), "evaluation": Evaluation(**own[Evaluation])}
        return cls(**parts, **own[cls])

    @property
    def shared(self) -> bool:
        """Whether calibration pass, compressed weights and solve can be shared with other cells.

        With several rounds, or a part preserved, the compressed weight depends on the low-rank path.
        """
        recipe = self.recipe
        return recipe is not None and recipe.inputs == "original" and recipe.rounds == 1 and not recipe.preserve


PARTS: dict[str, type] = {"recipe": Recipe, "calibration": Calibration, "evaluation": Evaluation}  # fields of a cell


@lru_cache(maxsize=1)
def load(name: str, dtype: str, device: str) -> tuple[nn.Module, Any, str]:
    """(model, tokenizer, digest of the model): cells of one model follow each other. A sweep clears it at both ends."""
    model, tokenizer = load_model(name, dtype, device)
    return model, tokenizer, model_digest(model)


def run_cell(
    cell: Cell, cache: ContentCache, highest: int = 0, batch_size: int = 8, device: str = "cpu", progress: bool = False
) -> tuple[dict, dict]:
    """(result, cost) of one cell: what it measured, and the seconds of its steps with the peak memory in bytes.

    highest: the largest rank of the cells that share this one's solve.
    Raises EoraLabError when a setting does not fit the model, or data is missing.
    """
    clock = _Clock()
    model, tokenizer, weights = load(cell.model, cell.dtype, device)
    texts = cell.evaluation.tokens(tokenizer)
    clock.lap("load")
    if cell.recipe is None:
        candidate = model
        size = getattr(torch, cell.dtype).itemsize
        count = sum(linear.weight.numel() for linear in block_linears(model).values())
        result: dict = {"nbytes": count * size, "bits_per_weight": 8.0 * size}
    else:
        candidate = copy.deepcopy(model)
        result = _compress(candidate, tokenizer, cell, cache, highest, weights, clock, progress)
    for text, tokens in texts.items():
        losses = window_losses(candidate, tokens, progress)
        result.setdefault("perplexity", {})[text] = losses.mean().exp().item()
        result.setdefault("window_losses", []).append([text, losses.tolist()])
        result.setdefault("window_tokens", []).append([text, tokens_digest(tokens)])
    if begun := start_text(tokenizer):
        result["bos"] = begun  # every sequence begins with it
    clock.lap("perplexity")
    if cell.tasks:
        result["tasks"] = _tasks(candidate, tokenizer, cell, batch_size)
        clock.lap("tasks")
    return result, clock.seconds | {"peak_memory": peak_memory(next(model.parameters()).device)}


def _compress(
    candidate: nn.Module,
    tokenizer,
    cell: Cell,
    cache: ContentCache,
    highest: int,
    weights: str,
    clock: "_Clock",
    progress: bool,
) -> dict:
    """Compress and compensate a copy of the model, with what other cells left in the cache. Returns what it came to."""
    recipe = cell.recipe
    assert recipe is not None
    ranks: dict[str, int] | Budget | None = Budget(cell.budget) if cell.budget != "uniform" else None
    if cell.rank_only:
        ranks = {name: rank if re.search(cell.rank_only, name) else 0 for name, rank in recipe.ranks(candidate).items()}
        if not any(ranks.values()):
            raise EoraLabError(f"no layer matches {cell.rank_only!r}; names are like {next(iter(ranks))}")
    batches = cell.calibration.batches(candidate, tokenizer)
    statistics, steps = None, None
    if cell.shared:
        recipe.check_fit(candidate, None if isinstance(ranks, Budget) else ranks)  # before the long calibration pass

        def measure(tokens) -> tuple[str, dict[str, InputStatistics]]:
            key = digest([code_digest(), weights, cell.dtype, tokens_digest(tokens), recipe.held_out])[:24]
            return key, cache.statistics(candidate, tokens, recipe.held_out, key, progress)

        key, statistics = measure(batches)
        base_key, base = key, statistics
        if cell.base_source:
            other = replace(cell.calibration, source=cell.base_source, column=None)
            base_key, base = measure(other.batches(candidate, tokenizer))
        clock.lap("statistics")
        outputs, labels = None, recipe.labels
        if needs_outputs(recipe.method):
            key = digest([key, labels])[:24]  # with the same key, the gradients of one text
            outputs = cache.outputs(candidate, batches, recipe.held_out, labels, key, progress)
            clock.lap("gradients")
        steps = SharedSteps(recipe, cache, key, base, base_key, highest, outputs)
    linears = block_linears(candidate)
    report = compress_model(
        candidate, batches, recipe, ranks=ranks, statistics=statistics, steps=steps, progress=progress
    )
    clock.lap("compress")
    for layer in report.layers:
        del linears[layer.name]
    return _outcome(report, steps.data_free if steps else set(), list(linears.values()))


def _outcome(report: Report, data_free: set[str], left: list[nn.Linear]) -> dict:
    """What a cell keeps of a report. left: linears that stayed, which count as in the dense model."""

    def mean(name: str) -> float:
        return sum(getattr(layer, name) for layer in report.layers) / len(report.layers)

    result: dict = {"output_error": {"before": mean("error_before"), "after": mean("error_after")}}
    if report.layers[0].held_out_after is not None:
        result["held_out_error"] = {"before": mean("held_out_before"), "after": mean("held_out_after")}
    weights = report.weights + sum(linear.weight.numel() for linear in left)
    nbytes = report.nbytes + sum(linear.weight.nbytes for linear in left)
    result |= {"nbytes": nbytes, "bits_per_weight": 8 * nbytes / weights}
    result["layers"] = [[la.name, la.rank, la.error_before, la.error_after] for la in report.layers]
    result["tier"] = report.tier
    if all(layer.nats_after is not None for layer in report.layers):
        result["nats"] = {
            when: sum(getattr(la, f"nats_{when}") for la in report.layers) for when in ("before", "after")
        }
    if any(layer.drift for layer in report.layers):
        result["drift"] = mean("drift")
    if report.distilled:
        result["divergence"] = {one: report.distilled[one] for one in ("before", "after", "share")}
    result["data_free"] = [la.name for la in report.layers if la.data_free or la.name in data_free]
    return result


def _tasks(model: nn.Module, tokenizer, cell: Cell, batch_size: int) -> dict:
    from eora_lab.measure.tasks import evaluate_tasks

    found = evaluate_tasks(model, tokenizer, cell.tasks, cell.limit, cell.num_fewshot, batch_size)
    return {
        name: {
            "metric": result.metric,
            "value": result.value,
            "stderr": result.stderr,
            "num_fewshot": result.num_fewshot,
            "chance": result.chance,
            "warning": result.near_chance,
            "questions": result.questions,
            "outcomes": result.outcomes,
        }
        | ({"margin": result.margin[0], "margin_stderr": result.margin[1]} if result.margin else {})
        | ({"margins": result.margins} if result.margins else {})
        for name, result in found.items()
    }


class _Clock:
    """Seconds of the steps of a cell."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self.seconds["total"] = now - self._start
        self._last = now
