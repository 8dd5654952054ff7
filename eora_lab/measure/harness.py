"""lm-eval's view of a model in memory. Where a question does not fit the model, it says so, which lm-eval does not."""

import warnings

from lm_eval.models.huggingface import HFLM

from eora_lab.errors import EoraLabError
from eora_lab.progress import at


class Harness(HFLM):
    """`HFLM` of a model and its tokenizer.

    Raises EoraLabError when an answer is longer than the model's context, or the tokenizer lacks a token that lm-eval
    needs. Questions that are cut, because they are longer than the context, are counted in `cut`.
    """

    def __init__(self, model, tokenizer, batch_size: int):
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise EoraLabError(
                "the tokenizer has neither a start nor an end token, and lm-eval needs one: "
                "name bos_token or eos_token in its tokenizer_config.json"
            )
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cut = 0
        self._asked = 0

    def _model_call(self, inps, *args, **options):
        self._tell(len(inps))
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context, *args, **options):
        self._tell(len(context))
        return super()._model_generate(context, *args, **options)

    def _tell(self, count: int) -> None:
        """So many more are put to the model: answers of multiple choice, questions of others."""
        self._asked += count
        at(f"tasks, {self._asked} answers")

    def _loglikelihood_tokens(self, requests, *args, **options):
        for _, context, answer in requests:
            if len(answer) > self.max_length:
                raise EoraLabError(
                    f"an answer has {len(answer)} tokens, and the model takes at most {self.max_length}: "
                    "use another task, or a model with a longer context"
                )
            self.cut += len(context) + len(answer) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *args, **options)

    def generate_until(self, requests, *args, **options):
        """The answers that a model writes, one a request."""
        for request in requests:
            length = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if self.eot_token_id is None or length >= self.max_length:
                lacks = "the tokenizer has no end token (eos_token in its tokenizer_config.json)"
                takes = f"the model takes {self.max_length} in all: use a model with a longer context, or another task"
                reason = lacks if self.eot_token_id is None else takes
                raise EoraLabError(f"{request.task_name} writes up to {length} tokens, and {reason}")
        return super().generate_until(requests, *args, **options)

    def tok_batch_encode(self, strings, *args, left_truncate_len: int | None = None, **options):
        """Token ids and their mask, cut at the left."""
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **options)

    def warn_if_cut(self, tasks: str) -> None:
        """Warn when the beginning of a question was cut off."""
        if self.cut:
            warnings.warn(
                f"{tasks}: {self.cut} requests are longer than the {self.max_length} tokens that the model takes, and "
                "lost their beginning: do not compare these scores with those of a model with a longer context",
                stacklevel=3,
            )
