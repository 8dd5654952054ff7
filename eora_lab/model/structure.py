"""The decoder of a model, by structure alone: its blocks, their linears, and the weights that are none."""

import re
from collections import Counter
from collections.abc import Container

from torch import nn

from eora_lab.errors import EoraLabError


def decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the text decoder: the innermost module that holds the token embedding and a stack of blocks.

    So a vision tower does not count, however large. It is the whole model where that names no token embedding.
    """
    name = embedding_of(model)[0]
    while name:
        name = name.rpartition(".")[0]
        if _stacks(module := model.get_submodule(name)):
            return name, module
    return "", model


def embedding_of(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Name and module of the token embedding; no name and None where the model names none."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return "", None
    return next((name for name, module in model.named_modules() if module is embedding), ""), embedding


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder block, in order. Raises EoraLabError when the model has none that hold linears."""
    prefix, module = decoder(model)
    stacks = _stacks(module)
    if not stacks:
        todo = ": its Conv1D layers are none before eora_lab.model.unfold.unfold(model)" if _holds_conv1d(model) else ""
        raise EoraLabError(f"{type(model).__name__}: no list of decoder blocks with nn.Linear layers was found{todo}")
    name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {".".join(filter(None, (prefix, name, str(i)))): block for i, block in enumerate(stack)}


def _stacks(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [
        (name, stack)
        for name, stack in module.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) and _holds_linears(stack[0])
    ]


def _holds_linears(block: nn.Module) -> bool:
    """Whether there are linears, or what stands in their place once a model is compressed."""
    return any(hasattr(module, "in_features") and hasattr(module, "out_features") for module in block.modules())


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name within the block -> linear layer."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def matrices(
    model: nn.Module,
    part: tuple[str, nn.Module],
    of: Container[str] | None = None,
    but: Container[str] = (),
) -> dict[str, int]:
    """Weights of two or more dimensions in a part of the model; name, with * for numbers -> how many.

    part: its name and module, as from `decoder`. Embeddings and the head do not count, nor do compressed layers, whose
          weights are packed.
    of:   names of modules; others do not count either.
    but:  nor do these, and what is within them (`Contract.lent`, `Contract.idle`).
    """
    found: Counter[str] = Counter()
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    apart = {p for module in part[1].modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    apart |= set(head.parameters()) if head is not None else set()
    for name, parameter in part[1].named_parameters(prefix=part[0]):
        module = name.rpartition(".")[0]
        around = [module[: end.start()] for end in re.finditer(r"\.|$", module)]
        wanted = (of is None or module in of) and not any(name in but for name in around)
        if wanted and parameter.squeeze().ndim >= 2 and parameter not in apart:
            found[re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)] += parameter.numel()
    return dict(found)


def _holds_conv1d(model: nn.Module) -> bool:
    """Whether there are linears of the transposed kind of GPT-2, a class of transformers."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


def check_experts(model: nn.Module) -> None:
    """Raise EoraLabError where a block keeps the experts of a mixture in one tensor, which no compressor here takes.

    Other parameters of three dimensions, such as the gates of RecurrentGemma, stay as they are.
    """
    for prefix, block in decoder_blocks(model).items():
        for name, module in block.named_modules():
            if "expert" not in f"{name}.{type(module).__name__}".lower() or isinstance(module, nn.Linear):
                continue
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    raise EoraLabError(
                        f"{prefix}.{name}.{local} fuses all experts in one {tuple(parameter.shape)} tensor: "
                        "only models whose experts are nn.Linear layers can be compressed"
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
