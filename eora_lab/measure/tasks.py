"""Benchmarks through lm-eval, on the model as it is in memory: dense, compressed, or with an adapter.

Data comes from the mirror that EORA_LAB_DATA names (`eora_lab.text.hub`), else from the hub.
"""

import copy
import difflib
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from torch import nn

from eora_lab.errors import EoraLabError, MachineError, at_least
from eora_lab.layer.linear import unpacked
from eora_lab.measure.own_tasks import OWN_TASKS
from eora_lab.model.limits import check_tokens
from eora_lab.products import fast_products
from eora_lab.run.intervals import Interval, paired_bootstrap
from eora_lab.text import hub

FIRST_CHOICE = ("acc", "exact_match", "rougeLsum")  # of several metrics; acc is what the EoRA paper reports
MIRROR_NAMES = {"regisss/math_qa": "allenai/math_qa"}  # lm-eval's name -> the original's, which a mirror has
NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task, or on all questions of a group of tasks together.

    value, stderr: of `metric`, in its own unit (accuracy: 0 to 1); stderr None where lm-eval knows none.
    chance:        what guessing reaches on multiple choice, else None.
    questions:     a hash of every question; outcomes: its score. Empty where a metric has no score a question.
    margins:       of multiple choice, log-probability of the right answer minus that of the best wrong one (nats), a
                   question each: above 0 where `acc` counts it as right. It says by how much, so that a difference
                   between two models is decided by far fewer questions. Empty where lm-eval gives no such numbers.
    parts:         value of each task of a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_fewshot: int
    chance: float | None
    questions: list[str] = field(repr=False)
    outcomes: list[float] = field(repr=False)
    margins: list[float] = field(default_factory=list, repr=False)
    parts: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def near_chance(self) -> str:
        """A warning when the value is at most NOISE standard errors above guessing, else empty."""
        if self.chance is None or self.value > self.chance + NOISE * (self.stderr or 0.0):
            return ""
        return (
            f"{self.task}: {self.metric} {self.value:.4f} is within noise of chance ({self.chance:.4f}): this model "
            "looks broken, or too small for the task; do not report gains over it"
        )

    @property
    def margin(self) -> tuple[float, float | None] | None:
        """The mean margin and its standard error (None of a single question); None without margins."""
        if not self.margins:
            return None
        n = len(self.margins)
        return statistics.fmean(self.margins), statistics.stdev(self.margins) / n**0.5 if n > 1 else None

    def __str__(self) -> str:
        count = f", {len(self.outcomes)} questions" if self.outcomes else ""
        line = f"{self.task} {self.metric} {_spread(self.value, self.stderr)} ({self.num_fewshot}-shot{count})"
        return line + (f", margin {_spread(*self.margin)} nats" if self.margin else "")


