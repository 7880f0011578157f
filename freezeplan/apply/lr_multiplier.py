"""The multiplier inside ``optimizer.step()``: exact under every scheduler, as what a scheduler owns is never written.

A pre-hook multiplies each group's ``lr`` for the length of one step and a post-hook puts the scheduler's value back.
An optimizer that holds another is followed to the one that steps; a group is multiplied once, however steps are nested.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from freezeplan.apply.wrapped import group_of, has_groups, held_by, is_hooked
from freezeplan.errors import ApplyError

OWN_RATE = "{} chooses its own rate, as its groups have no lr: the plan's multipliers cannot act"
GIVE_RATE = "give it a learning rate, or a plan that trains all at one rate"
"""What to say of optimizers such as Adafactor with ``lr=None``."""
_STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__
"""The code of torch's wrapper around every ``step``: its frame is on the stack while the step runs."""


Factors = list[tuple[dict[str, Any], float]]
"""The groups of an optimizer, each with its multiplier."""


class Multiplier:
    """Scales the learning rates of optimizers' groups while they step, and only then.

    Args:
        optimizers: Each gets two hooks, and so does each that it holds; one without torch's hooks must hold one.
        rates: ``id`` of a parameter -> multiplier.

    Raises:
        ApplyError: If a group holds parameters of different rates or has no rate to multiply, or nothing that torch
            hooks steps a parameter.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaled = Multiplier([optimizer], {id(weight): 0.25})
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (0.75, 1.0)
    """

    def __init__(self, optimizers: Sequence[Any], rates: Mapping[int, float]):
        self._rates = rates
        self._optimizers: list[Optimizer] = []
        self._factors: dict[int, Factors] = {}
        self._hooks: list[RemovableHandle] = []
        self._scaled: list[tuple[int, dict[str, Any], Any]] = []
        """(frame of the step, group, its scheduler's rate) of each group that is multiplied now."""
        every = [*optimizers]
        every += [inner for optimizer in optimizers for inner in held_by(optimizer)]
        hooked = [optimizer for optimizer in {id(one): one for one in every}.values() if is_hooked(optimizer)]
        for optimizer in optimizers:
            _check_hooked(optimizer, hooked, rates)
        factors = [self._group_rates(optimizer) for optimizer in hooked]  # raises before anything is hooked
        for optimizer, found in zip(hooked, factors, strict=True):
            self._hook(optimizer, found)

    def use(self, rates: Mapping[int, float]) -> None:
        """Take other multipliers from the next step on: ``id`` of a parameter -> multiplier."""
        self._rates = rates
        self._factors = {id(optimizer): self._group_rates(optimizer) for optimizer in self._optimizers}

    def remove(self) -> None:
        """Take the hooks away; rates are the scheduler's again."""
        self._restore(self._scaled)
        for hook in self._hooks:
            hook.remove()

    def covers(self, optimizer: Any) -> bool:
        """Whether each parameter of the plan that an optimizer holds is multiplied when it steps.

        One that was not attached and holds an attached one, or shares its groups, is attached now.
        """
        if any(optimizer is one for one in self._optimizers):
            return True
        if not any(id(p) in self._rates for group in optimizer.param_groups for p in group["params"]):
            return True
        attached = {id(group) for one in self._optimizers for group in one.param_groups}
        inside = group_of(one for one in held_by(optimizer) if any(one is other for other in self._optimizers))
        for group in optimizer.param_groups:
            known = [id(p) for p in group["params"] if id(p) in self._rates]
            if known and id(group) not in attached and not any(key in inside for key in known):
                return False
        self._hook(optimizer, self._group_rates(optimizer))
        return True

    def is_scaling(self, optimizer: Any) -> bool:
        """Whether a step that is running has multiplied groups of this optimizer; ends what a failed step has left."""
        if not self._scaled:
            return False
        self.end_failed_steps()
        groups = {id(group) for group in optimizer.param_groups}
        return any(id(group) in groups for _, group, _ in self._scaled)

    def end_failed_steps(self) -> None:
        """Put the scheduler's rates back where a step raised; what a running step has multiplied stays."""
        if self._scaled:
            self._end_failed(sys._getframe(1))

    def _end_failed(self, frame: FrameType | None) -> None:
        running = set()
        while frame is not None:
            if frame.f_code is _STEP_CODE:
                running.add(id(frame))
            frame = frame.f_back
        self._restore([entry for entry in self._scaled if entry[0] not in running])

    def _restore(self, entries: list[tuple[int, dict[str, Any], Any]]) -> None:
        for _, group, base in entries:
            group["lr"] = base
        ended = {id(group) for _, group, _ in entries}
        self._scaled = [entry for entry in self._scaled if id(entry[1]) not in ended]

    def _hook(self, optimizer: Optimizer, factors: Factors) -> None:
        self._optimizers.append(optimizer)
        self._factors[id(optimizer)] = factors
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        step = 0
        if not torch.compiler.is_compiling():
            wrapper = sys._getframe(1)
            step = id(wrapper)
            if self._scaled:
                self._end_failed(wrapper.f_back)  # an earlier step may have run in a frame at the same address
        factors = self._factors[id(optimizer)]
        if not has_groups(optimizer, [group for group, _ in factors]):
            factors = self._factors[id(optimizer)] = self._group_rates(optimizer)  # its groups were edited
        done = [id(group) for _, group, _ in self._scaled]
        for group, factor in factors:
            if factor != 1.0 and id(group) not in done:
                self._scaled.append((step, group, group["lr"]))
                group["lr"] = group["lr"] * factor

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        if frame is not None and frame.f_code is _STEP_CODE:
            ended = [entry for entry in self._scaled if entry[0] == id(frame)]
        else:  # a compiled step may begin in one frame and end in another
            groups = [id(group) for group in optimizer.param_groups]
            ended = [entry for entry in self._scaled if id(entry[1]) in groups]
        self._restore(ended)

    def _group_rates(self, optimizer: Any) -> Factors:
        """Each group's multiplier; 1 where an optimizer that it holds steps the parameters in a group of its own."""
        inner = group_of(held_by(optimizer))
        factors: Factors = []
        for group in optimizer.param_groups:
            rate = group_rate(group, self._rates)
            if any(inner.get(id(p), group) is not group for p in group["params"]):
                rate = 1.0
            if rate != 1.0 and group.get("lr") is None:
                raise ApplyError(OWN_RATE.format(type(optimizer).__name__), notes=[GIVE_RATE])
            factors.append((group, rate))
        return factors


