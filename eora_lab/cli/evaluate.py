"""`eora-lab evaluate`."""

import sys
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from eora_lab.cli.early import check_inputs
from eora_lab.cli.options import Loading, say_start
from eora_lab.text.settings import Evaluation


@dataclass(frozen=True)
class Evaluate:
    """Measure the perplexity of a model or of a run folder, and its accuracy on lm-eval tasks.

    Tasks read their data from the mirror that EORA_LAB_DATA names, else from the hub; `exemplars` needs neither.
    """

    model: Annotated[str, tyro.conf.Positional] = "smollm2-135m"
    """embedded model, hub id, model folder, or run folder"""
    adapter: str | None = None
    """PEFT adapter folder to use with a run folder's compressed weights, in place of its own; off: none"""
    evaluation: Annotated[Evaluation, tyro.conf.arg(name="")] = field(default_factory=Evaluation)
    tasks: tuple[str, ...] = ()
    """lm-eval tasks or groups: arc_easy, arc_challenge, mathqa, gsm8k, mmlu, ...; cnn_dailymail (ROUGE-Lsum);
    exemplars (held-out worked questions that come with lm-eval)"""
    limit: int | None = None
    """the first so many questions of every task"""
    num_fewshot: int | None = None
    """worked examples before a question; as many as the task says if not given"""
    batch_size: int = 8
    """requests that run at once"""
    against: str | None = None
    """a second model or run folder: measure it too, and print the paired 95 % interval of second minus first"""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)

    def run(self) -> None:
        from eora_lab.errors import EoraLabError
        from eora_lab.measure.tasks import check_tasks

        if not (self.evaluation.perplexity or self.tasks):
            raise EoraLabError("nothing to measure: name a text (--perplexity) or a task (--tasks)")
        for model in filter(None, (self.model, self.against)):
            check_inputs(model, self.evaluation.perplexity)
        check_tasks(self.tasks, self.limit, self.num_fewshot, self.batch_size)
        first = self.measure(self.model, self.loading, self.adapter)
        if self.against is None:
            return
        from eora_lab.measure.tasks import compare_results
        from eora_lab.run.intervals import paired

        alike = replace(self.loading, backend="auto", base=None)
        second = self.measure(self.against, alike)
        print(f"{self.against} minus {self.model}, 95 % paired bootstrap:")
        for text, losses in first[0].items():
            try:
                print(f"log perplexity on {text} {paired(losses, second[0][text])}")
            except EoraLabError as error:
                print(f"log perplexity on {text}: {error}")
        for task, result in first[1].items():
            for measure, interval in compare_results(result, second[1][task]).items():
                print(f"{task} {measure} {interval}{' nats' if measure == 'margin' else ''}")

    def measure(self, name: str, loading: Loading, adapter: str | None = None) -> tuple:
        """(text -> losses of its windows, results of the tasks) of one model, printed as they come."""
        from eora_lab.measure.evaluate import window_losses
        from eora_lab.model.start import start_text
        from eora_lab.run.adapters import use_only
        from eora_lab.run.intervals import Outcomes
        from eora_lab.run.pipeline import tokens_digest

        model, tokenizer = loading.load(name)
        if adapter:
            use_only(model, adapter)
        windows = self.evaluation.tokens(tokenizer)
        if self.against is not None:
            print(f"{name}:")
        say_start(start_text(tokenizer))
        losses = {}
        for text, tokens in windows.items():
            found = window_losses(model, tokens, progress=True)
            print(f"perplexity {found.mean().exp():.4f} on {len(tokens)} x {tokens.shape[1]} tokens of {text}")
            losses[text] = Outcomes(tokens_digest(tokens), found.tolist())
        results = {}
        if self.tasks:
            from eora_lab.measure.tasks import evaluate_tasks

            results = evaluate_tasks(model, tokenizer, self.tasks, self.limit, self.num_fewshot, self.batch_size)
        for result in results.values():
            print(result)
            if result.near_chance:
                print(f"eora-lab: {result.near_chance}", file=sys.stderr)
        return losses, results
