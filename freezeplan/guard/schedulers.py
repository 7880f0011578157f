"""Schedulers and the plan's ratios: which arguments keep them, whether they still hold, and who flattened them.

A scheduler that multiplies keeps the ratios of the groups. One that writes an absolute rate (a maximum, a floor) gives
the same to all, unless it takes a list with one value a group.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from freezeplan.apply.lr_multiplier import GIVE_RATE, OWN_RATE
from freezeplan.apply.wrapped import held_by
from freezeplan.errors import ApplyError, Problem, did_you_mean

_LISTS: Mapping[str, tuple[str, ...]] = {
    "OneCycleLR": ("max_lr",),
    "CyclicLR": ("base_lr", "max_lr"),
    "ReduceLROnPlateau": ("min_lr",),
    "SWALR": ("swa_lr",),
}
"""torch's schedulers that write absolute rates -> arguments that take a list."""
_FLOORS = ("CosineAnnealingLR", "CosineAnnealingWarmRestarts")
"""Those whose ``eta_min`` is one absolute rate for all groups."""
_MULTIPLY = (
    "ConstantLR",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "PolynomialLR",
    "StepLR",
)
_EXACT = "or apply_plan(..., scheduler='any') and applied.attach(optimizer): exact under every scheduler"
_TOLERANCE = 1e-3


