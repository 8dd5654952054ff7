"""What a class gets, so that nobody waits: `python -m docs.handout`, or `make class`.

class.zip holds the notebooks of the lessons with the outputs that are recorded for them, and the results of their
sweeps, where `make record ARGS=03` has left them: unpacked over a clone, cells show their figures before anything is
run, and sweeps go on from what is there.
"""

import sys
import zipfile
from pathlib import Path

import nbformat

from docs.notebooks import NOTEBOOKS, RECORDED, ROOT, digest, record_of
from docs.record import WORK

LESSONS = ("00", "02", "03")


def pack(target: Path, recorded: Path = RECORDED, work: Path = WORK) -> list[str]:
    """Write the archive. Returns a line for each notebook: whether it has outputs, and of which code."""
    said = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (one for one in NOTEBOOKS if one.name[:2] in LESSONS):
            notebook, record = nbformat.read(path, as_version=4), record_of(path, recorded)
            if record is None or record.digest != digest(notebook):
                state = "of older code" if record else "not recorded"
                said.append(f"{path.stem}: outputs {state}, make record ARGS={path.stem[:2]}")
            else:
                said.append(f"{path.stem}: outputs whole")
            for cell in (cell for cell in notebook.cells if cell.cell_type == "code" and record):
                cell.outputs = [nbformat.from_dict(one) for one in record.outputs.get(cell.id, [])]
            archive.writestr(str(path.relative_to(ROOT)), nbformat.writes(notebook))
        cells = sorted((work / "notebooks" / "runs").glob("03_*/*.json"))
        for path in cells:
            archive.write(path, path.relative_to(work))
    return [*said, f"03: results of {len(cells)} cells" + ("" if cells else ", make record ARGS=03 leaves them")]


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "class.zip")
    print(*pack(place), f"wrote {place}", sep="\n")
