"""``apply_plan`` and ``resolve_plan``: the two calls that begin everything."""

from __future__ import annotations

import gc
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from freezeplan.applied_plan import AppliedPlan, applied
from freezeplan.apply import freeze, phases, processes
from freezeplan.apply.freeze import Scheduler
from freezeplan.errors import ApplyError, FreezePlanWarning
from freezeplan.lifetime import ATTRIBUTE, LIVE
from freezeplan.model import describer, names
from freezeplan.plan.load import PlanLike, load_plan
from freezeplan.resolve.resolution import Resolution, RuleUse
from freezeplan.resolve.resolver import resolve


def resolve_plan(plan: PlanLike, model: nn.Module) -> Resolution:
    """Check a plan against a model and say what it means, tensor by tensor. Changes nothing.

    Args:
        plan: A Plan, a dict, a path or a preset's name.
        model: Any module, also on the meta device; roles and stages need timm models, itself or inside of it.

    Returns:
        For each tensor its rate, decay, mode and the rule that decided; each rule's counts; hints.

    Raises:
        PlanError: With all problems at once: see ``freezeplan.resolve.resolve``.

    Examples:
        >>> from freezeplan.model import create_model
        >>> resolution = resolve_plan("voc_vgg16/frozen_convs", create_model("vgg16", num_classes=20, meta=True))
        >>> len(resolution.frozen), sum(row.elements for row in resolution.frozen)
        (26, 14714688)
    """
    loaded = load_plan(plan)
    return resolve(loaded, describer.describe(names.survey(model), asked=loaded.asks))


def apply_plan(
    model: nn.Module,
    plan: PlanLike,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    scheduler: Scheduler = "torch",
    replace: bool = False,
    epochs: int | None = None,
    guard: bool = True,
) -> AppliedPlan:
    """Freeze and train the parameters of a model as a plan says.

    The model is changed in place: ``requires_grad`` of each parameter; the gradient of what is frozen is cleared; what
    is frozen is put in eval and stays there through ``model.train()``, so that statistics, dropout and drop-path stand
    still; what says ``reinit`` gets new values. No module is swapped and nothing is hashed or copied.

    Args:
        model: Any module; roles and stages need timm models, itself or inside of it.
        plan: A Plan, a dict, a path or a preset's name.
        lr: Base learning rate, in the optimizer's units, greater than 0. None: the groups carry no ``lr``; right where
            every multiplier is 1 or with ``scheduler="timm"``.
        weight_decay: Base weight decay, 0 or greater. None: a group carries ``weight_decay`` only where its factor is 0
            and inherits the optimizer's otherwise.
        scheduler: Who multiplies. ``torch``: the multiplier is in the group's ``lr``; right for schedulers that
            multiply. ``timm``: it is in ``lr_scale``, which timm's schedulers apply (and nothing else does). ``any``:
            ``applied.attach(optimizer)`` multiplies inside ``optimizer.step()``, exact under every scheduler.
        replace: Undo the plan that is live on this very model first.
        epochs: Epochs of the whole training, where a phase ends after a percentage of them.
        guard: Whether what ``applied.check`` does is checked when an optimizer of this model first steps, and by
            ``applied.step`` before every epoch. Until then each step compares flags and rates, in microseconds; what
            is found is raised. It takes one hook of torch's for all optimizers, which ``undo`` takes away.

    Returns:
        The applied plan. It iterates over its groups, so an optimizer takes it directly.

    Raises:
        PlanError: If the plan is not valid or does not fit the model.
        ApplyError: If another plan is live on the model or on modules of it, ``lr``, ``weight_decay`` or ``epochs`` is
            needed and missing, or has no possible value, a tensor that would be trained cannot be, a tensor's rate
            differs between phases and the scheduler is not ``any``, or what is trained did not require a gradient when
            it was wrapped in DistributedDataParallel for several processes.
        ModelError: If ``reinit`` is asked for and the model cannot be created anew.

    Warns:
        FreezePlanWarning: Where a rule that is no catch-all decided less than half of what it matched; where a
            catch-all or the default trains what had ``requires_grad=False``.

    Examples:
        >>> from freezeplan.model import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
        >>> optimizer = torch.optim.AdamW(apply_plan(model, plan, lr=1e-3), weight_decay=0.05)
        >>> [(group["name"], group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [('lr_mult=1', ['fc.weight'], 0.05), ('lr_mult=1, no decay', ['fc.bias'], 0.0)]
        >>> model.train().layer1.training
        False
    """
    _check_number("lr", lr, zero=False)
    _check_number("weight_decay", weight_decay, zero=True)
    if scheduler not in ("torch", "timm", "any"):
        raise ApplyError(f"scheduler is 'torch', 'timm' or 'any', found {scheduler!r}")
    loaded, live = load_plan(plan), names.survey(model)
    resolution = resolve(loaded, describer.describe(live, asked=loaded.asks))
    other = applied(live.root)
    if other is not None and not replace:
        raise ApplyError(
            f"the plan {other.plan.title!r} is live on this model",
            notes=["undo() it first, or apply_plan(..., replace=True)"],
        )
    _check_alone(live)
    freeze.check_groups(resolution, lr=lr, weight_decay=weight_decay, scheduler=scheduler)
    phases.check_epochs(resolution.plan.phases, epochs)
    freeze.check_trainable(live, resolution)
    processes.check_wrapped(model, live, resolution)
    before = freeze.remember(live)
    flags = before.requires_grad if other is None else other._before.requires_grad
    for sentence in (*map(_weak, resolution.weak), *_thawed(resolution, flags)):
        warnings.warn(sentence, FreezePlanWarning, stacklevel=2)  # before anything changes: it may be made an error
    freeze.reinitialise(live, resolution, torch.initial_seed())
    if other is not None:
        other.undo()
        before = freeze.remember(live)
    handle = AppliedPlan(
        live.root,
        resolution,
        before,
        lr=lr,
        weight_decay=weight_decay,
        scheduler=scheduler,
        epochs=epochs,
        guard=guard,
    )
    freeze.enter(live, resolution)
    live.root.__dict__[ATTRIBUTE] = handle
    LIVE.add(handle)
    handle._guard.watch(itertools.chain(*live.parameters.values()))
    return handle


