"""Write the package reference: `python -m docs.build`, or `make docs`."""

import pkgutil
import warnings
from pathlib import Path

import pdoc

import eora_lab

MODULES = ["eora_lab", *(m.name for m in pkgutil.walk_packages(eora_lab.__path__, "eora_lab.") if ".cli" not in m.name)]


def build(folder: Path) -> Path:
    """Write a page a module, but for the commands, which explain themselves (`--help`). Returns the first page."""
    pdoc.render.configure(template_directory=Path(__file__).parent)
    vars(eora_lab).update({name: getattr(eora_lab, name) for name in eora_lab.__all__})  # pdoc asks no __getattr__
    with warnings.catch_warnings():  # pdoc finds some modules by itself, and warns when they are named as well
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc(*MODULES, output_directory=folder)
    return folder / "eora_lab.html"


if __name__ == "__main__":
    print(build(Path("build/docs")))
