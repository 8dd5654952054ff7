"""What may not be meant: settings of a pass that are allowed, and give nothing or cost more than they give."""

from torch import nn

from eora_lab.formats.gptq_config import BITS
from eora_lab.layer.cpu_kernels.packed import FIELDS
from eora_lab.model.structure import block_linears
from eora_lab.run.budget import Budget
from eora_lab.run.recipe import Recipe, highest_rank

TAKEN = sorted({*BITS, *FIELDS})  # bits that a checkpoint of another tool, or a kernel, takes


def hints(recipe: Recipe, model: nn.Module, budget: Budget | None = None, given: bool = False) -> list[str]:
    """A line for each such setting.

    budget: how ranks are spread; one that is not uniform may well fill a small layer.
    given:  weights come compressed, so that bits are what they are.
    """
    said = []
    if not given and recipe.quantises and recipe.grid == "integer" and recipe.bits not in TAKEN:
        known = f"{', '.join(map(str, TAKEN[:-1]))} or {TAKEN[-1]}"
        said.append(f"{recipe.bits} bits are for measuring: kernels and checkpoints of other tools take {known}")
    if recipe.method == "none":
        return said
    if not recipe.rank:
        return [*said, f"{recipe.method} at rank 0 adds no path: give it a rank, or take method none"]
    if budget in (None, Budget()):
        left = recipe.left(model)
        highest = {name: highest_rank(one) for name, one in block_linears(model).items() if name not in left}
        full = [name for name, most in highest.items() if most <= recipe.rank]
        if full and recipe.rank <= max(highest.values()):
            said.append(
                f"rank {recipe.rank} is the full rank of {len(full)} of {len(highest)} layers, such as {full[0]}: "
                "a path like that is as large as the weight, and undoes the compression"
            )
    return said
