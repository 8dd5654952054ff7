"""Small random models of three architectures, for tests that need structure and not language."""

import json
import resource
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import gguf
import tokenizers
import torch
import transformers

from eora_lab import Report, compress_model
from eora_lab.run.recipe import Recipe

CONFIGS = {
    # grouped-query attention: narrow k and v
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    # biases on q, k and v
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    # tied embeddings, head_dim unlike hidden_size / heads
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}),
}

SMALL = {"bits": 3, "group_size": 32, "rank": 8, "progress": False}  # for `compress`
# a cell of the `workplace` fixture, by which its base is rounded to nearest
CELL = {"model": "model", "group_size": 32, "inputs": "original", "source": "text.txt", "nsamples": 4, "seqlen": 32}
CELL |= {"perplexity": ["text.txt"], "windows": 2, "window_length": 32, "compressor": "rtn"}
TEXT = "The quick brown fox jumps over the lazy dog, and 12 more. " * 60


def tiny_model(kind: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 causal LM with 2 blocks, hidden size 64, intermediate size 128 and a vocabulary of 97."""
    config_class, extra = CONFIGS[kind]
    config = config_class(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which would hide a lost bias
                parameter.normal_(0, 0.1)
    return model


def deep_model(blocks: int) -> transformers.PreTrainedModel:
    """A `tiny_model` of so many blocks."""
    config = tiny_model("llama").config
    config.num_hidden_layers = blocks
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tiny_tokens(n: int = 6, seqlen: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids (n, seqlen) without the special ones."""
    return torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(seed))


def compress(model: torch.nn.Module, tokens, compressor: str = "rtn", **settings) -> Report:
    """`compress_model` with the fields of a recipe (round to nearest in 3 bits unless they say more) as keywords."""
    own = {name: settings.pop(name) for name in [field.name for field in fields(Recipe)] if name in settings}
    return compress_model(model, tokens, Recipe(compressor, **{"bits": 3} | own), **settings)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """(n, seqlen, 97), without gradients."""
    with torch.no_grad():
        return model(tokens).logits


def save_tiny(folder: Path | str, kind: str = "llama", seed: int = 0, **options) -> str:
    """Save a `tiny_model` with its tokenizer; options: of `save_pretrained`. Returns the folder's name."""
    tiny_model(kind, seed).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def calibrated(text: Path | str, nsamples: int = 4) -> list[str]:
    """On the command line: statistics of a text, in sequences of 32 tokens."""
    return f"--calibration.source {text} --calibration.nsamples {nsamples} --calibration.seqlen 32".split()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a character, 97 in all with the ids 0-2 as in `tiny_model`; a character not in the list is `<unk>`."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    letters = string.ascii_letters + string.digits + " \n" + string.punctuation.translate({ord(c): None for c in "^`~"})
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    # BPE without merges leaves characters; Fuse joins them again without spaces between
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes within this context."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def begins_texts(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedTokenizerFast:
    """The same tokenizer, which now begins every text with `<bos>`, as those of Gemma and Llama do."""
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer


class Experts(torch.nn.Module):
    """A mixture of three experts in place of an MLP: the second sees one token of every mini-batch, the third none."""

    def __init__(self, config):
        super().__init__()
        self.experts = torch.nn.ModuleList(type(tiny_model("llama").model.layers[0].mlp)(config) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, -2)
        few = torch.zeros(len(flat), dtype=torch.bool)
        few[0] = True
        y = torch.empty_like(flat)
        y[~few] = self.experts[0](flat[~few])
        y[few] = self.experts[1](flat[few])
        return y.view(x.shape)


def moe_model() -> torch.nn.Module:
    """A `tiny_model` whose MLPs are such mixtures."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = Experts(model.config)
    return model


def write_sizes(writer: gguf.GGUFWriter, config: transformers.PreTrainedConfig) -> None:
    """The metadata of a GGUF file that every architecture has."""
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
