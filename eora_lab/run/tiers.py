"""What a result needed beside the weights: tiers, by which methods compare with those of their own kind."""

from eora_lab.compensate import needs_outputs
from eora_lab.run.recipe import Recipe

TIERS = (
    "0: data-free",
    "1: forward passes of the original model",
    "2: forward passes of the compressed model",
    "3: backward passes",
)
DATA_FREE = ("rtn", "magnitude", "none", "svd")  # compressors and methods that look at no data


def tier(recipe: Recipe, spreads: bool = False, given: bool = False, reround: bool = False) -> str:
    """One of TIERS: the highest that a part of the recipe needs.

    spreads: ranks are spread by what layers lose. given: weights come compressed. reround: they get other codes.
    """
    if needs_outputs(recipe.method) or recipe.distil:
        return TIERS[3]
    path = recipe.method != "none"
    looks = [
        recipe.method not in DATA_FREE,
        reround if given else recipe.compressor not in DATA_FREE,
        path
        and (
            spreads
            or recipe.rounds > 1
            or recipe.preserve
            or (recipe.factor_bits < 16 and recipe.refit)
            or recipe.shrink
        ),
        recipe.inputs == "drift",
    ]
    if not any(looks):
        return TIERS[0]
    return TIERS[1] if recipe.inputs == "original" else TIERS[2]
