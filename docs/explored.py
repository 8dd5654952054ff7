"""Write down what the page "Seeing EoRA" shows: `python -m docs.explored`, about five minutes on one core.

A model is compressed, and each layer solved once by every method. Kept are some layers at every rank (maps, spectra,
losses), and the whole model at every rank: what it writes after some prompts, greedily, and its perplexity. It needs no
network. The numbers go to data/measured/explorable.json, with the settings and what they were made with.
"""

import time
from collections.abc import Callable, Sequence

from torch import nn

from docs.notebooks import ROOT
from eora_lab import Calibration, Exploration, Recipe, collect_statistics, load_model, perplexity, token_windows
from eora_lab.environment import environment
from eora_lab.files import write_json
from eora_lab.measure.at_rank import AtRank
from eora_lab.measure.layer_view import PAIR, layer_view, rank_stops
from eora_lab.model.generate import generate_each

FILE = ROOT / "data" / "measured" / "explorable.json"
COMMAND = "python -m docs.explored"
MODEL, RECIPE, CALIBRATION = "smollm2-135m", Recipe("rtn", bits=3, group_size=64), Calibration(nsamples=16)
HELD_OUT, WINDOWS, LENGTH = "pydoc:heldout", 2, 256
METHODS = ("svd", "act_s", "qera_approx", "eora")
BLOCK, LINEARS = "model.layers.10.", ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PROMPTS = (
    "Photosynthesis is the process by which",
    "The best way to learn a new language is to",
    "Once upon a time, there was a little girl who",
    "The capital of France is",
)
TOKENS = 36


def explored(
    model: nn.Module,
    tokenizer,
    exploration: Exploration,
    layers: Sequence[str],
    prompts: Sequence[str],
    windows,
    tokens: int,
    said: Callable[[str], None] = print,
) -> dict:
    """What the page shows of some layers and of the whole model. said: told how far it is."""
    whole = AtRank(model, exploration, progress=False)
    ranks = rank_stops(whole.highest)
    views = {layer: layer_view(exploration, layer, METHODS, ranks) for layer in layers}
    original = generate_each(model, tokenizer, prompts, tokens)
    texts: dict[str, dict] = {prompt: {"original": text} for prompt, text in zip(prompts, original, strict=True)}
    perplexities: dict[str, list[float]] = {"original": [perplexity(model, windows)]}
    for method in PAIR:
        perplexities[method] = []
        for rank in ranks:
            at = whole.model(method, rank)
            perplexities[method].append(perplexity(at, windows))
            for prompt, text in zip(prompts, generate_each(at, tokenizer, prompts, tokens), strict=True):
                texts[prompt].setdefault(method, []).append(text)
            said(f"{method} at rank {rank}: perplexity {perplexities[method][-1]:.2f}")
    return {
        "ranks": ranks,
        "path_bits": [round(whole.path_bits(rank), 2) for rank in ranks],
        "perplexity": {name: [round(value, 2) for value in found] for name, found in perplexities.items()},
        "texts": texts,
        "views": views,
    }


def main() -> None:
    """The command."""
    begun = time.perf_counter()
    model, tokenizer = load_model(MODEL)
    statistics = collect_statistics(model, CALIBRATION.batches(model, tokenizer), progress=False)
    windows = token_windows(tokenizer, HELD_OUT, WINDOWS, LENGTH)
    exploration = Exploration(model, statistics, RECIPE)
    layers = [BLOCK + name for name in LINEARS]
    found = explored(model, tokenizer, exploration, layers, PROMPTS, windows, TOKENS)
    settings = {"model": MODEL, "base": RECIPE.base, "calibration": CALIBRATION.source}
    settings |= {"calibration_tokens": CALIBRATION.nsamples * CALIBRATION.seqlen}
    settings |= {"perplexity": HELD_OUT, "perplexity_tokens": WINDOWS * LENGTH, "new_tokens": TOKENS}
    made = environment() | {"command": COMMAND, "seconds": round(time.perf_counter() - begun)}
    write_json(FILE, {"made": made, "settings": settings} | found)


if __name__ == "__main__":
    main()