def _check_hooked(optimizer: Any, hooked: Sequence[Optimizer], rates: Mapping[int, float]) -> None:
    """Refuse an optimizer without torch's hooks that holds a parameter of the plan and nothing that steps it."""
    if any(optimizer is one for one in hooked):
        return
    inner = held_by(optimizer)
    stepped = group_of(one for one in hooked if any(one is other for other in inner))
    lost = [p for group in optimizer.param_groups for p in group["params"] if id(p) in rates and id(p) not in stepped]
    if lost:
        title = type(optimizer).__name__
        raise ApplyError(
            f"{title}.step is not called through torch.optim.Optimizer, and {title} holds no optimizer that steps "
            f"{len(lost)} of its parameters: nothing can multiply their rates",
            notes=["attach the torch.optim.Optimizer that moves them: applied.attach(optimizer)"],
        )


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


def check_fresh(optimizers: Sequence[Any], known: Mapping[int, str]) -> None:
    """Refuse optimizers that miss a trained parameter, or that multiply already.

    Args:
        optimizers: All that train the model.
        known: ``id`` of a live trained parameter -> its name.

    Raises:
        ApplyError: Saying which.
    """
    whose = "the optimizer does" if len(optimizers) == 1 else f"the {len(optimizers)} optimizers do"
    held = group_of(one for optimizer in optimizers for one in (optimizer, *held_by(optimizer)))
    missing = [name for key, name in known.items() if key not in held]
    if missing:
        them = "it" if len(optimizers) == 1 else "them"
        notes = [f"make {them} from applied.param_groups, after wrapping or moving the model"]
        if len(optimizers) == 1 and held.keys() & known.keys():
            notes.append("of several optimizers attach all in one call: applied.attach(first, second)")
        raise ApplyError(
            f"{whose} not hold {len(missing)} of {len(known)} trained parameters, such as {missing[0]!r}", notes=notes
        )
    if any("lr_scale" in group for optimizer in optimizers for group in optimizer.param_groups):
        raise ApplyError("the optimizer's groups carry lr_scale: timm's schedulers would multiply a second time")
