"""`eora-lab compress`."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eora_lab.cli.early import check_inputs, check_run_folder, check_selection
from eora_lab.cli.options import say_start
from eora_lab.model import Dtype
from eora_lab.run.best import Named, best_recipe
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation

OVERLOOKED = 0.05  # share of the decoder's weights; with more, the model is not as small as its bits say


class Asked(Recipe):
    """Settings of a recipe that are checked once `--recipe` has filled them up, by `of_name`."""

    def check(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Compress a model, compensate it, and keep the result in a run folder.

    The folder holds the packed weights, the low-rank path as a PEFT adapter, the configuration and the report. An
    interrupted run resumes when it is started again with the same settings.

    `eora-lab compress runs/best --recipe best` is there to lose less in the same bytes, and takes longer: errors count
    as what they cost the model, by gradients, ranks are spread by that, and every layer aims at the outputs of the
    original model, as far as that helps on the eighth of the samples that is held out. Each of these has a setting of
    its own: --method, --budget.objective, --inputs with --true-sequential.

    Not all linears need to be compressed: `eora-lab compress runs/part --skip "o_proj|down_proj" --keep-first 1` leaves
    two linears of every block and the whole first block as they are, `--only mlp` all outside the MLPs. The report says
    what was left, and why.

    `torchrun --nproc-per-node 4 -m eora_lab.cli compress runs/first` shares the pass among four processes, each with a
    GPU of its own where --device is cuda; the files are those of one process.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    named: Annotated[Named, tyro.conf.arg(name="recipe")] = "given"
    """given: the settings below; best: those of all parts together that lose less in the same bytes, but for settings
    that differ from their defaults, which stay"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="", constructor=Asked)] = field(default_factory=Asked)
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    evaluate: bool = True
    """measure the perplexity before and after"""
    imatrix: Path | None = None
    """importance matrix of the original model, of llama-imatrix or `eora-lab imatrix`: nothing is measured, and
    compressor and method have to be such that look at channels alone, such as rtn and qera_approx"""
    dtype: Dtype = "float32"
    """type that the model is held in; in that of its files, mostly bfloat16, the model may be larger than memory"""
    hidden_states: Literal["memory", "disk"] = "memory"
    """where the hidden states of the calibration texts are between two blocks: memory, or disk, which is for more texts
    than memory holds; they then lie in the run folder until the run is finished, and an interrupted run goes on from
    them without running its finished blocks again"""
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        from eora_lab.calibrate.processes import Processes, group
        from eora_lab.environment import timed

        with timed(), group(self.device) as device:
            with Processes.of_group().agree():
                recipe, budget = of_name(self.named, asdict(self.recipe), self.budget)
            run_pass(
                self.model,
                recipe,
                self.output,
                budget=budget,
                calibration=self.calibration,
                evaluation=self.evaluation if self.evaluate else None,
                imatrix=self.imatrix,
                dtype=self.dtype,
                device=device,
                hidden_states=self.hidden_states,
            )


def of_name(named: Named, settings: Mapping, budget: Budget) -> tuple[Recipe, Budget]:
    """Recipe of these settings, and budget, as `--recipe` fills them up."""
    return best_recipe(settings, budget) if named == "best" else (Recipe(**settings), budget)


def with_imatrix(recipe: Recipe, imatrix: Path | None, given: bool) -> Recipe:
    """The recipe of a pass with an imatrix, if there is one: its inputs are those of the original model.

    Raises EoraLabError when it needs more than an imatrix holds. given: weights come compressed.
    """
    from eora_lab.run.fit import check_diagonal

    if imatrix is None:
        return recipe
    check_diagonal(recipe, given)
    return replace(recipe, inputs="original")


def run_pass(
    name: str,
    recipe: Recipe,
    output: Path,
    *,
    budget: Budget,
    calibration: Calibration,
    evaluation: Evaluation | None,
    imatrix: Path | None,
    dtype: Dtype,
    device: str,
    hidden_states: Literal["memory", "disk"] = "memory",
    weights: Mapping | None = None,
    reround: bool = False,
) -> None:
    """Compress the model `name` into the folder `output`, and print the report. What cannot be used is refused early.

    imatrix: in place of texts to calibrate on. weights, reround: as of `compress_model`.
    """
    from eora_lab.calibrate.processes import Processes
    from eora_lab.files import file_digest
    from eora_lab.formats.imatrix import read_imatrix
    from eora_lab.measure.evaluate import window_losses
    from eora_lab.model.load import load_model
    from eora_lab.model.start import start_text
    from eora_lab.run.pipeline import compress_model

    processes = Processes.of_group()
    with processes.agree():
        check_run_folder(output)
        recipe = with_imatrix(recipe, imatrix, given=weights is not None)
        check_inputs(name, (*(() if imatrix else (calibration.text,)), *(evaluation.perplexity if evaluation else ())))
        if weights is None:
            check_selection(name, recipe)
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        statistics = read_imatrix(imatrix, model) if imatrix else None
        begun = start_text(tokenizer)
        if not processes.rank:
            say_start(begun)
        windows = evaluation.tokens(tokenizer) if evaluation else {}
        batches = None if imatrix else calibration.batches(model, tokenizer)

    def judge(one) -> dict[str, list[float]]:
        return {
            text: window_losses(one, tokens, not processes.rank, processes).tolist() for text, tokens in windows.items()
        }

    measured = {"imatrix": imatrix.name, "imatrix_sha256": file_digest(imatrix)} if imatrix else asdict(calibration)
    report = compress_model(
        model,
        batches,
        recipe,
        ranks=budget,
        folder=output,
        hidden_states=hidden_states,
        notes=measured | ({"bos": begun} if begun else {}),
        statistics=statistics,
        weights=weights,
        reround=reround,
        judge=judge if evaluation else None,
    )
    if processes.rank:
        return
    print(report)
    if report.overlooked_share > OVERLOOKED:
        print(f"warning: only {report.coverage_line()}", file=sys.stderr)
    print(f"wrote {output}: try  {shlex.join(['eora-lab', 'generate', str(output), 'The capital of France is'])}")