def _weak(use: RuleUse) -> str:
    return ": ".join(filter(None, (use.where, use.warning)))


def _thawed(resolution: Resolution, flags: Mapping[str, Sequence[bool]]) -> Iterator[str]:
    """What a catch-all or the default trains although other code had switched its gradient off."""
    found: dict[str, str] = {}
    for part in resolution.parts:
        everything = {use.number: use.text for use in part.uses if use.everything} | {None: "the plan's default"}
        for row in part.trained:
            if row.rule in everything and not any(flags.get(row.name, (True,))):
                by = f"rule {row.rule} ({everything[row.rule]})" if row.rule else everything[None]
                found.setdefault(row.name, by)
    if found:
        name, by = next(iter(found.items()))
        tensors = "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
        yield (
            f"{by} trains {tensors} that had requires_grad=False before, such as {name!r}: if the model fixes "
            f"{'it' if len(found) == 1 else 'them'}, put {{match: {name}, frozen: true}} above"
        )


def _check_alone(live: names.Live) -> None:
    """Refuse a plan beside one that is live on other modules than these, some of which are the same."""
    if not LIVE:
        return
    mine = {id(module): name for name, module in reversed(live.walked)}
    if _overlap(live.root, mine):
        gc.collect()  # a plan on a model that nobody holds any more could not be undone by anybody
    found = _overlap(live.root, mine)
    if found:
        raise ApplyError(found, notes=["undo() it first: each of the two would undo the other's flags and modes"])


def _overlap(model: nn.Module, mine: Mapping[int, str]) -> str:
    """Say which plan is live on a part of a model, on what it is a part of, or on what shares a part with it."""
    for other in list(LIVE):
        held, title = other.model, other.plan.title
        if held is model or held.__dict__.get(ATTRIBUTE) is not other:
            continue
        if id(held) in mine:
            return f"the plan {title!r} is live on {mine[id(held)]!r}, a part of this model"
        name, shared = next(((name, part) for name, part in names.walk(held) if id(part) in mine), ("", None))
        if shared is not None:
            here = "this model" if shared is model else f"{mine[id(shared)]!r} of this model"
            return f"the plan {title!r} is live on {other.resolution.model}, whose part {name!r} is {here}"
    return ""


def _check_number(name: str, value: object, *, zero: bool) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        raise ApplyError(f"{name} is a number {'>=' if zero else '>'} 0, found {value!r}")
