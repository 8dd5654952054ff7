"""Processes on this machine that share a pass by gloo, for tests: started as by torchrun, without its imports."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["eora_lab.cli.commands", "eora_lab.run.pipeline", "tests.tiny"]
PATIENCE = 120  # seconds


def _enter(rank: int, count: int, port: int, place: Path, job: Callable, args: tuple) -> None:
    """One process. What the job returns, or how it fails, is kept in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    with open(place / f"{rank}.out", "w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        try:
            torch.save(job(*args), place / f"{rank}.pt")
        except BaseException:
            traceback.print_exc()
            raise


@contextmanager
def started(count: int, place: Path, job: Callable, *args: Any) -> Iterator[list]:
    """Processes that run a job each; those that still run in the end are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_enter, args=(rank, count, port, place, job, args)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def codes(processes: list) -> list[int | None]:
    """Exit codes, in the end."""
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def said(place: Path, rank: int) -> str:
    """All that a process printed."""
    return (place / f"{rank}.out").read_text()


def results(count: int, place: Path, job: Callable, *args: Any) -> list:
    """What the job returns in each of the processes, which run together."""
    with started(count, place, job, *args) as processes:
        assert codes(processes) == [0] * count, said(place, 0) + said(place, 1)
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(count)]
