"""What a model can take: token ids that its embedding has, and no more positions than its tables of them."""

import warnings
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.errors import EoraLabError
from eora_lab.model.structure import embedding_of, model_name

TABLES = ("embed_positions", "pos_encoding")  # buffers with a row a position: GPT-J, CodeGen, CTRL


def check_tokens(model: nn.Module, tokens: Int[Tensor, "n seqlen"], more: int = 0) -> None:
    """Raise EoraLabError unless the model can take these token ids: all in its embedding, and not too many at once.

    more: how many tokens the model will write after them. (It need not read the last.)
    Warns as `check_length` does.
    """
    embedding = embedding_of(model)[1]
    if embedding is not None and tokens.numel():
        rows = embedding.weight.shape[0]  # type: ignore[union-attr, index]
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < rows:
                raise EoraLabError(
                    f"token id {token} has no row in the model's embedding of {rows}: use the tokenizer that "
                    f"{model_name(model) or 'the model'} was trained with (tokens may have been added to this one), or "
                    "resize the embedding and save it"
                )
    check_length(model, tokens.shape[-1] + max(more - 1, 0))


def check_length(model: nn.Module, length: int) -> None:
    """Raise EoraLabError when the model has no positions for sequences of so many tokens.

    Warns when it has, as rotary ones have no end, but was made for fewer (max_position_embeddings).
    """
    for name, rows in _positions(model):
        if length > rows:
            raise EoraLabError(
                f"the model takes at most {rows} tokens at once (its positions are a table, {name}), not {length}: "
                "use a shorter seqlen or prompt, or fewer new tokens"
            )
    config = getattr(model, "config", None)
    made_for = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    if made_for and 0 < made_for < length:
        warnings.warn(
            f"sequences of {length} tokens are longer than the {made_for} that the model was made for "
            "(max_position_embeddings): it predicts worse beyond; use a shorter seqlen to judge it fairly",
            stacklevel=3,
        )


def _positions(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Every table of positions of the decoder, and how many tokens it is enough for.

    A learned one lies beside the token embedding. (Vision towers have some too, for patches.)
    """
    name, embedding = embedding_of(model)
    home = name.rpartition(".")[0]
    for name, module in model.get_submodule(home).named_children():
        if isinstance(module, nn.Embedding) and module is not embedding and ("pos" in name or name == "wpe"):
            yield f"{home}.{name}".strip("."), module.num_embeddings - getattr(module, "offset", 0)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in TABLES and buffer.ndim == 2:
            yield name, buffer.shape[0]
    config = getattr(model, "config", None)
    if getattr(config, "model_type", "") == "mpt":
        yield "alibi", config.max_seq_len  # type: ignore[union-attr]
