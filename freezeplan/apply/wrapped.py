"""Optimizers that hold others: which of them torch hooks, so that something can happen inside their steps.

timm's Lookahead, SAM, accelerate's AcceleratedOptimizer and Lightning's LightningOptimizer each keep the optimizer that
moves the parameters as an attribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer


def is_hooked(optimizer: Any) -> bool:
    """Whether torch runs the step hooks of an optimizer: it wraps ``step`` of the class in ``Optimizer.__init__``.

    Examples:
        >>> import torch
        >>> is_hooked(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])), is_hooked(object())
        (True, False)
    """
    return isinstance(optimizer, Optimizer) and bool(getattr(type(optimizer).step, "hooked", False))


def held_by(optimizer: Any) -> list[Any]:
    """Return the optimizers that an optimizer holds as attributes, in lists or in dicts, and those that they hold.

    Examples:
        >>> import timm.optim, torch
        >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        >>> held_by(timm.optim.Lookahead(base)) == [base]
        True
    """
    found: list[Any] = []
    ahead = [optimizer]
    while ahead:
        for value in _attributes(ahead.pop()):
            if value is not optimizer and all(value is not one for one in found):
                found.append(value)
                ahead.append(value)
    return found


def _attributes(optimizer: Any) -> Iterator[Any]:
    for value in list(getattr(optimizer, "__dict__", {}).values()):
        parts: Iterable[Any] = (value,)
        if isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, (list, tuple)):
            parts = value
        for part in parts:
            if isinstance(part, Optimizer) or (hasattr(part, "param_groups") and hasattr(part, "step")):
                yield part


def group_of(optimizers: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """Return ``id`` of each parameter that some optimizers hold -> its group in the last of them."""
    return {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def has_groups(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an optimizer's groups are these very ones, in this order.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}])
        >>> before = [*optimizer.param_groups]
        >>> has_groups(optimizer, before), has_groups(optimizer, before[::-1])
        (True, False)
    """
    return [id(group) for group in groups] == [id(group) for group in optimizer.param_groups]
