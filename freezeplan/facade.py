"""``apply_plan`` and ``AppliedPlan``: the facade over all that touches a model. It keeps names, never tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from freezeplan import apply, guard, names, zoo
from freezeplan.errors import ApplyError, FreezePlanWarning
from freezeplan.load import PlanLike, load_plan
from freezeplan.plan import Plan
from freezeplan.resolve import Resolution, resolve

_ATTRIBUTE = "_freezeplan"


def resolve_plan(plan: PlanLike, model: nn.Module) -> Resolution:
    """Check a plan against a model and say what it means, tensor by tensor. Changes nothing.

    Args:
        plan: A Plan, a dict, a path or a preset's name.
        model: Any module, also on the meta device; the role ``head`` needs a timm model.

    Returns:
        For each tensor its rate, decay, mode and the rule that decided; each rule's counts; hints.

    Raises:
        PlanError: With all problems at once: see ``freezeplan.resolve.resolve``.

    Examples:
        >>> from freezeplan.zoo import create_model
        >>> resolution = resolve_plan("voc_vgg16/frozen_convs", create_model("vgg16", num_classes=20, meta=True))
        >>> len(resolution.frozen), sum(row.elements for row in resolution.frozen)
        (26, 14714688)
    """
    return resolve(load_plan(plan), zoo.describe(model))


def apply_plan(
    model: nn.Module,
    plan: PlanLike,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    scheduler: apply.Scheduler = "torch",
    replace: bool = False,
) -> AppliedPlan:
    """Freeze and train the parameters of a model as a plan says.

    The model is changed in place: ``requires_grad`` of each parameter; the gradient of what is frozen is cleared; what
    is frozen is put in eval and stays there through ``model.train()``, so that statistics, dropout and drop-path stand
    still; what says ``reinit`` gets new values. No module is swapped and nothing is hashed or copied.

    Args:
        model: Any module; the role ``head`` needs a timm model.
        plan: A Plan, a dict, a path or a preset's name.
        lr: Base learning rate, in the optimizer's units, greater than 0. None: the groups carry no ``lr``; right where
            every multiplier is 1 or with ``scheduler="timm"``.
        weight_decay: Base weight decay, 0 or greater. None: a group carries ``weight_decay`` only where its factor is 0
            and inherits the optimizer's otherwise.
        scheduler: Who multiplies. ``torch``: the multiplier is in the group's ``lr``; right for schedulers that
            multiply. ``timm``: it is in ``lr_scale``, which timm's schedulers apply (and nothing else does).
        replace: Undo the plan that is live on this model first.

    Returns:
        The applied plan. It iterates over its groups, so an optimizer takes it directly.

    Raises:
        PlanError: If the plan is not valid or does not fit the model.
        ApplyError: If another plan is live on the model, or ``lr`` or ``weight_decay`` is needed and missing.
        ModelError: If ``reinit`` is asked for and the model cannot be created anew.

    Warns:
        FreezePlanWarning: Where a rule that is no catch-all decided less than half of what it matched.

    Examples:
        >>> from freezeplan.zoo import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
        >>> optimizer = torch.optim.AdamW(apply_plan(model, plan, lr=1e-3), weight_decay=0.05)
        >>> [(group["name"], group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [('lr_mult=1', ['fc.weight'], 0.05), ('lr_mult=1, no decay', ['fc.bias'], 0.0)]
        >>> model.train().layer1.training
        False
    """
    _check_number("lr", lr, minimum=0, allowed=False)
    _check_number("weight_decay", weight_decay, minimum=0, allowed=True)
    if scheduler not in ("torch", "timm"):
        raise ApplyError(f"scheduler is 'torch' or 'timm', found {scheduler!r}")
    inner = names.unwrap(model)
    resolution = resolve_plan(plan, inner)
    live = applied(inner)
    if live is not None and not replace:
        raise ApplyError(
            f"the plan {live.plan.title!r} is live on this model",
            notes=["undo() it first, or apply_plan(..., replace=True)"],
        )
    apply.param_groups(
        inner, resolution, lr=lr, weight_decay=weight_decay, scheduler=scheduler
    )  # refuse before changing
    apply.reinitialise(inner, resolution, torch.initial_seed())
    if live is not None:
        live.undo()
    handle = AppliedPlan(inner, resolution, lr=lr, weight_decay=weight_decay, scheduler=scheduler)
    apply.set_flags(inner, resolution)
    apply.pin(inner, resolution)
    inner.__dict__[_ATTRIBUTE] = handle
    for use in resolution.uses:
        if use.weak:
            message = f"rule {use.number} ({use.text}) matched {use.matched} tensors and decided {use.decided}"
            warnings.warn(": ".join(filter(None, (use.where, message))), FreezePlanWarning, stacklevel=2)
    return handle


def applied(model: nn.Module) -> AppliedPlan | None:
    """Return the plan that is live on a model, or None.

    Examples:
        >>> applied(nn.Linear(2, 2)) is None
        True
    """
    found = names.unwrap(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, AppliedPlan) else None


class AppliedPlan:
    """A plan that is live on a model. ``apply_plan`` makes it.

    It iterates over the optimizer's groups, and as a context manager undoes the plan at the end. Parameters are looked
    up by name at each use, never kept.

    Examples:
        >>> from freezeplan.zoo import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> plan = {"version": 1, "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
        >>> with apply_plan(model, plan) as live:
        ...     live.seal()
        ...     print(live.verify(), sum(p.requires_grad for p in model.parameters()))
        held: 90 frozen tensors and buffers are bit-identical 2
        >>> all(p.requires_grad for p in model.parameters()), applied(model)
        (True, None)
    """

    def __init__(
        self,
        model: nn.Module,
        resolution: Resolution,
        *,
        lr: float | None,
        weight_decay: float | None,
        scheduler: apply.Scheduler,
    ):
        self.model = model
        """The model, without wrappers."""
        self.resolution = resolution
        """What the plan means for it, tensor by tensor."""
        self._lr, self._weight_decay, self._scheduler = lr, weight_decay, scheduler
        self._before = apply.remember(model)
        self._seal: guard.Seal | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.resolution.plan

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Fresh groups for an optimizer, of the parameters that the model has now.

        Each has ``params``, ``param_names``, ``name``, ``lr_mult``, and ``lr``, ``weight_decay``, ``lr_scale`` as
        ``apply_plan`` says. Frozen parameters are in none.
        """
        self._check_live()
        return apply.param_groups(
            self.model, self.resolution, lr=self._lr, weight_decay=self._weight_decay, scheduler=self._scheduler
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.param_groups)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters, for ``torch.nn.utils.clip_grad_norm_``."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def seal(self, *, copy: bool = False) -> None:
        """Store digests (sha256) of what is frozen, parameters and buffers, for ``verify``.

        Args:
            copy: Keep the values too, so that ``verify`` can say by how much something moved; costs their memory.
        """
        self._check_live()
        self._seal = guard.take_seal(self.model, self.resolution, copy=copy)

    def verify(self) -> guard.Verification:
        """Compare what is frozen with the seal, bit by bit.

        Returns:
            True in a condition if everything held; otherwise it names what moved and the likely cause.

        Raises:
            ApplyError: If there is no seal.
        """
        if self._seal is None:
            raise ApplyError("nothing to compare with: no seal was taken", notes=["call seal() before training"])
        return guard.compare(self.model, self.resolution, self._seal)

    def undo(self) -> None:
        """Give the model back its flags and modes, take the pins away, clear gradients. Values stay. Twice is once."""
        if applied(self.model) is self:
            apply.restore(self.model, self._before)
            del self.model.__dict__[_ATTRIBUTE]

    def __enter__(self) -> AppliedPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        frozen, trained = len(self.resolution.frozen), len(self.resolution.trained)
        return (
            f"<AppliedPlan {self.plan.title!r} on {self.resolution.model}: {frozen} tensors frozen, {trained} trained>"
        )

    def _check_live(self) -> None:
        if applied(self.model) is not self:
            raise ApplyError(f"the plan {self.plan.title!r} is no longer live on this model: it was undone or replaced")


def _check_number(name: str, value: object, *, minimum: float, allowed: bool) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum or (value == minimum and not allowed):  # type: ignore[operator]
        raise ApplyError(f"{name} is a number {'>=' if allowed else '>'} {minimum:g}, found {value!r}")
