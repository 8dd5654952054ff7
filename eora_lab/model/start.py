"""The token that every text begins with, in the families that expect one."""


def start_token(tokenizer) -> int | None:
    """Id of the BOS token where the tokenizer puts it itself (Gemma, Llama 2 and 3), else None (GPT-2, Qwen, SmolLM2).

    Without it, such a model reads a text from a place that it never was trained at.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def start_text(tokenizer) -> str:
    """The same token as it is written; empty where there is none."""
    return "" if start_token(tokenizer) is None else tokenizer.bos_token
