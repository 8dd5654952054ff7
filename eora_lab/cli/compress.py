"""`eora-lab compress`."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from eora_lab.cli.early import check_inputs, check_run_folder, check_selection
from eora_lab.cli.options import say_start
from eora_lab.model import Dtype
from eora_lab.run.best import Named
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation

OVERLOOKED = 0.05  # share of the decoder's weights; with more, the model is not as small as its bits say


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Compress a model, compensate it, and keep the result in a run folder.

    The folder holds the packed weights, the low-rank path as a PEFT adapter, the configuration and the report. An
    interrupted run resumes when it is started again with the same settings.

    `eora-lab compress runs/best --recipe best` is there to lose less in the same bytes, and takes longer: errors count
    as what they cost the model, by gradients, ranks are spread by that, every layer aims at the outputs of the original
    model, as far as that helps on the eighth of the samples that is held out, and weights and path are made for each
    other in turn. Each of these has a setting of its own: --method, --budget.objective, --inputs, --rounds.

    Not all linears need to be compressed: `eora-lab compress runs/part --skip "o_proj|down_proj" --keep-first 1` leaves
    two linears of every block and the whole first block as they are, `--only mlp` all outside the MLPs. The report says
    what was left, and why.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """run folder to write"""
    model: str = "smollm2-135m"
    """embedded model, hub id, or folder"""
    named: Annotated[Named, tyro.conf.arg(name="recipe")] = "given"
    """given: the settings below; best: those of all parts together that lose less in the same bytes, where no others
    are given"""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]  # no default: to make one needs torch, and help does not
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
    device: str = "cpu"
    """cpu or cuda"""

    def run(self) -> None:
        recipe, budget = of_name(self.named, self.recipe, self.budget)
        run_pass(
            self.model,
            recipe,
            self.output,
            budget=budget,
            calibration=self.calibration,
            evaluation=self.evaluation if self.evaluate else None,
            imatrix=self.imatrix,
            dtype=self.dtype,
            device=self.device,
        )


def of_name(named: Named, recipe: Recipe, budget: Budget) -> tuple[Recipe, Budget]:
    """Recipe and budget as `--recipe` fills them up."""
    from eora_lab.run.best import best_recipe

    return best_recipe(recipe, budget) if named == "best" else (recipe, budget)


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
    weights: Mapping | None = None,
    reround: bool = False,
) -> None:
    """Compress the model `name` into the folder `output`, and print the report. What cannot be used is refused early.

    imatrix: in place of texts to calibrate on. weights, reround: as of `compress_model`.
    """
    from eora_lab.files import file_digest
    from eora_lab.formats.imatrix import read_imatrix
    from eora_lab.measure.evaluate import window_losses
    from eora_lab.model.load import load_model
    from eora_lab.model.start import start_text
    from eora_lab.run.pipeline import compress_model

    check_run_folder(output)
    recipe = with_imatrix(recipe, imatrix, given=weights is not None)
    check_inputs(name, (*(() if imatrix else (calibration.text,)), *(evaluation.perplexity if evaluation else ())))
    if weights is None:
        check_selection(name, recipe)
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    statistics = read_imatrix(imatrix, model) if imatrix else None
    begun = start_text(tokenizer)
    say_start(begun)
    windows = evaluation.tokens(tokenizer) if evaluation else {}

    def judge(one) -> dict[str, list[float]]:
        return {text: window_losses(one, tokens, progress=True).tolist() for text, tokens in windows.items()}

    measured = {"imatrix": imatrix.name, "imatrix_sha256": file_digest(imatrix)} if imatrix else asdict(calibration)
    report = compress_model(
        model,
        None if imatrix else calibration.batches(model, tokenizer),
        recipe,
        ranks=budget,
        folder=output,
        notes=measured | ({"bos": begun} if begun else {}),
        statistics=statistics,
        weights=weights,
        reround=reround,
        judge=judge if evaluation else None,
    )
    print(report)
    if report.overlooked_share > OVERLOOKED:
        print(f"warning: only {report.coverage_line()}", file=sys.stderr)
    print(f"wrote {output}: try  {shlex.join(['eora-lab', 'generate', str(output), 'The capital of France is'])}")
