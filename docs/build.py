"""Write the site: `python -m docs.build`, or `make site`. It opens from its files, and asks no other machine."""

import sys
import warnings
from pathlib import Path

from sphinx.cmd.build import main as sphinx

import eora_lab
from docs.notebooks import RECORDED, ROOT
from docs.pages import lay_out

WORK = ROOT / "build" / "site"


def build(folder: Path, work: Path = WORK, recorded: Path = RECORDED) -> Path:
    """Write all pages. Returns the first one. Raises SystemExit when a page is not right, with Sphinx's lines about it.

    work: a folder for what Sphinx reads and keeps. recorded: the folder with the outputs of notebooks.
    """
    vars(eora_lab).update({name: getattr(eora_lab, name) for name in eora_lab.__all__})  # autodoc asks no __getattr__
    lay_out(work / "source", recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        options = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-d", str(work / "doctrees")]
        if code := sphinx([*options, str(work / "source"), str(folder)]):
            raise SystemExit(code)
    return folder / "index.html"


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else "site")))
