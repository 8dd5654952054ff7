"""One experiment: a model, what is done to it, and what is measured. A sweep is a list of these."""

import copy
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.statistics import InputStatistics
from eora_lab.environment import peak_memory
from eora_lab.errors import EoraLabError
from eora_lab.experiment.cache import ContentCache, SharedRecipe
from eora_lab.experiment.store import ResultStore
from eora_lab.files import digest
from eora_lab.measure.evaluate import window_losses
from eora_lab.model.load import load_model
from eora_lab.run.pipeline import compress_linear, compress_model, identity
from eora_lab.run.recipe import Recipe
from eora_lab.run.report import LayerReport
from eora_lab.text.tokens import calibration_batches, token_windows

DENSE = "dense"  # in place of a compressor: the model as it is
MEASURED = ("perplexity", "tasks")  # fields whose lists are measured together, and are no axis of a grid


@dataclass(frozen=True)
class Cell:
    """Settings of one experiment. `config` is their flat form, `from_config` the way back.

    Cells with inputs="original" and the same model, texts and held-out share use one calibration pass; those that also
    agree on the compressor's settings, one compressed model; and those that differ in the rank alone, one solve.
    """

    model: str = "smollm2-135m"
    dtype: str = "float32"
    recipe: Recipe | None = field(default_factory=Recipe)  # None: the dense model
    only: str = ""  # regular expression; layers whose name it does not match get rank 0
    source: str = "pydoc"
    base_source: str = ""  # what the compressor is calibrated on, where that differs
    nsamples: int = 32
    seqlen: int = 512
    share: float = 0.5
    first: bool = False  # the first windows of the text, in place of random ones
    seed: int = 0
    perplexity: tuple[str, ...] = ("pydoc:heldout",)  # texts
    windows: int = 20  # 0: all
    window_length: int = 512  # tokens
    tasks: tuple[str, ...] = ()  # of lm-eval
    limit: int = 0  # questions of a task; 0: all
    num_fewshot: int = -1  # -1: as the task says

    def config(self) -> dict:
        """A flat dict of JSON values. What a cell does not use is left out, so that equal cells are equal."""
        unused = {"recipe"}
        if self.recipe is None:
            unused |= {"only", "source", "base_source", "nsamples", "seqlen", "share", "first", "seed"}
        if not self.perplexity:
            unused |= {"windows", "window_length"}
        if not self.tasks:
            unused |= {"limit", "num_fewshot"}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unused}
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        if self.recipe is None:
            return {"compressor": DENSE} | own
        return {f.name: getattr(self.recipe, f.name) for f in fields(Recipe)} | own

    @classmethod
    def from_config(cls, config: Mapping) -> "Cell":
        """A cell from any of its fields and those of `Recipe`; the others keep their defaults.

        Raises EoraLabError for an unknown field or a value of another type.
        """
        defaults = {f.name: getattr(Recipe(), f.name) for f in fields(Recipe)}
        own = {f.name: getattr(cls(), f.name) for f in fields(cls) if f.name != "recipe"}
        values = {name: _checked(name, value, defaults | own) for name, value in config.items()}
        recipe = Recipe(**{name: value for name, value in values.items() if name in defaults and value != DENSE})
        cell = cls(recipe=recipe, **{name: value for name, value in values.items() if name in own})
        if config.get("compressor") == DENSE:
            return replace(cell, recipe=None)
        if recipe.method == "none":  # has no rank, no factors
            plain = {name: defaults[name] for name in ("factor_bits", "refit", "shrink")}
            return replace(cell, recipe=replace(recipe, rank=0, **plain), only="")
        return cell

    @property
    def shared(self) -> bool:
        """Whether calibration pass, compressed weights and solve can be shared with other cells.

        With several rounds, the compressed weight depends on the low-rank path.
        """
        return self.recipe is not None and self.recipe.inputs == "original" and self.recipe.rounds == 1


def _checked(name: str, value: object, defaults: dict) -> object:
    """A grid's value as its field wants it."""
    if name not in defaults:
        raise EoraLabError(f"unknown setting {name!r} in a grid; known: {', '.join(sorted(defaults))}")
    default = defaults[name]
    if isinstance(default, tuple):
        value = (value,) if isinstance(value, str) else tuple(value or ())
        if all(isinstance(item, str) for item in value):
            return value
    elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is type(default):
        return value
    raise EoraLabError(
        f"{name} must be {type(default).__name__}, not {value!r} (text such as 2:4 needs quotes in YAML)"
    )


load = lru_cache(maxsize=1)(load_model)  # cells of one model follow each other; a sweep clears it when it starts


