"""The processes of one pass, as torchrun launches them, and what they tell each other by torch.distributed.

Every process streams its share of the calibration texts through the whole model, and compresses the linears that it
owns. Whatever one of them cannot do ends all of them.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from eora_lab.errors import EoraLabError, MachineError, ToldElsewhere, machine_error, one_line

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # that one waits for the others


@dataclass(frozen=True)
class Processes:
    """One of the processes that share a pass.

    rank, count: which one it is, of how many.
    here:        how many of them are on this machine.
    """

    rank: int = 0
    count: int = 1
    here: int = 1

    @classmethod
    def of_group(cls) -> "Processes":
        """Those of the process group of torch.distributed that is up, if there is one; else this process alone."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        machines = cls(dist.get_rank(), dist.get_world_size()).gather(socket.gethostname())
        return cls(dist.get_rank(), dist.get_world_size(), machines.count(socket.gethostname()))

    def share(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """Every `count`-th item with its number, from `rank` on: what this process does of something for all."""
        return list(enumerate(items))[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._reached():
            dist.all_gather_object(found, value)
        return found

    def all(self, true: bool) -> bool:
        """Whether it is true in every process."""
        return all(self.gather(true))

    @contextmanager
    def agree(self) -> Iterator[None]:
        """What fails within this context in one process, fails after it in all, with one message. Nothing within may
        wait for another process."""
        if self.count == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        told = [(rank, one) for rank, one in enumerate(self.gather(failed and _as_ours(failed))) if one]
        if not told:
            return
        rank, first = told[0]
        if failed and not isinstance(failed, EoraLabError) and not machine_error(failed):
            raise failed
        message = f"process {rank} of {self.count}: {first}" if rank else str(first)
        raise (ToldElsewhere if self.rank else type(first))(message) from failed

    def first(self, make: Callable[[], T]) -> T:
        """What process 0 makes, in all of them."""
        made: list[Any] = [None]
        with self.agree():
            if not self.rank:
                made = [make()]
        if self.count > 1:
            with self._reached():
                dist.broadcast_object_list(made, src=0)
        return made[0]

    def check_alike(self, about: Mapping[str, Any]) -> None:
        """Raise EoraLabError, in all, where processes do not say the same of what they are to do, with what differs."""
        every = self.gather(dict(about))
        for rank, other in enumerate(every):
            for name in every[0] if other != every[0] else ():
                if other.get(name) != every[0][name]:
                    message = f"the processes were handed different things: {name} in process {rank} is not that of 0"
                    raise (ToldElsewhere if self.rank else EoraLabError)(message)

    def add_up(self, tensors: Sequence[Shaped[Tensor, "..."]], to: int) -> None:
        """Add tensors up over all processes, in place, in process `to`; elsewhere they are of no more use."""
        with self._reached():
            for tensor in tensors:
                dist.reduce(tensor, to)

    def hand_over(self, value: T, source: int, to: int) -> T:
        """Let process `to` have a value of process `source`; a tensor is written to. Others do nothing."""
        with self._reached():
            if self.rank == source:
                dist.send(value, to) if isinstance(value, Tensor) else dist.send_object_list([value], to)
            elif self.rank == to and isinstance(value, Tensor):
                dist.recv(value, source)
            elif self.rank == to:
                received: list[Any] = [None]
                dist.recv_object_list(received, source)
                return received[0]
        return value

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say in one line that a process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise (ToldElsewhere if self.rank else MachineError)(
                "another process of this run has ended or does not answer: start the same command again, and it goes "
                "on from the blocks that are finished"
            ) from error


ALONE = Processes()


def _as_ours(error: Exception) -> EoraLabError:
    """Any error as one that travels in one line."""
    own = str(error) if isinstance(error, EoraLabError) else f"{type(error).__name__}: {one_line(error)}"
    return machine_error(error) or EoraLabError(own)


def launched() -> bool:
    """Whether a launcher such as torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def group(device: str) -> Iterator[str]:
    """The process group that a launcher asks for, if any, within this context: gloo on CPUs, nccl on GPUs.

    Yields the device of this process: of "cuda", the GPU that is its own.
    """
    if not launched():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise EoraLabError(f"the processes do not find each other: {one_line(error)}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()
