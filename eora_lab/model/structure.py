"""The decoder of a model, by structure alone: its blocks and their linears."""

from torch import nn

from eora_lab.errors import EoraLabError


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder block, in order. Raises EoraLabError when the model has none that hold linears."""
    stacks = [
        (name, stack)
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) and linears(stack[0])
    ]
    if not stacks:
        raise EoraLabError(f"{type(model).__name__}: no list of decoder blocks with nn.Linear layers was found")
    name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(stack)}


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Name within the block -> linear layer."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def check_experts(model: nn.Module) -> None:
    """Raise EoraLabError where a block keeps the experts of a mixture in one tensor, which no compressor here takes."""
    for prefix, block in decoder_blocks(model).items():
        for name, module in block.named_modules():
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
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
