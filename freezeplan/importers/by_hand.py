"""What a model that was frozen by hand, and its optimizer, do to each tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from freezeplan.errors import ApplyError, FreezePlanWarning
from freezeplan.model import names
from freezeplan.model.description import Description


@dataclass(frozen=True)
class ByHand:
    """What the model and its optimizer do to each tensor."""

    rates: Mapping[str, float | None]
    """None where frozen."""
    decays: Mapping[str, float]
    """Of what is trained, relative to the largest; empty without an optimizer or without weight decay."""
    modes: Mapping[str, str]
    """Of the modules that own what is trained."""


@dataclass(frozen=True)
class _Step:
    """What an optimizer does to a parameter."""

    rate: float | None
    """None where the optimizer finds it by itself."""
    decay: float


def read(model: nn.Module, described: Description, optimizer: torch.optim.Optimizer | None) -> ByHand:
    """Read the flags and modes of a model, and the rates and weight decays of its optimizer.

    Args:
        model: The model, without wrappers.
        described: Its description.
        optimizer: What trains it; without one all that requires a gradient has the rate 1.

    Raises:
        ApplyError: As ``infer_plan`` does.

    Examples:
        >>> from freezeplan.model import create_model, describe
        >>> model = create_model("test_resnet", num_classes=3)
        >>> _ = model.requires_grad_(False).fc.requires_grad_(True)
        >>> [(name, rate) for name, rate in read(model, describe(model), None).rates.items() if rate]
        [('fc.weight', 1.0), ('fc.bias', 1.0)]
    """
    live = names.survey(model)
    own = {id(p): _Step(1.0, 0.0) for parts in live.parameters.values() for p in parts}
    scaled, steps = (True, own) if optimizer is None else _steps(optimizer)
    held = {key: step for key, step in steps.items() if key in own}
    if optimizer is not None and not held:
        raise ApplyError("the optimizer holds no parameter of this model")
    moved = {key: step for key, step in held.items() if step.rate != 0}
    trained: dict[str, _Step] = {}
    partly = []
    for tensor in described.tensors:
        parts = live.parameters[tensor.name]
        found = [moved[id(p)] for p in parts if p.requires_grad and id(p) in moved]
        if found:
            trained[tensor.name] = _only(tensor.name, found)
            partly += [tensor.name] if len(found) < len(parts) else []
    if not trained:
        still = len(moved) < len(held)
        notes = ["the optimizer has the rate 0: infer the plan before a warm-up of your own sets it"] if still else []
        raise ApplyError("nothing of this model is trained, so there is no plan for it", notes=notes)
    if partly:
        message = f"a plan trains parametrized tensors whole; this model trains a part of {', '.join(partly)}"
        warnings.warn(message, FreezePlanWarning, stacklevel=3)
    rates = _comparable({name: step.rate for name, step in trained.items()})
    base = 1.0 if scaled else max(rates.values())
    largest = max(step.decay for step in trained.values())
    owners = {tensor.name: live.modules[tensor.module][-1] for tensor in described.tensors}
    return ByHand(
        rates={t.name: tidy(rates[t.name] / base) if t.name in rates else None for t in described.tensors},
        decays={name: tidy(step.decay / largest) for name, step in trained.items()} if largest else {},
        modes={name: "train" if owners[name].training or not model.training else "eval" for name in trained},
    )


def _steps(optimizer: torch.optim.Optimizer) -> tuple[bool, dict[int, _Step]]:
    """Whether rates are those of ``lr_scale``, and what happens to each parameter, by its ``id``."""
    scaled = any("lr_scale" in group for group in optimizer.param_groups)
    found: dict[int, _Step] = {}
    for index, group in enumerate(optimizer.param_groups):
        where = f"optimizer.param_groups[{index}]"
        lr = group.get("initial_lr", group.get("lr"))
        rate = None if lr is None else _number("lr", lr, where)
        if scaled and rate != 0:
            rate = _number("lr_scale", group.get("lr_scale", 1.0), where)
        step = _Step(rate, _number("weight_decay", group.get("weight_decay") or 0.0, where))
        found |= {id(p): step for p in group["params"]}
    return scaled, found


def _number(key: str, value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ApplyError(f"{key} is a number of 0 or more, found {value!r}", where=where)
    return number


def _only(name: str, found: Sequence[_Step]) -> _Step:
    """What happens to a tensor; a parametrization makes several parameters of one."""
    if len(set(found)) > 1:
        raise ApplyError(
            f"the parameters that {name!r} is made of have different rates or weight decays",
            notes=["a plan gives a tensor one of each: put them into one group of the optimizer"],
        )
    return found[0]


def _comparable(rates: Mapping[str, float | None]) -> dict[str, float]:
    """The rates as numbers; those that the optimizer finds by itself are all 1."""
    known = {name: rate for name, rate in rates.items() if rate is not None}
    if known and len(known) < len(rates):
        none, some = next(name for name in rates if name not in known), next(iter(known))
        raise ApplyError(
            f"{none!r} has lr=None, a rate that the optimizer finds by itself, and {some!r} has lr={known[some]:g}",
            notes=["their ratio is not known: give every group of the optimizer an lr, or none"],
        )
    return known or dict.fromkeys(rates, 1.0)


def tidy(value: float) -> float:
    """Return a number without what rounding left at its end.

    Examples:
        >>> tidy(0.1 * 3)
        0.3
    """
    return float(f"{value:.12g}")
