"""What can be known to be wrong before a model is loaded. Everything here raises EoraLabError."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from eora_lab.errors import EoraLabError, MachineError, naming

if TYPE_CHECKING:
    from eora_lab.experiment.cells import Cell
    from eora_lab.run.recipe import Recipe

FIGURES = (".png", ".svg", "")  # both are written, whichever is named


def check_figure(path: Path | None) -> None:
    """The name of a figure: one that can be written."""
    from eora_lab.files import check_place

    if path is not None:
        check_place(path, FIGURES)


def check_run_folder(path: Path) -> None:
    """The folder of a run: an empty one, none yet, or a run's."""
    from eora_lab.files import check_place
    from eora_lab.run.folder import is_run

    check_place(path)
    if path.exists() and any(path.iterdir()) and not is_run(path):
        raise EoraLabError(f"{path} is not empty and holds no run: choose another output folder")


def check_inputs(model: str, texts: Iterable[str]) -> None:
    """The name of a model, and texts, which are read."""
    from eora_lab.model.load import check_name
    from eora_lab.text.read import text_digest

    check_name(model)
    for text in dict.fromkeys(texts):
        text_digest(text)


def check_selection(model: str, recipe: "Recipe") -> None:
    """What a recipe leaves, on the modules of a model without its weights; nothing where it leaves nothing itself."""
    from eora_lab.model.load import load_skeleton

    if any(recipe.selection().values()) and not model.lower().endswith(".gguf"):
        recipe.left(load_skeleton(model))


def check_cells(cells: Sequence["Cell"]) -> None:
    """Names of models, texts and tasks in cells, and patterns of layers. What is not here is left to the cells."""
    from eora_lab.experiment.estimate import model_shape
    from eora_lab.measure.tasks import check_tasks
    from eora_lab.model.load import check_name
    from eora_lab.text.hub import mirror_only
    from eora_lab.text.read import text_digest

    for model in dict.fromkeys(cell.model for cell in cells):
        check_name(model)
    recipes = [(cell.model, cell.recipe) for cell in cells if cell.recipe and any(cell.recipe.selection().values())]
    model_shape.cache_clear()  # a folder may hold another model by now
    for model, recipe in {(model, *recipe.selection().values()): (model, recipe) for model, recipe in recipes}.values():
        if shape := model_shape(model):
            recipe.left(shape.model)
    texts = {text: "perplexity" for cell in cells for text in cell.evaluation.perplexity}
    compressed = [cell for cell in cells if cell.recipe]
    texts |= {cell.base_source: "base_source" for cell in compressed if cell.base_source}
    texts |= {cell.calibration.text: "source" for cell in compressed if cell.calibration.text}
    with mirror_only():
        for text, setting in texts.items():
            with naming(setting), suppress(MachineError):
                text_digest(text)
    check_tasks(list(dict.fromkeys(task for cell in cells for task in cell.tasks)))
