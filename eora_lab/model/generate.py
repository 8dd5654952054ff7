"""Let a model write: continue a prompt, or answer in a conversation."""

import math

import torch

from eora_lab.errors import EoraLabError, as_setting, check_seed, one_line
from eora_lab.model.limits import check_tokens
from eora_lab.model.start import start_text

TEMPLATE = "the chat template of the model's tokenizer"
INSTEAD = "mend it (chat_template.jinja, or chat_template in tokenizer_config.json), or use eora-lab generate"


@torch.no_grad()
def generate(model, tokenizer, prompt: str, tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation of a prompt, at most `tokens` tokens; greedy at temperature 0, else sampled with the seed.

    Nothing else bends the choice: of the model's generation_config, only the end tokens count.
    Raises EoraLabError on an empty prompt, settings that mean nothing, and tokens that the model cannot take.
    """
    _check(tokens, temperature, seed)
    if not prompt:
        raise EoraLabError("the prompt is empty: give some text to continue")
    _check_text(prompt)
    start = start_text(tokenizer)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=bool(start) and not prompt.startswith(start))
    if not inputs["input_ids"].shape[-1]:
        raise EoraLabError("the model's tokenizer makes no token of the prompt: give some text to continue")
    return _continue(model, tokenizer, inputs, tokens, temperature, seed)


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
        answer = _continue(self.model, self.tokenizer, inputs, self.tokens, self.temperature, self.seed, streamer)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

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


def _continue(model, tokenizer, inputs, tokens: int, temperature: float, seed: int, streamer=None) -> str:
    """What the model writes after `inputs`."""
    from transformers import GenerationConfig

    given = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask") if key in inputs}
    check_tokens(model, given["input_ids"], more=tokens)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    if not all(isinstance(end, int | None) for end in ends):
        raise EoraLabError(f"eos_token_id in generation_config.json must be token ids, not {own.eos_token_id!r}")
    plain = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_new_tokens=tokens,
        **sampling,
    )
    model.generation_config = plain  # what `plain` leaves open, transformers takes from here
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(**given, generation_config=plain, streamer=streamer)
    except (ValueError, RuntimeError) as error:
        raise EoraLabError(f"the model cannot write: {one_line(error)}") from error
    finally:
        model.generation_config = own
    return tokenizer.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