def arguments(scheduler: type | str, multipliers: Sequence[float], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a torch scheduler's arguments with each absolute rate as a list that keeps the plan's ratios.

    Args:
        scheduler: A class of ``torch.optim.lr_scheduler``, or its name.
        multipliers: The multiplier of each of the optimizer's groups, in their order.
        given: Arguments as for a multiplier of 1.

    Raises:
        ApplyError: If the scheduler has an absolute floor that takes no list, or is not known.

    Examples:
        >>> arguments("OneCycleLR", [0.25, 1.0], {"max_lr": 0.5, "total_steps": 10})
        {'max_lr': [0.125, 0.5], 'total_steps': 10}
    """
    name = scheduler if isinstance(scheduler, str) else scheduler.__name__
    if name in _FLOORS and given.get("eta_min") and len(set(multipliers)) > 1:
        raise ApplyError(
            f"{name} has one eta_min for all groups, which ends the plan's ratios: found eta_min={given['eta_min']:g}",
            notes=["eta_min=0 keeps the ratios", _EXACT],
        )
    if name not in (*_LISTS, *_FLOORS, *_MULTIPLY):
        known = (*_LISTS, *_FLOORS, *_MULTIPLY)
        raise ApplyError(f"{name} is not known to keep the plan's ratios", notes=[*did_you_mean(name, known), _EXACT])
    lists = _LISTS.get(name, ())
    return {
        key: [value * factor for factor in multipliers] if key in lists and isinstance(value, (int, float)) else value
        for key, value in given.items()
    }


@dataclass(frozen=True)
class Ratios:
    """For each group of an optimizer, what its values should be multiples of; None where the plan does not know it."""

    rates: Sequence[float | None]
    """The multiplier that should be in ``lr``."""
    decays: Sequence[float | None]
    """The factor that should be in ``weight_decay``."""

    def hold(self, values: Sequence[tuple[float | None, float | None]]) -> bool:
        """Whether rates and weight decays, a pair for each group, are one base each times the factors.

        Examples:
            >>> ratios = Ratios([0.5, 1.0], [0.0, 1.0])
            >>> ratios.hold([(0.05, 0.0), (0.1, 0.4)]), ratios.hold([(0.05, 0.4), (0.1, 0.4)])
            (True, False)
        """
        for found, wanted in zip(zip(*values, strict=True), (self.rates, self.decays), strict=False):
            known = [(v, f) for v, f in zip(found, wanted, strict=True) if v is not None and f is not None]
            if not alike([value for value, _ in known], [factor for _, factor in known]):
                return False
        return True


def ratios(optimizer: Optimizer, rates: Mapping[int, float], decays: Mapping[int, float], kind: str) -> Ratios:
    """Return, for each group, the factors that should be in its ``lr`` and its ``weight_decay``.

    Takes what ``fault`` and ``decay_fault`` take. With ``any`` the one of ``lr`` is 1: ``attach`` multiplies later.

    Examples:
        >>> import torch
        >>> one, two = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        >>> ratios(torch.optim.SGD([{"params": [one]}, {"params": [two]}]), {id(one): 0.5}, {id(one): 1.0}, "torch")
        Ratios(rates=[0.5, None], decays=[1.0, None])
    """
    found = [_one(group, rates) for group in optimizer.param_groups]
    once = [factor and 1.0 for factor in found] if kind == "any" else found
    return Ratios(once, [_one(group, decays) for group in optimizer.param_groups])


def _one(group: Mapping[str, Any], factors: Mapping[int, float]) -> float | None:
    """The factor of a group's parameters; None where the plan knows none of them, or they need several."""
    several = _multipliers(group, factors)
    return several.pop() if len(several) == 1 else None


def decay_fault(optimizer: Optimizer, decays: Mapping[int, float]) -> Problem | None:
    """Say whether an optimizer's weight decays have lost the plan's ratios; None if they hold.

    Args:
        optimizer: An optimizer whose groups came from ``applied.param_groups``.
        decays: ``id`` of a parameter -> the factor of its weight decay.
    """
    found = [
        (str(group.get("name") or index), float(group["weight_decay"]), factor)
        for index, group in enumerate(optimizer.param_groups)
        if group.get("weight_decay") is not None and (factor := _one(group, decays)) is not None
    ]
    if not found or alike([decay for _, decay, _ in found], [factor for *_, factor in found]):
        return None
    table = ", ".join(
        f"group {name!r} has weight_decay {decay:g} and wd_mult {factor:g}" for name, decay, factor in found[:4]
    )
    return Problem(
        f"the weight decays no longer have the plan's ratios: {table}",
        notes=('a schedule of weight decay multiplies: group["weight_decay"] = wd * group["wd_mult"]',),
    )


def _known(optimizer: Optimizer, rates: Mapping[int, float]) -> list[tuple[str, float, float, dict[str, Any]]]:
    """Name, rate, multiplier and dict of each group that has one multiplier; the rate is NaN where it has none."""
    return [
        (str(group.get("name") or index), _rate(group), known.pop(), group)
        for index, group in enumerate(optimizer.param_groups)
        if len(known := _multipliers(group, rates)) == 1
    ]


def _rate(group: Mapping[str, Any]) -> float:
    lr = group.get("lr")
    return math.nan if lr is None else float(lr)


def _multipliers(group: Mapping[str, Any], rates: Mapping[int, float]) -> set[float]:
    """The multipliers of a group's parameters, as far as the plan knows them."""
    return {rates[id(parameter)] for parameter in group["params"] if id(parameter) in rates}


def fault(optimizer: Optimizer, rates: Mapping[int, float], kind: str, *, stepping: bool = False) -> Problem | None:
    """Say whether an optimizer's rates have lost the plan's ratios, and to which scheduler; None if they hold.

    Args:
        optimizer: An optimizer whose groups came from ``applied.param_groups``.
        rates: ``id`` of a parameter -> its multiplier.
        kind: For whom the plan was applied: ``torch``, ``timm`` or ``any``.
        stepping: Whether it is about to step, so that what multiplies must have been made.
    """
    for index, group in enumerate(optimizer.param_groups):
        several = _multipliers(group, rates)
        if len(several) > 1:
            return Problem(
                f"group {group.get('name') or index} of {type(optimizer).__name__} holds parameters that the plan "
                f"trains at {', '.join(f'{rate:g}' for rate in sorted(several))} times the rate, and gives them one",
                notes=("make the optimizer from applied.param_groups, not from model.parameters()",),
            )
    found = _known(optimizer, rates)
    if len({factor for _, _, factor, _ in found}) < 2:
        return None
    lrs, wanted = [lr for _, lr, _, _ in found], [factor for _, _, factor, _ in found]
    if any(map(math.isnan, lrs)):
        return Problem(OWN_RATE.format(type(optimizer).__name__), notes=(GIVE_RATE,))
    if kind != "timm" and any("lr_scale" in group for *_, group in found):
        return Problem(
            "the optimizer's groups carry lr_scale, and their rates are multiplied already: a scheduler of timm would "
            "multiply a second time",
            notes=("apply_plan(..., scheduler='timm') for a scheduler of timm",),
        )
    once = [1.0] * len(found) if kind == "any" else wanted
    if alike(lrs, once):
        return None
    schedulers = _schedulers(optimizer)  # slow, so only for the sentence
    names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
    early = not stepping and not schedulers and not optimizer.state
    if kind == "timm" and early and alike(lrs, [1.0] * len(found)):
        return None  # timm's scheduler is still to be made: it multiplies when it is
    if alike(lrs, [first * factor for first, factor in zip(once, wanted, strict=True)]):
        by = f" (by {names})" if names else ""
        return Problem(f"the plan's multipliers act twice{by}: {_table(found)}", notes=(_twice(kind),))
    if kind == "timm":
        by = f"; {names} does not read it" if names else ""
        advice = (
            "lr_scale is applied by timm's schedulers alone: apply_plan(..., scheduler='torch', lr=...) for torch's"
        )
        return Problem(f"the rates do not have the plan's ratios{by}: {_table(found)}", notes=(advice,))
    by = f"{names} flattened the rates" if names else "the rates no longer have the plan's ratios"
    return Problem(f"{by}: {_table(found)}", notes=(*_advice(schedulers, wanted), _EXACT))


def alike(lrs: Sequence[float], factors: Sequence[float]) -> bool:
    """Whether the values are one base times the factors; where a factor is 0 the value must be."""
    if any(lr != 0 for lr, factor in zip(lrs, factors, strict=True) if factor == 0):
        return False
    bases = [lr / factor for lr, factor in zip(lrs, factors, strict=True) if factor]
    return not bases or max(bases) - min(bases) <= _TOLERANCE * max(map(abs, bases))


def _table(found: Sequence[tuple[str, float, float, Any]]) -> str:
    return ", ".join(f"group {name!r} has lr {lr:g}" for name, lr, _, _ in found[:4])


def _twice(kind: str) -> str:
    if kind == "any":
        return "attach multiplies inside optimizer.step(), so every group's lr is the base rate"
    if kind == "timm":
        return "with scheduler='timm' every group's lr is the base rate, and timm's scheduler multiplies"
    return "with scheduler='torch' the groups' lr is multiplied already: take them as applied.param_groups gives them"


def _schedulers(optimizer: Optimizer) -> list[Any]:
    """Return the schedulers of an optimizer and of what holds it, among all objects that refer to them."""
    holders = [optimizer, *(found for found in _referrers(optimizer) if _holds(found, optimizer))]
    return [
        found
        for holder in holders
        for found in _referrers(holder)
        if getattr(found, "optimizer", None) is holder
        and not hasattr(found, "param_groups")
        and hasattr(found, "step")
        and (hasattr(found, "base_lrs") or hasattr(found, "base_values") or type(found).__name__ in _LISTS)
    ]


def _holds(found: Any, optimizer: Optimizer) -> bool:
    return isinstance(getattr(found, "param_groups", None), list) and any(one is optimizer for one in held_by(found))


def _referrers(thing: object) -> list[Any]:
    """Return the objects with ``thing`` as an attribute; some keep their attributes in a dict, others need none."""
    direct = gc.get_referrers(thing)
    inside = [found for kept in direct if type(kept) is dict for found in gc.get_referrers(kept)]
    owners = [found for found in (*direct, *inside) if hasattr(found, "step") and not isinstance(found, type)]
    return list({id(found): found for found in owners}.values())


def _advice(schedulers: Sequence[Any], factors: Sequence[float]) -> list[str]:
    """The list-valued arguments that would be right, from what the scheduler was given."""
    lines = []
    for scheduler in schedulers:
        name = type(scheduler).__name__
        if name in _FLOORS:
            lines.append(f"{name}(optimizer, ..., eta_min=0) keeps the ratios")
        bases = {key: base for key in _LISTS.get(name, ()) if (base := _given(scheduler, key))}
        if bases:
            given = ", ".join(f"{key}={base:g}" for key, base in bases.items())
            right = ", ".join(
                f"{key}=[{', '.join(f'{base * factor:g}' for factor in factors)}]" for key, base in bases.items()
            )
            lines.append(f"{name}(optimizer, **applied.scheduler_kwargs({name}, {given}, ...)) gives {right}")
    return lines


def _given(scheduler: Any, key: str) -> float | None:
    """The absolute rate that a scheduler was given, as it keeps it."""
    kept = {"min_lr": "min_lrs", "base_lr": "base_lrs", "max_lr": "max_lrs"}.get(key)
    values = getattr(scheduler, kept, None) if kept else None
    if values is None:  # OneCycleLR and SWALR keep it in the groups
        values = [group[key] for group in scheduler.optimizer.param_groups if key in group]
    return float(max(values)) if values else None
