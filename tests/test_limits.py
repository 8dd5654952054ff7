"""Token ids beyond the embedding, and texts longer than the table of positions."""

import pytest
import torch
import transformers

from eora_lab import EoraLabError, perplexity
from eora_lab.model.limits import check_length, check_tokens
from tests.tiny import tiny_model, tiny_tokens

SMALL = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2}
LEARNED = {  # with room for 16 tokens
    "gpt2": transformers.GPT2Config(**SMALL, n_positions=16),
    "gptj": transformers.GPTJConfig(**SMALL, n_positions=16, rotary_dim=8),
    "ctrl": transformers.CTRLConfig(**SMALL, dff=64, n_positions=16),
    "mpt": transformers.MptConfig(vocab_size=97, d_model=32, n_heads=2, n_layers=1, max_seq_len=16),
    "opt": transformers.OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEARNED)
def test_positions_that_are_a_table(kind):
    model = transformers.AutoModelForCausalLM.from_config(LEARNED[kind]).eval()
    assert perplexity(model, tiny_tokens(2, 16)) > 1
    with pytest.raises(EoraLabError, match=r"takes at most 16 tokens at once .*not 17: use a shorter seqlen"):
        perplexity(model, tiny_tokens(2, 17))


def test_token_ids_beyond_the_embedding():
    model = tiny_model("llama")
    check_tokens(model, torch.tensor([[0, 96]]))
    for token in (97, -1):
        with pytest.raises(EoraLabError, match=f"token id {token} has no row in the model's embedding of 97"):
            perplexity(model, torch.tensor([[5, token, 6]]))


@pytest.mark.filterwarnings("error")
def test_longer_than_a_rotary_model_was_made_for():
    model = tiny_model("llama")
    check_length(model, 128)
    with pytest.warns(UserWarning, match="of 129 tokens are longer than the 128 .*max_position_embeddings"):
        perplexity(model, tiny_tokens(1, 129))
