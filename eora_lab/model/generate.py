"""Let a model write: continue a prompt, or answer in a conversation."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eora_lab.errors import EoraLabError, as_setting, check_seed, one_line
from eora_lab.model.limits import check_tokens
from eora_lab.model.start import start_text
from eora_lab.model.steps import Steps, can_capture, write

TEMPLATE = "the chat template of the model's tokenizer"
INSTEAD = "mend it (chat_template.jinja, or chat_template in tokenizer_config.json), or use eora-lab generate"


@torch.no_grad()
def generate(model, tokenizer, prompt: str, tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation of a prompt, at most `tokens` tokens; greedy at temperature 0, else sampled with the seed.

    Nothing else bends the choice: of the model's generation_config, only the end tokens count.
    Raises EoraLabError on an empty prompt, settings that mean nothing, and tokens that the model cannot take.
    """
    _check(tokens, temperature, seed)
    return _continue(model, tokenizer, _read(tokenizer, prompt), tokens, temperature, seed)[0]


@torch.no_grad()
def generate_each(
    model, tokenizer, prompts: Sequence[str], tokens: int = 48, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """The continuation of every prompt, as `generate` writes it, all in one batch (see `Adapters.batch`)."""
    _check(tokens, temperature, seed)
    together = _side_by_side([_read(tokenizer, prompt) for prompt in prompts], _pad(tokenizer))
    return _continue(model, tokenizer, together, tokens, temperature, seed)


def _read(tokenizer, prompt: str) -> Mapping[str, Tensor]:
    """The tokens of a prompt. Raises EoraLabError where there are none."""
    if not prompt:
        raise EoraLabError("the prompt is empty: give some text to continue")
    _check_text(prompt)
    start = start_text(tokenizer)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=bool(start) and not prompt.startswith(start))
    if not inputs["input_ids"].shape[-1]:
        raise EoraLabError("the model's tokenizer makes no token of the prompt: give some text to continue")
    return inputs


def _side_by_side(texts: Sequence[Mapping[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """Prompts as a batch: they end together, and what stands before the shorter ones is masked."""
    rows = [one["input_ids"][0] for one in texts]
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _pad(tokenizer) -> int:
    """A token to fill with."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad is None else pad


class Chat:
    """A conversation with a model, in its tokenizer's chat template.

    Raises EoraLabError when the tokenizer has no chat template, and on settings that mean nothing.
    """

    def __init__(self, model, tokenizer, tokens: int = 256, temperature: float = 0.0, seed: int = 0):
        if not getattr(tokenizer, "chat_template", None):
            raise EoraLabError(
                "the model's tokenizer has no chat template: use one tuned for conversation, or eora-lab generate"
            )
        _check(tokens, temperature, seed)
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.temperature, self.seed = tokens, temperature, seed
        self.messages: list[dict[str, str]] = []

    @torch.no_grad()
    def reply(self, text: str, streamer=None) -> str:
        """The answer to a message, at most `tokens` tokens; both become part of the conversation.

        streamer: a transformers streamer, which is handed the tokens as they come.
        Raises EoraLabError when the conversation has outgrown the model's context, or the chat template fails.
        """
        messages, inputs = self._prompt(text)
        answer = _continue(self.model, self.tokenizer, inputs, self.tokens, self.temperature, self.seed, streamer)[0]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _prompt(self, text: str) -> tuple[list[dict[str, str]], Mapping[str, Tensor]]:
        """The conversation with one more message, and its tokens. Raises as `reply`."""
        _check_text(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program of the model's author, and raises what it likes
            raise EoraLabError(f"{TEMPLATE} fails ({one_line(error)}): {INSTEAD}") from error
        if not inputs["input_ids"].shape[-1]:
            raise EoraLabError(f"{TEMPLATE} makes nothing of the conversation: {INSTEAD}")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and inputs["input_ids"].shape[1] + self.tokens > limit:
            raise EoraLabError(
                f"with {self.tokens} more tokens, this passes the model's context of {limit}: start anew"
            )
        return messages, inputs

    @torch.no_grad()
    def ask(self, text: str, copies: int) -> list[str]:
        """Several answers to a message in one batch, none of which becomes part of the conversation.

        They differ where the rows of a batch do (`Adapters.batch`), and at a temperature. Raises as `reply`.
        """
        _, inputs = self._prompt(text)
        together = _side_by_side([inputs] * copies, _pad(self.tokenizer))
        return _continue(self.model, self.tokenizer, together, self.tokens, self.temperature, self.seed)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []


def _check(tokens: int, temperature: float, seed: int) -> None:
    """Raise EoraLabError on settings that mean nothing."""
    if as_setting(int, tokens, "tokens") < 1:
        raise EoraLabError(f"tokens must be at least 1, not {tokens}")
    if not 0 <= as_setting(float, temperature, "temperature") < math.inf:
        raise EoraLabError(f"temperature must be 0 (always the likeliest token) or more, not {temperature}")
    check_seed(seed)


def _check_text(text: str) -> None:
    """Raise EoraLabError on half characters, which is what Python makes of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EoraLabError(
            f"the text to continue is not UTF-8 (at character {error.start + 1}): write it again in UTF-8"
        ) from error


def _continue(model, tokenizer, inputs, tokens: int, temperature: float, seed: int, streamer=None) -> list[str]:
    """What the model writes after each text of `inputs`."""
    given = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask") if key in inputs}
    check_tokens(model, given["input_ids"], more=tokens)
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own]
    if not all(isinstance(end, int | None) for end in ends):
        raise EoraLabError(f"eos_token_id in generation_config.json must be token ids, not {own!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        steps = _captured(model, given, tokens) if can_capture(model) else None
        if steps is None:
            rows = _by_transformers(model, tokenizer, given, tokens, temperature, streamer)
        else:
            if streamer:
                streamer.put(given["input_ids"].cpu())
            each = (lambda token: streamer.put(token.cpu())) if streamer else None
            rows = write(steps, [end for end in ends if end is not None], tokens, temperature, each)
            if streamer:
                streamer.end()
    found = []
    for row in rows.tolist():
        last = next((i for i, token in enumerate(row) if token in ends), len(row))
        found.append(tokenizer.decode(row[:last], skip_special_tokens=True))
    return found


def _captured(model, given: Mapping[str, Tensor], tokens: int) -> Steps | None:
    """The model after its prompts, its step a CUDA graph; None where it does what no graph can hold."""
    ids = given["input_ids"]
    try:
        steps = Steps(model, ids, given.get("attention_mask", torch.ones_like(ids)).bool(), tokens)
        steps.capture()
    except EoraLabError:
        return None
    return steps


def _by_transformers(model, tokenizer, given, tokens: int, temperature: float, streamer) -> Tensor:
    """The tokens that follow, by `model.generate`."""
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    own = model.generation_config
    plain = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_new_tokens=tokens,
        **sampling,
    )
    model.generation_config = plain  # what `plain` leaves open, transformers takes from here
    try:
        with torch.inference_mode():  # cheaper than no_grad by a twentieth of a small model's time
            output = model.generate(**given, generation_config=plain, streamer=streamer)
    except (ValueError, RuntimeError) as error:
        raise EoraLabError(f"the model cannot write: {one_line(error)}") from error
    finally:
        model.generation_config = own
    return output[:, given["input_ids"].shape[1] :]
