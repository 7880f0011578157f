"""The multiplier inside ``optimizer.step()``: exact under every scheduler, as what a scheduler owns is never written.

A pre-hook multiplies each group's ``lr`` for the length of one step and a post-hook puts the scheduler's value back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from freezeplan.errors import ApplyError


class Multiplier:
    """Scales the learning rates of an optimizer's groups during ``step()``, and only then.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaled = Multiplier(optimizer, {id(weight): 0.25})
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (0.75, 1.0)
    """

    def __init__(self, optimizer: Optimizer, rates: Mapping[int, float]):
        self._optimizer = optimizer
        self.use(rates)
        self._bases: list[Any] | None = None
        self._hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._scale()),
            optimizer.register_step_post_hook(lambda *_: self.restore()),
        )

    def use(self, rates: Mapping[int, float]) -> None:
        """Take other multipliers from the next step on: ``id`` of a parameter -> multiplier."""
        self._factors = [group_rate(group, rates) for group in self._optimizer.param_groups]

    def remove(self) -> None:
        """Take the hooks away; rates are the scheduler's again."""
        self.restore()
        for hook in self._hooks:
            hook.remove()

    def _scale(self) -> None:
        self.restore()
        self._bases = [group["lr"] for group in self._optimizer.param_groups]
        for group, factor in zip(
            self._optimizer.param_groups, self._factors, strict=False
        ):  # groups added later: as is
            group["lr"] = group["lr"] * factor

    def restore(self) -> None:
        """Put the scheduler's rates back; a step that raised has left the scaled ones behind."""
        if self._bases is not None:
            for group, base in zip(self._optimizer.param_groups, self._bases, strict=False):
                group["lr"] = base
            self._bases = None


def group_rate(group: Mapping[str, Any], rates: Mapping[int, float]) -> float:
    """Return the one multiplier of an optimizer's group; 1 for a group of parameters that the plan does not know.

    Args:
        group: With ``params``.
        rates: ``id`` of a parameter -> multiplier.

    Raises:
        ApplyError: If the parameters of the group need different ones.
    """
    found = {rates[id(parameter)] for parameter in group["params"] if id(parameter) in rates}
    if len(found) > 1:
        raise ApplyError(
            f"the optimizer's group {group.get('name', '')!r} holds parameters with different multipliers: "
            f"{', '.join(f'{rate:g}' for rate in sorted(found))}",
            notes=["make the optimizer from applied.param_groups"],
        )
    return found.pop() if found else 1.0


def check_fresh(optimizer: Optimizer, known: Mapping[int, str]) -> None:
    """Refuse an optimizer that misses a trained parameter, holds another in its place, or multiplies already.

    Args:
        optimizer: The optimizer.
        known: ``id`` of a live trained parameter -> its name.

    Raises:
        ApplyError: Saying which.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for key, name in known.items() if key not in held]
    if missing:
        raise ApplyError(
            f"the optimizer does not hold {len(missing)} of {len(known)} trained parameters, such as {missing[0]!r}",
            notes=["make it from applied.param_groups, after wrapping or moving the model"],
        )
    if any("lr_scale" in group for group in optimizer.param_groups):
        raise ApplyError("the optimizer's groups carry lr_scale: timm's schedulers would multiply a second time")
