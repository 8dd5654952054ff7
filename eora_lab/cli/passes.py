"""What `compress` and `mend` have in common: a pass over a model, kept in a run folder."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eora_lab.cli.early import check_inputs, check_run_folder, check_selection
from eora_lab.cli.options import say_start
from eora_lab.model import Dtype
from eora_lab.run.best import Named, best_recipe
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe
from eora_lab.text.settings import Calibration, Evaluation

OVERLOOKED = 0.05  # share of the decoder's weights; with more, the model is not as small as its bits say


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The settings of a command that makes one pass over a model, but for those of the recipe."""

    named: Annotated[Named, tyro.conf.arg(name="recipe")] = "given"
    """given: the settings below; best: those of all parts together that lose less in the same bytes, but for settings
    that differ from their defaults, which stay"""
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    evaluate: bool = True
    """measure the perplexity before and after"""
    imatrix: Path | None = None
    """importance matrix of the original model, of llama-imatrix or `eora-lab imatrix`: nothing is measured, and what
    compresses and compensates has to look at channels alone, such as rtn and qera_approx"""
    dtype: Dtype = "float32"
    """type that the model is held in; in that of its files, mostly bfloat16, the model may be larger than memory"""
    hidden_states: Literal["memory", "disk"] = "memory"
    """where the hidden states of the calibration texts are between two blocks: memory, or disk, which is for more texts
    than memory holds; they then lie in the run folder until the run is finished, and an interrupted run goes on from
    them without running its finished blocks again"""
    device: str = "cpu"
    """cpu or cuda"""

    def make(
        self,
        name: str,
        output: Path,
        settings: Mapping[str, Any],
        device: str,
        weights: Mapping | None = None,
        reround: bool = False,
    ) -> None:
        """Compress the model `name` into the folder `output`, print the report. What cannot be used is refused early.

        settings: of the recipe, by name. device: of this process. weights, reround: as of `compress_model`.
        """
        from eora_lab.calibrate.processes import Processes
        from eora_lab.files import file_digest
        from eora_lab.formats.imatrix import read_imatrix
        from eora_lab.measure.evaluate import window_losses
        from eora_lab.model.load import load_model
        from eora_lab.model.start import start_text
        from eora_lab.run.hints import hints
        from eora_lab.run.pipeline import compress_model

        processes, imatrix, calibration = Processes.of_group(), self.imatrix, self.calibration
        evaluation = self.evaluation if self.evaluate else None
        with processes.agree():
            recipe, budget = of_name(self.named, settings, self.budget)
            check_run_folder(output)
            recipe = with_imatrix(recipe, imatrix, given=weights is not None)
            check_inputs(
                name, (*(() if imatrix else (calibration.text,)), *(evaluation.perplexity if evaluation else ()))
            )
            if weights is None:
                check_selection(name, recipe)
            model, tokenizer = load_model(name, dtype=self.dtype, device=device)
            statistics = read_imatrix(imatrix, model) if imatrix else None
            begun = start_text(tokenizer)
            if not processes.rank:
                say_start(begun)
                for hint in hints(recipe, model, budget, given=weights is not None):
                    print(f"hint: {hint}", file=sys.stderr)
            windows = evaluation.tokens(tokenizer) if evaluation else {}
            batches = None if imatrix else calibration.batches(model, tokenizer)

        def judge(one) -> dict[str, list[float]]:
            return {
                text: window_losses(one, tokens, not processes.rank, processes).tolist()
                for text, tokens in windows.items()
            }

        finished = (output / "report.json").exists()
        measured = {"imatrix": imatrix.name, "imatrix_sha256": file_digest(imatrix)} if imatrix else asdict(calibration)
        report = compress_model(
            model,
            batches,
            recipe,
            ranks=budget,
            folder=output,
            hidden_states=self.hidden_states,
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
        told = f"{output} was finished before" if finished else f"wrote {output}"
        print(f"{told}: try  {shlex.join(['eora-lab', 'generate', str(output), 'The capital of France is'])}")


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
