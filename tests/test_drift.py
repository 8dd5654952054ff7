"""Layers that aim at the outputs of the original model, on what the blocks before them have become."""

import torch

from eora_lab.calibrate.drift import DriftStream
from tests.tiny import SMALL, compress, logits, tiny_model, tiny_tokens

DRIFT = {"inputs": "drift", "held_out": 0.34}
LAST = "model.layers.1"


def inputs_of(model, tokens):
    """Name -> inputs of the linears of the last block, (tokens, in), in a plain pass."""
    found = {}
    for name, module in model.get_submodule(LAST).named_modules():
        if hasattr(module, "in_features"):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({f"{LAST}.{name}": args[0]}))
    logits(model, tokens)
    return {name: x.flatten(0, -2).double() for name, x in found.items()}


def test_both_streams_measure_what_the_two_models_do():
    tokens, model = tiny_tokens(), tiny_model("llama")
    stream = DriftStream(model, tokens)
    stream.begin(0)
    for statistics in stream.statistics(0, keep_outputs=False).values():
        assert not statistics.drift.any()  # nothing is compressed yet
    compress(model, tokens, **SMALL, skip=LAST.replace(".", "[.]"))
    stream.advance(0)
    stream.begin(1)
    found = stream.statistics(1, keep_outputs=False)
    was, now = inputs_of(tiny_model("llama"), tokens), inputs_of(model, tokens)
    assert len(found) == 7
    for name, statistics in found.items():
        x, seen = was[name], now[name]
        wanted = (x - seen).T @ seen / len(seen)
        assert wanted.abs().max() > 1e-3 * x.square().mean()
        torch.testing.assert_close(statistics.drift.double(), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
