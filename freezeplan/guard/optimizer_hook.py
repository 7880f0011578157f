"""The guard inside ``optimizer.step()``: every optimizer that trains a model, seen when it first steps.

One hook of torch's for all optimizers. It looks closely at the first step of each, and from then on compares one number
a group and one flag a parameter: microseconds. What is compiled passes it by.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from freezeplan.apply.wrapped import has_groups
from freezeplan.guard.schedulers import Ratios

Look = Callable[[Optimizer, str], None]
"""Checks a model and an optimizer of it, and raises; is told when it looked."""


@dataclass
class _Seen:
    """What an optimizer was like when it was last looked at closely."""

    groups: list[dict[str, Any]]
    """Its groups; none where it is to be looked at anew."""
    ours: bool
    """Whether it holds a parameter that is or was the model's."""
    steps: int
    flags: list[tuple[weakref.ref[nn.Parameter], bool]] = field(default_factory=list)
    ratios: Ratios | None = None
    values: list[tuple[Any, Any]] | None = None
    """Rate and weight decay of each group."""


class OptimizerWatcher:
    """Watches all optimizers for those that hold a parameter of one model, and keeps neither alive.

    Args:
        parameters: Those of the model now, frozen ones included; read again for each optimizer that is new.
        look: The close check, at the first step of each optimizer and where something changed.
        ratios: An optimizer -> for each group the factors that its rate and its weight decay should have.
        is_multiplied: Whether a step that is running, of this optimizer or of one around it, was looked at and has
            multiplied its rates.
        now: Those of the model now, if they were looked up already.
        closely: Whether flags, rates and weight decay are compared at each later step.

    Examples:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> watcher = OptimizerWatcher(
        ...     lambda: [weight], lambda _, when: print(when), lambda _: Ratios([1.0], [None]), lambda _: False
        ... )
        >>> optimizer, other = torch.optim.SGD([weight]), torch.optim.SGD([nn.Parameter(torch.ones(1))])
        >>> optimizer.step(), other.step(), optimizer.step()
        seen at the first step of SGD
        (None, None, None)
        >>> _ = weight.requires_grad_(False)
        >>> optimizer.step()
        first seen at step 3 of SGD
        >>> watcher.remove()
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        look: Look,
        ratios: Callable[[Optimizer], Ratios],
        is_multiplied: Callable[[Optimizer], bool],
        now: Iterable[nn.Parameter] | None = None,
        *,
        closely: bool = True,
    ):
        self._parameters, self._look, self._ratios = parameters, look, ratios
        self._is_multiplied, self._closely = is_multiplied, closely
        found = parameters() if now is None else now
        self._known = {id(parameter): weakref.ref(parameter) for parameter in found}
        self._seen: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
        _watch(self)

    def recheck(self) -> None:
        """Look closely at each optimizer once more when it steps next; a new phase has other flags and rates."""
        for seen in self._seen.values():
            seen.groups = []

    def remove(self) -> None:
        """Watch no more; the last one takes the hook away."""
        _unwatch(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at an optimizer that is about to step."""
        if self._is_multiplied(optimizer):
            return
        seen = self._seen.get(optimizer)
        if seen is None or not has_groups(optimizer, seen.groups):
            steps = seen.steps if seen else 0
            seen = _Seen([*optimizer.param_groups], self._is_ours(optimizer), steps)
            if seen.ours:
                self._look(optimizer, _when(optimizer, steps))
                if self._closely:
                    seen.flags, seen.ratios = self._flags(optimizer), self._ratios(optimizer)
            self._seen[optimizer] = seen
        elif seen.ours and self._closely and (self._flipped(seen) or self._flattened(optimizer, seen)):
            self._look(optimizer, _when(optimizer, seen.steps))
            seen.flags = self._flags(optimizer)
        seen.steps += 1

    def _is_ours(self, optimizer: Optimizer) -> bool:
        self._known |= {id(parameter): weakref.ref(parameter) for parameter in self._parameters()}
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return any(id(p) in self._known and self._known[id(p)]() is p for p in held)

    def _flags(self, optimizer: Optimizer) -> list[tuple[weakref.ref[nn.Parameter], bool]]:
        """What should stay as it is while this optimizer trains: its own parameters, and all that are frozen.

        Others may be switched off for the length of its turn, as loops with several optimizers do.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [
            (weakref.ref(parameter), parameter.requires_grad)
            for parameter in self._parameters()
            if id(parameter) in held or not parameter.requires_grad
        ]

    @staticmethod
    def _flipped(seen: _Seen) -> bool:
        for found, flag in seen.flags:
            parameter = found()
            if parameter is not None and parameter.requires_grad is not flag:
                return True
        return False

    def _flattened(self, optimizer: Optimizer, seen: _Seen) -> bool:
        groups = optimizer.param_groups
        values = [(group.get("lr"), group.get("weight_decay")) for group in groups]
        for rate, decay in values:
            if isinstance(rate, torch.Tensor) or isinstance(decay, torch.Tensor):
                return False  # to read a tensor may wait for a device: that is left to the checks between epochs
        if values == seen.values:
            return False
        seen.values = values
        return seen.ratios is not None and not seen.ratios.hold(values)


_live: weakref.WeakSet[OptimizerWatcher] = weakref.WeakSet()
_hook: list[RemovableHandle] = []
"""The one hook, while there is any. It is not taken away when the last plan is collected as garbage: that may be in the
middle of some optimizer's step, which walks over the hooks."""


def _watch(watcher: OptimizerWatcher) -> None:
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_before_step))
    _live.add(watcher)


def _unwatch(watcher: OptimizerWatcher) -> None:
    _live.discard(watcher)
    if not _live and _hook:
        _hook.pop().remove()


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for watcher in list(_live):
            watcher.before_step(optimizer)


def _when(optimizer: Optimizer, steps: int) -> str:
    """``first seen at step 17 of SGD``."""
    place = f"first seen at step {steps + 1}" if steps else "seen at the first step"
    return f"{place} of {type(optimizer).__name__}"