def run_cell(
    cell: Cell, cache: ContentCache, highest: int = 0, batch_size: int = 8, device: str = "cpu"
) -> tuple[dict, dict]:
    """(result, cost) of one cell: what it measured, and the seconds of its steps with the peak memory in bytes.

    highest: the largest rank of the cells that share this one's solve.
    Raises EoraLabError when a setting does not fit the model, or data is missing.
    """
    clock = _Clock()
    model, tokenizer = load(cell.model, cell.dtype, device)
    texts = {text: token_windows(tokenizer, text, cell.windows or None, cell.window_length) for text in cell.perplexity}
    clock.lap("load")
    result: dict = {}
    if cell.recipe is None:
        candidate = model
    else:
        candidate = copy.deepcopy(model)
        layers = _compress(candidate, tokenizer, cell, cache, highest, clock)
        result["output_error"] = {
            "before": sum(layer.error_before for layer in layers) / len(layers),
            "after": sum(layer.error_after for layer in layers) / len(layers),
        }
        if cell.recipe.held_out:
            result["held_out_error"] = {
                "before": sum(layer.held_out_before for layer in layers) / len(layers),
                "after": sum(layer.held_out_after for layer in layers) / len(layers),
            }
        result["nbytes"] = sum(layer.nbytes for layer in layers)
        weights = sum(layer.out_features * layer.in_features for layer in layers)
        result["bits_per_weight"] = 8 * result["nbytes"] / weights
        result["layers"] = [[la.name, la.rank, la.error_before, la.error_after] for la in layers]
    for text, tokens in texts.items():
        losses = window_losses(candidate, tokens)
        value = losses.mean().exp().item()
        result.setdefault("perplexity", {})[text] = value
        result.setdefault("window_losses", []).append([text, losses.tolist()])
    clock.lap("perplexity")
    if cell.tasks:
        result["tasks"] = _tasks(candidate, tokenizer, cell, batch_size)
        clock.lap("tasks")
    return result, clock.seconds | {"peak_memory": peak_memory(next(model.parameters()).device)}


def run_and_keep(
    cell: Cell, highest: int, store: ResultStore, cache: ContentCache, batch_size: int = 8, device: str = "cpu"
) -> str:
    """Run a cell and keep its result, or its error, in the store. Returns the error, empty when there was none.

    Only what says nothing about the cell stops a sweep: Ctrl-C, and a store that cannot be written.
    """
    try:
        result, cost = run_cell(cell, cache, highest, batch_size, device)
    except Exception as error:
        message = str(error) if isinstance(error, EoraLabError) else f"{type(error).__name__}: {error}"
        store.put(cell.config(), error=message or type(error).__name__)
        return message
    store.put(cell.config(), result=result, cost=cost)
    return ""


def _compress(
    candidate: nn.Module, tokenizer, cell: Cell, cache: ContentCache, highest: int, clock: "_Clock"
) -> list[LayerReport]:
    """Compress and compensate a copy of the model, from the cache where that can be shared."""
    cell.recipe.check(candidate)
    ranks = {name: rank if re.search(cell.only, name) else 0 for name, rank in cell.recipe.ranks(candidate).items()}
    if not any(ranks.values()) and cell.recipe.rank:
        raise EoraLabError(f"no layer matches {cell.only!r}; names are like {next(iter(ranks))}")
    settings = {f.name: getattr(cell.recipe, f.name) for f in fields(Recipe)}
    if not cell.shared:
        if cell.base_source:
            raise EoraLabError(
                'a base_source needs inputs="original" and one round: else compressor and solver see the same inputs'
            )
        batches = _batches(candidate, tokenizer, cell, cell.source)
        layers = compress_model(candidate, batches, **settings, ranks=ranks, progress=False).layers
        clock.lap("compress")
        return layers

    def measure(source: str) -> tuple[str, dict[str, InputStatistics]]:
        batches = _batches(candidate, tokenizer, cell, source)
        key = digest([identity(candidate, batches), cell.recipe.held_out])[:24]
        return key, cache.statistics(candidate, batches, cell.recipe.held_out, key)

    key, statistics = measure(cell.source)
    base_key, base = measure(cell.base_source) if cell.base_source else (key, statistics)
    clock.lap("statistics")
    layers = []
    with torch.no_grad():
        for name, rank in ranks.items():
            if name not in statistics:
                raise EoraLabError(f"{name}: no calibration token reached this layer")
            recipe = SharedRecipe(
                **settings, cache=cache, layer=name, key=key, base=base[name], base_key=base_key, highest=highest
            )
            layers.append(compress_linear(candidate, name, statistics[name], recipe, rank)[1])
    clock.lap("compress")
    return layers


def _batches(model: nn.Module, tokenizer, cell: Cell, source: str) -> Int[Tensor, "nsamples seqlen"]:
    if cell.first:
        return token_windows(tokenizer, source, cell.nsamples, cell.seqlen)
    return calibration_batches(tokenizer, source, cell.nsamples, cell.seqlen, cell.seed, cell.share, model=model)


def _tasks(model: nn.Module, tokenizer, cell: Cell, batch_size: int) -> dict:
    from eora_lab.measure.tasks import evaluate_tasks

    limit, shots = cell.limit or None, None if cell.num_fewshot < 0 else cell.num_fewshot
    found = evaluate_tasks(model, tokenizer, cell.tasks, limit, shots, batch_size)
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
