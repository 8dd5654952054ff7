"""The figures that the EoRA paper prints (arXiv 2410.21271v6), as frames."""

from pathlib import Path
from typing import TYPE_CHECKING

from eora_lab.errors import EoraLabError

if TYPE_CHECKING:
    import pandas

FOLDER = Path(__file__).parents[2] / "data" / "paper"  # they ship with the repository, not inside the package
MEASURED = FOLDER.parent / "measured"  # recorded cells, a store in each folder
TABLES = tuple(f"T{number}" for number in range(1, 20))
COLUMNS = ("model", "base", "method", "rank", "task", "metric", "unit", "value", "source", "note")

# the paper's names of the methods that this package has, and what it calls them
METHODS = {"none": "none", "ZeroQuant-V2": "svd", "Act-S": "act_s", "EoRA": "eora"}
METHODS |= {"LQER": "lqer", "QERA": "qera_approx"}


def published(table: str) -> "pandas.DataFrame":
    """One published table, a figure a row: COLUMNS, and for some tables one more (`data/paper/README.md`).

    table: "T1" to "T19", or "abstracts".
    Raises EoraLabError when there is no such table, and where the package was installed without its repository.
    """
    import pandas

    if table not in (*TABLES, "abstracts"):
        raise EoraLabError(f"no table {table!r} in the paper: T1 to T19, or abstracts")
    file = FOLDER / f"{table}.csv"
    if not file.is_file():
        raise EoraLabError(
            f"{file} is missing: the published figures come with the repository; clone it and install from there "
            "(pip install --editable .)"
        )
    text = {name: "str" for name in COLUMNS if name not in ("rank", "value")}
    frame = pandas.read_csv(file, keep_default_na=False, na_values={"rank": [""]}, dtype=text)
    return frame.astype({"rank": "Int64", "value": "float64"})
