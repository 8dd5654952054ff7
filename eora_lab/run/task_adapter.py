"""A new adapter for a compressed model that stays as it is: the same W^, compensated for other texts (for a task)."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eora_lab.calibrate.stream import BlockStream
from eora_lab.compensate import solve
from eora_lab.compensate.factors import store_factors
from eora_lab.errors import EoraLabError, naming
from eora_lab.formats.peft import Factors
from eora_lab.model.structure import block_linears, decoder_blocks
from eora_lab.run.adapters import compensated_layers


@torch.no_grad()
def solve_adapter(
    model: nn.Module,
    original: nn.Module,
    batches: Int[Tensor, "nsamples seqlen"],
    method: str = "eora",
    rank: int = 64,
    inputs: str = "compensated",
    progress: bool = True,
) -> Factors:
    """Compensate W - W^ in every layer for the given texts: module name -> (A, B). `model` is left with it in use.

    model:    compressed, from `load_run`.
    original: the model that it was made from. It runs block by block, and is as before afterwards.
    batches:  calibration token ids.
    method, rank, inputs: as in `Recipe`.
    Raises EoraLabError when the models do not match, a setting is unknown, or a rank does not fit a layer.
    """
    from tqdm.auto import tqdm

    if inputs not in ("compensated", "original"):
        raise EoraLabError(f"unknown inputs {inputs!r}; known: compensated, original")
    layers = compensated_layers(model)
    blocks, dense = decoder_blocks(original), block_linears(original)
    for name, layer in layers.items():
        if name not in dense or tuple(dense[name].weight.shape) != (layer.out_features, layer.in_features):
            raise EoraLabError(f"{name} of the compressed model is not in the original one, or of another size there")
    stream = BlockStream(original, batches)
    factors: Factors = {}
    try:
        for index, prefix in enumerate(tqdm(blocks, desc=method, unit="block", disable=not progress, leave=False)):
            found = stream.statistics(index, keep_outputs=inputs == "original")
            for name in (name for name in layers if name.startswith(f"{prefix}.")):
                weight = dense[name].weight
                residual = weight.float() - layers[name].dense(weight.dtype).float()
                with naming(name):
                    stored = store_factors(solve(method, residual, found[name].or_identity(False), rank))
                layers[name].set_factors(stored)
                factors[name] = stored.dense()
                if inputs == "compensated":
                    original.set_submodule(name, layers[name])
            if inputs == "compensated" and index + 1 < len(blocks):
                stream.advance(index)
    finally:
        for name, linear in dense.items():
            original.set_submodule(name, linear)
    return factors
