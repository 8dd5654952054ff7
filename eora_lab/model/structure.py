"""The decoder of a model, by structure alone: its blocks, their linears, and the weights that are none."""

import re
from collections import Counter

from torch import nn

from eora_lab.errors import EoraLabError


def decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the text decoder: the innermost module that holds the token embedding and a stack of blocks.

    So a vision tower does not count, however large. It is the whole model where that names no token embedding.
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return "", model
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        if _stacks(module := model.get_submodule(name)):
            return name, module
    return "", model


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder block, in order. Raises EoraLabError when the model has none that hold linears."""
    prefix, module = decoder(model)
    stacks = _stacks(module)
    if not stacks:
        raise EoraLabError(f"{type(model).__name__}: no list of decoder blocks with nn.Linear layers was found")
    name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {".".join(filter(None, (prefix, name, str(i)))): block for i, block in enumerate(stack)}


def _stacks(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, stack)
        for name, stack in module.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) and linears(stack[0])
    ]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name within the block -> linear layer."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def matrices(model: nn.Module, part: tuple[str, nn.Module]) -> dict[str, int]:
    """Weights of two or more dimensions in a part of the model; name, with * for numbers -> how many.

    part: its name and module, as from `decoder`. Embeddings and the head do not count, nor do compressed layers, whose
    weights are packed.
    """
    found: Counter[str] = Counter()
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    apart = {p for module in part[1].modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    apart |= set(head.parameters()) if head is not None else set()
    for name, parameter in part[1].named_parameters(prefix=part[0]):
        if parameter.squeeze().ndim >= 2 and parameter not in apart:
            found[re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)] += parameter.numel()
    return dict(found)


def check_experts(model: nn.Module) -> None:
    """Raise EoraLabError where a block keeps many matrices, such as experts, in one tensor: no compressor takes it."""
    for prefix, block in decoder_blocks(model).items():
        for name, module in block.named_modules():
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.squeeze().ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    raise EoraLabError(
                        f"{prefix}.{name}.{local} fuses many matrices (such as all experts) in one "
                        f"{tuple(parameter.shape)} tensor: only models with nn.Linear layers instead can be compressed"
                    )


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that full name. Raises EoraLabError when another kind of module has it."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise EoraLabError(f"{name} is a {type(module).__name__}, not a linear layer")
    return module


def model_name(model: nn.Module) -> str:
    """The path or hub name that a model was loaded from; empty for one that was made in memory."""
    return getattr(getattr(model, "config", None), "name_or_path", "")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Full name -> linear layer of any decoder block, in order."""
    return {
        f"{prefix}.{local}": linear
        for prefix, block in decoder_blocks(model).items()
        for local, linear in linears(block).items()
    }
