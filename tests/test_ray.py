"""The Ray engine on two workers of this machine, one of which is killed in the middle of a sweep."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from eora_lab.experiment.running import running
from eora_lab.experiment.store import ResultStore
from eora_lab.experiment.sweep import expand, plan, run_plan
from eora_lab.progress import Stopped
from tests.test_sweep import SMALL, contents, quiet_sweep

ray = pytest.importorskip("ray", reason='Ray is the extra `ray`: pip install "eora-lab[ray]"')

PATHS = os.environ.get("PYTHONPATH")
GRID = SMALL | {"bits": [2, 3], "method": ["svd", "eora"], "rank": [2, 4, 8]}  # 12 cells


def kill_a_worker(store: Path, killed: list[int]) -> None:
    """SIGKILL to a Ray worker that runs a cell, once the store holds two."""
    while len(list(store.glob("*.json"))) < 2:
        time.sleep(0.02)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().decode(errors="replace")
            parent = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::run_one") and f"EORA_LAB_TEST={os.getpid()}" in parent:  # ours alone
            os.kill(int(process.name), signal.SIGKILL)
            killed.append(int(process.name))
            return


def test_a_sweep_that_is_stopped_keeps_what_its_workers_finished(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [PATHS])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells, store, told = expand(GRID), ResultStore("store"), []

    def stop_after_two(step):
        told.append(step.done)
        if step.done >= 2:
            raise Stopped

    found = list(run_plan(plan(cells, store), cells, store, "ray", 2, watch=stop_after_two))
    assert found == ["", ""] and told[-1] == 2
    kept = contents(Path("store"))
    assert 2 <= len(kept) < 12 and running(store) == []
    assert quiet_sweep(GRID, store)["status"].tolist() == ["done"] * 12
    assert kept.items() <= contents(Path("store")).items()


def test_a_killed_worker_loses_nothing(workplace, monkeypatch):
    quiet_sweep(GRID, "local")
    monkeypatch.setenv("EORA_LAB_TEST", str(os.getpid()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [PATHS])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(Path("ray"), killed), daemon=True)
    killer.start()
    frame = quiet_sweep(GRID, "ray", engine="ray", workers=2)
    killer.join(timeout=10)
    assert killed, "no worker was there to be killed"
    assert frame["status"].tolist() == ["done"] * 12

    def numbers(folder: str) -> dict:
        """Results rounded to what another thread count may change."""
        return {
            name: round(cell["result"]["perplexity"]["text.txt"], 3) for name, cell in contents(Path(folder)).items()
        }

    assert numbers("ray") == numbers("local")
    assert len(list(ResultStore("ray").cells())) == 12
