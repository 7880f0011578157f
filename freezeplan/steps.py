"""Every step of every optimizer, shown to the plans that are live: guards need not be called to be on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


@dataclass
class Seen:
    """What is known of one optimizer."""

    holds: bool
    """Whether it holds a parameter of the model."""
    count: int = 0
    """Steps that began since it was first seen."""
    factors: tuple[float | None, ...] = ()
    """The plan's multiplier of each of its groups; None for a group that the plan does not know."""

    @property
    def due(self) -> bool:
        """Whether all is looked at: at steps 1, 2, 4, 8, ... A look takes milliseconds, so many steps share it.

        Examples:
            >>> [count for count in range(1, 20) if Seen(True, count).due]
            [1, 2, 4, 8, 16]
        """
        return self.count & (self.count - 1) == 0


_watchers: weakref.WeakKeyDictionary[Any, Callable[[Any, Optimizer], None]] = weakref.WeakKeyDictionary()
_hooks: list[RemovableHandle] = []


def watch(watcher: Any, look: Callable[[Any, Optimizer], None]) -> None:
    """Call ``look(watcher, optimizer)`` ahead of every step from now on. The watcher is not kept alive by this."""
    _watchers[watcher] = look
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_show))


def forget(watcher: Any) -> None:
    """Show it no further step; without any watcher torch's hook goes too."""
    _watchers.pop(watcher, None)
    while _hooks and not _watchers:
        _hooks.pop().remove()


def _show(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step is not looked at: what is called here cannot be traced
        return
    for watcher, look in tuple(_watchers.items()):
        look(watcher, optimizer)
