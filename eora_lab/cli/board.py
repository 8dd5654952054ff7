"""`eora-lab board`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Board:
    """Open the results of sweeps in the browser. Sort and filter cells, draw any two columns against each other, pin a
    baseline with paired 95 % intervals against it, compare two cells layer by layer.

    While a sweep runs, in this process or another, the page follows it, also within a cell. Only this machine can open
    it. With --export the page is one HTML file that works without this program and without a network.
    """

    store: Annotated[Path, tyro.conf.Positional]
    """folder of the results of `eora-lab sweep`"""
    export: Path | None = None
    """write the page to this .html file, and open nothing"""
    port: int = 0
    """of this machine; 0: one that is free"""
    window: bool = True
    """open the browser; else only the address is printed"""

    def run(self) -> None:
        from eora_lab.board import board, write_page
        from eora_lab.board.serve import serve
        from eora_lab.errors import EoraLabError
        from eora_lab.experiment.store import ResultStore
        from eora_lab.files import check_place

        if not self.store.is_dir():
            raise EoraLabError(f"there is no folder {self.store}: name the --store of a sweep")
        store = ResultStore(self.store)
        if self.export is not None:
            check_place(self.export, (".html",))
            write_page(self.export, board(store, figure=True))
            print(f"wrote {self.export}")
            return
        try:
            serve(store, self.port, self.window)
        except OSError as error:
            raise EoraLabError(f"cannot serve at port {self.port}: {error.strerror}; choose another --port") from error