def _spread(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + ("" if stderr is None else f" +- {stderr:.4f}")


@fast_products()
def evaluate_tasks(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, TaskResult]:
    """Evaluate lm-eval tasks, groups or tags by name (arc_easy, mathqa, gsm8k, mmlu, ...), or those of OWN_TASKS.

    limit:       the first so many questions of every task (of each of the 57 of mmlu); None: all.
    num_fewshot: worked examples before a question; None: as many as the task says.
    Warns when questions are longer than the model's context, and are cut.
    Raises EoraLabError: lm-eval is not installed, an unknown task, data found neither in the mirror nor on the hub, a
    number out of range, a task that does not fit the model's context or tokenizer, or tokens that the model cannot
    take (see `check_tokens`).
    """
    check_tasks(tasks, limit, num_fewshot, batch_size)
    import lm_eval

    from eora_lab.measure.harness import Harness

    manager = _manager()
    harness = Harness(model, tokenizer, batch_size)
    with _mirror_before_hub(num_fewshot):
        members = {name: manager.load([copy.deepcopy(OWN_TASKS.get(name, name))])["tasks"] for name in tasks}
    leaves = {leaf: task for loaded in members.values() for leaf, task in loaded.items()}
    with unpacked(model), _checked(model):
        found = lm_eval.simple_evaluate(
            harness,
            tasks=list(leaves.values()),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    harness.warn_if_cut(", ".join(tasks))
    single = {leaf: _result(leaf, task, found) for leaf, task in leaves.items()}
    return {name: _pool(name, [single[leaf] for leaf in loaded]) for name, loaded in members.items()}


@contextmanager
def _checked(model: nn.Module) -> Iterator[None]:
    """While lm-eval runs, look at all tokens before the model does: they are made deep inside of it."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_pre_hook(lambda _, inputs: check_tokens(model, *inputs))
    try:
        yield
    finally:
        hook.remove()


def check_tasks(
    tasks: Sequence[str], limit: int | None = None, num_fewshot: int | None = None, batch_size: int = 8
) -> None:
    """What can be known to be wrong before a model is loaded: raises EoraLabError as `evaluate_tasks` does."""
    at_least(1, limit=limit, batch_size=batch_size)
    at_least(0, num_fewshot=num_fewshot)
    if not tasks:
        return
    known = {*_manager().all_tasks, *OWN_TASKS}
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise EoraLabError(f"no task {name!r} in lm-eval or here{hint}")


@lru_cache(maxsize=1)
def _manager():
    """lm-eval's index of its thousands of task files, which takes seconds to make."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EoraLabError(
            f'tasks need lm-eval, which is not installed ({error}): pip install "eora-lab[eval]"'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def compare_results(a: TaskResult, b: TaskResult) -> dict[str, Interval]:
    """The paired intervals of b - a: of the metric, by its name, and "margin" (nats) of multiple choice.

    Raises EoraLabError unless both answered the same questions the same way.
    """
    same = (a.task, a.metric, a.num_fewshot, a.questions) == (b.task, b.metric, b.num_fewshot, b.questions)
    if not same:
        raise EoraLabError(f"{a.task}: the two models did not answer the same questions: evaluate both alike")
    found = {a.metric: paired_bootstrap(a.outcomes, b.outcomes)}
    return found | ({"margin": paired_bootstrap(a.margins, b.margins)} if a.margins and b.margins else {})


def _result(name: str, task, found: dict) -> TaskResult:
    """One task's result from what lm-eval returned."""
    samples = found["samples"][name]
    metrics = [metric for metric in FIRST_CHOICE if metric in samples[0]] or list(samples[0]["metrics"])
    metric, chosen = metrics[0], samples[0]["filter"]  # a task may score several extractions of the answer
    samples = sorted((s for s in samples if s["filter"] == chosen), key=lambda sample: sample["doc_id"])
    numbers = found["results"][name]
    stderr = numbers.get(f"{metric}_stderr,{chosen}")
    scored = all(isinstance(sample[metric], int | float) for sample in samples)
    choices = [len(sample["arguments"]) for sample in samples]
    return TaskResult(
        task=name,
        metric=metric,
        value=float(numbers[f"{metric},{chosen}"]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        num_fewshot=task.get_config("num_fewshot") or 0,
        chance=sum(1 / n for n in choices) / len(choices) if task.OUTPUT_TYPE == "multiple_choice" else None,
        questions=[sample["doc_hash"][:16] for sample in samples] if scored else [],
        outcomes=[float(sample[metric]) for sample in samples] if scored else [],
        margins=_margins(task, samples) if scored and metric == "acc" else [],
    )


def _margins(task, samples: list[dict]) -> list[float]:
    """The margin of every question of plain multiple choice; nothing where one has none that is finite."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results is not None:
        return []
    found = []
    for sample in samples:
        doc = sample["doc"]
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else sample["target"]
        right = {choices.index(one) if one in choices else one for one in (gold if isinstance(gold, list) else [gold])}
        chances = [float(answer[0]) for answer in sample["filtered_resps"][: len(choices)]]
        ours = [chance for index, chance in enumerate(chances) if index in right]
        others = [chance for index, chance in enumerate(chances) if index not in right]
        if not ours or not others:
            return []
        found.append(max(ours) - max(others))
    return found if all(map(math.isfinite, found)) else []


def _pool(name: str, parts: list[TaskResult]) -> TaskResult:
    """A group's result: every question of every part weighs the same, as lm-eval does for mmlu."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.metric, part.num_fewshot) for part in parts}) > 1 or not all(part.outcomes for part in parts):
        raise EoraLabError(f"the tasks of {name} have different metrics and cannot be pooled: name them one by one")
    outcomes = [score for part in parts for score in part.outcomes]
    n, mean = len(outcomes), sum(outcomes) / len(outcomes)
    variance = sum((score - mean) ** 2 for score in outcomes) / (n - 1)
    guessed = [part.chance for part in parts if part.chance is not None for _ in part.outcomes]
    return TaskResult(
        task=name,
        metric=parts[0].metric,
        value=mean,
        stderr=(variance / n) ** 0.5,
        num_fewshot=parts[0].num_fewshot,
        chance=sum(guessed) / n if len(guessed) == n else None,
        questions=[question for part in parts for question in part.questions],
        outcomes=outcomes,
        margins=[one for part in parts for one in part.margins] if all(part.margins for part in parts) else [],
        parts={part.task: part.value for part in parts},
    )


@contextmanager
def _mirror_before_hub(num_fewshot: int | None) -> Iterator[None]:
    """While tasks are loaded, let them take their data from the mirror, and say in one line where there is none.

    lm-eval has no hook for that but a changed copy of every task's configuration, which groups would not use.
    """
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(task, dataset_kwargs: dict | None = None, **rest) -> None:
        if callable(task.config.custom_dataset):
            return original(task, dataset_kwargs, **rest)
        if _from_mirror(task, num_fewshot):
            return None
        with hub.asking(task.DATASET_PATH) as unreachable:
            try:
                return original(task, dataset_kwargs, **rest)
            except Exception as error:
                path = MIRROR_NAMES.get(task.DATASET_PATH, task.DATASET_PATH)
                raise MachineError(
                    f"no data for the task {task.config.task}: neither the mirror nor the hub gave {task.DATASET_PATH} "
                    f"({unreachable or type(error).__name__}); set EORA_LAB_DATA to a folder with "
                    f"{path}/{task.DATASET_NAME or 'default'}/<split>-*.parquet, or allow network access to the hub"
                ) from error

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _from_mirror(task, num_fewshot: int | None) -> bool:
    """Give a task the mirror's splits, and let it forget those that the mirror lacks. False: the mirror has none.

    Raises EoraLabError when the split of the questions, or that of the worked examples, is one of those.
    """
    import datasets

    config = task.config
    path = MIRROR_NAMES.get(task.DATASET_PATH, task.DATASET_PATH)
    splits = hub.mirrored(path, task.DATASET_NAME or "default") if path and not config.dataset_kwargs else {}
    if not splits:
        return False
    shots = config.num_fewshot if num_fewshot is None or config.num_fewshot == 0 else num_fewshot
    needed = [config.test_split or config.validation_split]
    if shots:
        needed.append(config.fewshot_config.split or config.training_split or config.validation_split)
    for split in needed:
        if split and split not in splits:
            raise MachineError(
                f"the mirror has no {split} split of {path} ({task.DATASET_NAME or 'default'}), which the task "
                f"{config.task} needs: add {split}-*.parquet there, or unset EORA_LAB_DATA to ask the hub"
            )
    for name in ("training_split", "validation_split"):
        if getattr(config, name) not in splits:
            setattr(config, name, None)
    if config.fewshot_config.split not in splits:
        config.fewshot_config.split = None
    task.dataset = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    return True
