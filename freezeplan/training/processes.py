"""The processes of a run: one, or those that ``torchrun`` started. Each takes its share; sums make it whole."""

from __future__ import annotations

import atexit
import gc
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from freezeplan.errors import FreezePlanError

T = TypeVar("T")
_NOTES = ("what it said is above; go on with the same command and --resume --out DIR",)
PATIENCE = timedelta(hours=12)
"""How long the others are waited for: one may be reading images, or computing features, much longer than the rest. That
a process has ended is noticed at once, without it: its connection closes, or torchrun ends the others."""


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is. Alone, nothing here does anything.

    Examples:
        >>> Processes().share(torch.arange(4)), Processes(1, 2).share(torch.arange(4))
        (tensor([0, 1, 2, 3]), tensor([1, 3]))
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of some rows."""
        return rows[self.rank :: self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of some tensors of one dtype by its sum over all processes, in place and in one transfer.

        Raises:
            FreezePlanError: If another process has ended.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _explained():
            distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def shared(self, module: nn.Module) -> nn.Module:
        """Return a module that gives the same, and whose gradients are means over all processes after a backward pass.

        That is torch's DistributedDataParallel. Its parameters are the module's own. Buffers are not exchanged. Drop it
        before another one is made of the same parameters.
        """
        if self.count == 1:
            return module
        gc.collect()  # one that was dropped is freed now, and its hooks with it
        with _explained():
            return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Say what it means that gradients cannot be exchanged during a backward pass.

        Raises:
            FreezePlanError: If another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and re.search("gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE):
                raise FreezePlanError("another process of this run has ended", notes=_NOTES) from error
            raise

    def agreed(self, value: T) -> T:
        """Return what the first process gave, in all of them."""
        if self.count == 1:
            return value
        found: list[T] = [value]
        with _explained():
            distributed.broadcast_object_list(found, src=0)
        return found[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process do something, and then the others."""
        if self.count > 1 and not self.first:
            self._wait()
        yield
        if self.count > 1 and self.first:
            self._wait()

    def _wait(self) -> None:
        with _explained():
            distributed.barrier()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FreezePlanError("another process of this run has ended", notes=_NOTES) from error


def _ended(*_: object) -> None:
    """Say why torchrun ends a process, which it does as soon as it sees that another has ended."""
    raise FreezePlanError("torchrun was stopped, or another process of this run has ended", notes=_NOTES)


def join(*, cuda: bool) -> Processes:
    """Join the processes that ``torchrun`` started with this one; alone otherwise.

    With CUDA each process of a machine takes the GPU of its number.

    Args:
        cuda: Whether the run is on GPUs: then they talk by NCCL, by gloo otherwise.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return Processes()
    if not distributed.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)
        signal.signal(signal.SIGTERM, _ended)
    return Processes(distributed.get_rank(), distributed.get_world_size())


def beside() -> int:
    """Return how many processes of the run share this machine.

    Examples:
        >>> beside()
        1
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
