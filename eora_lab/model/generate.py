"""Let a model write: continue a prompt, or answer in a conversation."""

import torch

from eora_lab.errors import EoraLabError
from eora_lab.model.start import start_text


@torch.no_grad()
def generate(model, tokenizer, prompt: str, tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation of a prompt, at most `tokens` tokens; greedy at temperature 0, else sampled with the seed.

    Raises EoraLabError on an empty prompt.
    """
    if not prompt:
        raise EoraLabError("the prompt is empty: give some text to continue")
    start = start_text(tokenizer)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=bool(start) and not prompt.startswith(start))
    return _continue(model, tokenizer, inputs, tokens, temperature, seed)


class Chat:
    """A conversation with a model, in its tokenizer's chat template.

    Raises EoraLabError when the tokenizer has no chat template.
    """

    def __init__(self, model, tokenizer, tokens: int = 256, temperature: float = 0.0, seed: int = 0):
        if not getattr(tokenizer, "chat_template", None):
            raise EoraLabError(
                "the model's tokenizer has no chat template: use one tuned for conversation, or eora-lab generate"
            )
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.temperature, self.seed = tokens, temperature, seed
        self.messages: list[dict[str, str]] = []

    @torch.no_grad()
    def reply(self, text: str, streamer=None) -> str:
        """The answer to a message, at most `tokens` tokens; both become part of the conversation.

        streamer: a transformers streamer, which is handed the tokens as they come.
        Raises EoraLabError when the conversation has outgrown the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        limit = getattr(self.model.config, "max_position_embeddings", None)
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


def _continue(model, tokenizer, inputs, tokens: int, temperature: float, seed: int, streamer=None) -> str:
    """What the model writes after `inputs`."""
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
            **sampling,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
