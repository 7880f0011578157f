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

from freezeplan.schedules import alike

Look = Callable[[Optimizer, str], None]
"""Checks a model and an optimizer of it, and raises; is told when it looked."""


@dataclass
class _Seen:
    """What an optimizer was like when it was last looked at closely."""

    groups: int
    ours: bool
    """Whether it holds a parameter that is or was the model's."""
    steps: int
    flags: list[tuple[weakref.ref[nn.Parameter], bool]] = field(default_factory=list)
    factors: list[float | None] = field(default_factory=list)
    rates: list[float] | None = None


class Steps:
    """Watches all optimizers for those that hold a parameter of one model, and keeps neither alive.

    Args:
        parameters: Those of the model now, frozen ones included; read again for each optimizer that is new.
        look: The close check, at the first step of each optimizer and where something changed.
        factors: An optimizer -> for each group the multiplier that its rate should have, None where there is none.
        now: Those of the model now, if they were looked up already.

    Examples:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> steps = Steps(lambda: [weight], lambda optimizer, when: print(when), lambda optimizer: [1.0])
        >>> optimizer, other = torch.optim.SGD([weight]), torch.optim.SGD([nn.Parameter(torch.ones(1))])
        >>> optimizer.step(), other.step(), optimizer.step()
        seen at the first step of SGD
        (None, None, None)
        >>> _ = weight.requires_grad_(False)
        >>> optimizer.step()
        first seen at step 3 of SGD
        >>> steps.remove()
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[nn.Parameter]],
        look: Look,
        factors: Callable[[Optimizer], list[float | None]],
        now: Iterable[nn.Parameter] | None = None,
    ):
        self._parameters, self._look, self._factors = parameters, look, factors
        found = parameters() if now is None else now
        self._known = {id(parameter): weakref.ref(parameter) for parameter in found}
        self._seen: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
        _watch(self)

    def again(self) -> None:
        """Look closely at each optimizer once more when it steps next; a new phase has other flags and rates."""
        for seen in self._seen.values():
            seen.groups = -1

    def remove(self) -> None:
        """Watch no more; the last one takes the hook away."""
        _unwatch(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at an optimizer that is about to step."""
        seen = self._seen.get(optimizer)
        if seen is None or seen.groups != len(optimizer.param_groups):
            steps = seen.steps if seen else 0
            seen = _Seen(len(optimizer.param_groups), self._is_ours(optimizer), steps)
            if seen.ours:
                self._look(optimizer, _when(optimizer, steps))
                seen.flags, seen.factors = self._flags(optimizer), self._factors(optimizer)
            self._seen[optimizer] = seen
        elif seen.ours and (self._flipped(seen) or self._flattened(optimizer, seen)):
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
        return any((p := found()) is not None and p.requires_grad is not flag for found, flag in seen.flags)

    def _flattened(self, optimizer: Optimizer, seen: _Seen) -> bool:
        rates = [group["lr"] for group in optimizer.param_groups]
        if any(isinstance(rate, torch.Tensor) for rate in rates) or rates == seen.rates:
            return False  # to read a tensor may wait for a device: that is left to the checks between epochs
        seen.rates = rates
        known = [(rate, factor) for rate, factor in zip(rates, seen.factors, strict=True) if factor]
        return bool(known) and not alike(*map(list, zip(*known, strict=True)))


_live: weakref.WeakSet[Steps] = weakref.WeakSet()
_hook: list[RemovableHandle] = []
"""The one hook, while there is any. It is not taken away when the last plan is collected as garbage: that may be in the
middle of some optimizer's step, which walks over the hooks."""


def _watch(steps: Steps) -> None:
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_before_step))
    _live.add(steps)


def _unwatch(steps: Steps) -> None:
    _live.discard(steps)
    if not _live and _hook:
        _hook.pop().remove()


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for steps in list(_live):
            steps.before_step(optimizer)


def _when(optimizer: Optimizer, steps: int) -> str:
    """``first seen at step 17 of SGD``."""
    place = f"first seen at step {steps + 1}" if steps else "seen at the first step"
    return f"{place} of {type(optimizer).__name__}"
