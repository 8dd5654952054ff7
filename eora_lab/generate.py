"""Let a model write."""

import torch

from eora_lab.errors import EoraLabError


@torch.no_grad()
def generate(model, tokenizer, prompt: str, tokens: int = 48, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation of a prompt, at most `tokens` tokens; greedy at temperature 0, else sampled with the seed.

    Raises EoraLabError on an empty prompt.
    """
    if not prompt:
        raise EoraLabError("the prompt is empty: give some text to continue")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
