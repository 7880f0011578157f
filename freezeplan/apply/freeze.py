"""Resolution -> flags, modes and optimizer groups of a model: plain functions, the only ones that change it.

Frozen means the same function: parameters *and* buffers are bit-identical afterwards, whatever loop runs. No module is
swapped and no hook is registered: hooks on a subtree are passed by when a model calls its parts in another way
(``forward_intermediates``, gradient checkpointing), a module's own ``training`` flag is not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from freezeplan.errors import ApplyError, ModelError
from freezeplan.model import names
from freezeplan.model.create import fresh_values
from freezeplan.model.sharded import put
from freezeplan.resolve.resolution import Group, Resolution

Scheduler = Literal["torch", "timm", "any"]


class StayInEval:
    """What stands in for ``train`` on a module that must stay in eval.

    It empties timm's caches of derived values, as timm's own ``train`` does, and it can be copied and pickled together
    with the module that it belongs to.
    """

    __slots__ = ("asked", "module", "own", "whole")

    def __init__(self, module: nn.Module, whole: bool):
        self.module = module
        self.own = module.__dict__.get("train")
        """The ``train`` that other code gave this very module, put back when this is taken away; or None."""
        self.whole = whole
        """Whether everything below stays in eval too; otherwise the mode is passed on."""
        self.asked = module.training
        """The mode that was asked for last, and that the module gets when this is taken away."""

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the modes of the module and of what is below, as ``nn.Module.train`` would, and stay in eval."""
        module, self.asked = self.module, mode
        if self.whole:
            _still(module)
        else:
            _train(module, self.own, mode)
            module.training = False
            empty_cache(module)
        return module


def _train(module: nn.Module, own: Any, mode: bool) -> None:
    """Call a module's own ``train`` if other code gave it one, otherwise that of its class."""
    if own is None:
        type(module).train(module, mode)
    else:
        own(mode)


def _still(module: nn.Module) -> None:
    """Do what ``module.train(False)`` does to a module and to all below, in a third of the time; empty their caches."""
    ahead = [module]
    while ahead:
        part = ahead.pop()
        cls: Any = type(part)
        if _plain(cls):
            part.__dict__["training"] = False
        else:
            cls.train(part, False)
            part.training = False
        empty_cache(part)
        if part._modules:
            ahead += [child for child in part._modules.values() if child is not None]


@functools.cache
def _plain(cls: Any) -> bool:
    """Whether a class keeps and sets its mode as ``nn.Module`` does."""
    return cls.train is nn.Module.train and cls.__setattr__ is nn.Module.__setattr__


def empty_cache(module: nn.Module) -> None:
    """Drop what a module derived from its weights and kept (levit's ``attention_bias_cache``); not what is below it."""
    cache = module.__dict__.get("attention_bias_cache")
    if isinstance(cache, dict):
        cache.clear()


@dataclass(frozen=True)
class Before:
    """The flags and modes of a model before a plan was applied, by name."""

    requires_grad: Mapping[str, Sequence[bool]]
    training: Mapping[str, Sequence[bool]]


def enter(live: names.Live, part: Resolution) -> None:
    """Put a model into one phase: flags, gradients and modes. A module that was held in eval gets its mode back."""
    set_flags(live, part)
    let_go(live)
    hold_in_eval(live, part)


def remember(live: names.Live) -> Before:
    """Return the flags and modes of a model, for ``restore``. Changes nothing."""
    return Before(
        {name: [parameter.requires_grad for parameter in found] for name, found in live.parameters.items()},
        {name: [module.training for module in found] for name, found in live.modules.items()},
    )


def restore(live: names.Live, before: Before) -> None:
    """Set flags and modes as they were and clear gradients. Values stay as they are.

    What was added to the model in the meantime keeps its own flags.
    """
    let_go(live)
    for name, parameters in live.parameters.items():
        for parameter, flag in zip(parameters, before.requires_grad.get(name, ()), strict=False):
            parameter.requires_grad_(flag)
        for parameter in parameters:
            parameter.grad = None
    for name, found in live.modules.items():
        for module, training in zip(found, before.training.get(name, ()), strict=False):
            module.training = training
            empty_cache(module)


def check_trainable(live: names.Live, resolution: Resolution) -> None:
    """Refuse to train what torch gives no gradient: whole numbers, and tensors of inference mode.

    Raises:
        ApplyError: Naming the first such tensor that a phase trains.
    """
    for part in resolution.parts:
        for row in part.trained:
            for parameter in live.parameters[row.name]:
                if parameter.is_inference():
                    raise ApplyError(
                        f"{row.name!r} was made under torch.inference_mode() and cannot be trained",
                        notes=["create the model outside of it"],
                    )
                if not (parameter.is_floating_point() or parameter.is_complex()):
                    kind = str(parameter.dtype).removeprefix("torch.")
                    raise ApplyError(
                        f"{row.name!r} holds {kind} numbers, which have no gradient, and the plan trains it",
                        notes=[f"freeze it: put {{match: {row.name}, frozen: true}} above"],
                    )


def set_flags(live: names.Live, resolution: Resolution) -> None:
    """Set ``requires_grad`` of every parameter, and clear the gradient of what is frozen.

    A gradient left behind would move the weight: ``zero_grad(set_to_none=False)`` keeps it alive, and momentum or
    weight decay then act on it.
    """
    for row in resolution.rows:
        for parameter in _lookup(live.parameters, row.name):
            parameter.requires_grad_(not row.frozen)
            if row.frozen:
                parameter.grad = None


def hold_in_eval(live: names.Live, resolution: Resolution) -> None:
    """Put what the resolution holds in eval there, so that ``model.train()`` leaves it there.

    Each largest subtree that is all in eval gets one ``StayInEval``; a module above others in train gets its own.
    """
    modes = resolution.modes
    held = {id(module) for name, found in live.modules.items() if modes[name] == "eval" for module in found}
    mixed: set[int] = set()  # modules that are in train, or hold one that is
    for _, part in reversed(live.walked):  # children come before their parents
        if id(part) not in held or (part._modules and not mixed.isdisjoint(map(id, part._modules.values()))):
            mixed.add(id(part))
    seen: set[int] = set()
    ahead = [live.walked[0][1]]
    while ahead:
        module = ahead.pop()
        seen.add(id(module))
        whole = id(module) not in mixed
        if whole or id(module) in held:
            _hold(module, whole)
        if not whole:
            ahead += (child for child in module._modules.values() if child is not None and id(child) not in seen)


def _hold(module: nn.Module, whole: bool) -> None:
    found = StayInEval(module, whole)
    module.__dict__["train"] = found
    if whole:
        found(module.training)
    else:  # this module alone: the modes below are not changed here
        module.training = False
        empty_cache(module)


def pinned(model: nn.Module) -> set[int]:
    """Return the ``id`` of every module that is held in eval, its own or one above it."""
    found: set[int] = set()
    for module in model.modules():
        here = module.__dict__.get("train")
        if isinstance(here, StayInEval):
            found |= {id(part) for part in (module.modules() if here.whole else (module,))}
    return found


def let_go(live: names.Live) -> None:
    """Let every module go that was held in eval; it gets the mode that was last asked for."""
    for _, module in live.walked:
        found = module.__dict__.get("train")
        if isinstance(found, StayInEval):
            if found.own is None:
                del module.__dict__["train"]
            else:
                module.__dict__["train"] = found.own
            if found.whole:
                module.train(found.asked)
            else:
                module.training = found.asked


def param_groups(
    model: nn.Module, resolution: Resolution, *, lr: float | None, weight_decay: float | None, scheduler: Scheduler
) -> list[dict[str, Any]]:
    """Build the optimizer's groups from the parameters that the model has now.

    Args:
        model: The model.
        resolution: What the plan means for it.
        lr: Base learning rate; None: the groups carry none.
        weight_decay: Base weight decay; None: only groups without decay carry it, as 0.0.
        scheduler: ``torch``: ``lr`` is the base rate times the multiplier. ``timm``: ``lr`` is the base rate and
            ``lr_scale`` the multiplier, which timm's schedulers apply. ``any``: ``lr`` is the base rate, and
            ``AppliedPlan.attach`` multiplies it during each step. Never two of them.

    Returns:
        One dict for each group with ``params``, ``param_names``, ``name``, ``lr_mult``, ``wd_mult``, and what was said
        above.

    Raises:
        ApplyError: If the groups need a base rate or a base decay that was not given, a parameter is gone, or a rate
            differs between phases and the scheduler is not ``any``.
    """
    check_groups(resolution, lr=lr, weight_decay=weight_decay, scheduler=scheduler)
    return [
        _entry(group, named, lr, weight_decay, scheduler)
        for group, named in zip(resolution.groups, trained(model, resolution), strict=True)
    ]


def check_groups(resolution: Resolution, *, lr: float | None, weight_decay: float | None, scheduler: Scheduler) -> None:
    """Refuse what ``param_groups`` cannot say: rates without a base rate, or that change with the phase.

    Raises:
        ApplyError: As ``param_groups`` does.
    """
    changing = [group for group in resolution.groups if not group.constant]
    if changing and scheduler != "any":
        raise ApplyError(
            f"{changing[0].tensors[0]!r} trains at different rates in different phases ({changing[0].name})",
            notes=["this needs apply_plan(..., scheduler='any') and applied.attach(optimizer)"],
        )
    rates = sorted({group.lr_mult for group in resolution.groups})
    if lr is None and scheduler == "torch" and rates != [1.0]:
        raise ApplyError(
            f"this plan trains at {_listed(rates)} times the learning rate, and no lr was given",
            notes=["apply_plan(model, plan, lr=1e-3), or scheduler='timm' with a scheduler of timm"],
        )
    decays = sorted({group.wd_mult for group in resolution.groups} - {0.0, 1.0})
    if weight_decay is None and decays:
        raise ApplyError(
            f"this plan has wd_mult {_listed(decays)}, and no weight_decay was given",
            notes=["apply_plan(model, plan, lr=1e-3, weight_decay=0.05)"],
        )


def trained(model: nn.Module, resolution: Resolution) -> list[list[tuple[str, nn.Parameter]]]:
    """Return, for each of the resolution's groups, the names of its tensors and the parameters that they are now.

    Raises:
        ApplyError: If a parameter is gone.
    """
    live = names.parameters(model)
    return [[(name, p) for name in group.tensors for p in _lookup(live, name)] for group in resolution.groups]


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _entry(
    group: Group,
    named: list[tuple[str, nn.Parameter]],
    lr: float | None,
    weight_decay: float | None,
    scheduler: Scheduler,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "params": [parameter for _, parameter in named],
        "param_names": [name for name, _ in named],
        "name": group.name,
        "lr_mult": group.lr_mult,
        "wd_mult": group.wd_mult,
    }
    if scheduler == "timm":
        entry["lr_scale"] = group.lr_mult
    if lr is not None:
        entry["lr"] = lr * group.lr_mult if scheduler == "torch" else lr
    if group.wd_mult == 0.0:
        entry["weight_decay"] = 0.0
    elif weight_decay is not None:
        entry["weight_decay"] = weight_decay * group.wd_mult
    return entry


def _lookup(live: Mapping[str, list[nn.Parameter]], name: str) -> list[nn.Parameter]:
    if name not in live:
        raise ApplyError(
            f"the parameter {name!r} is no longer in the model", notes=["apply the plan again with replace=True"]
        )
    return live[name]


@torch.no_grad()
def reinitialise(live: names.Live, resolution: Resolution, seed: int) -> None:
    """Give what the plan says ``reinit`` the values of a freshly created model, and its modules' buffers with it.

    What is timm's is created anew (``model.create.fresh_values``). Other modules need ``reset_parameters``, and
    all of their parameters must be asked for.

    Args:
        live: The model as it was looked up; changed in place.
        resolution: Says what.
        seed: Seed; the caller's random state is not touched.

    Raises:
        ModelError: If the fresh model does not fit, or a module cannot be initialised again.
    """
    wanted = {row.name for row in resolution.rows if row.reinit}
    if not wanted:
        return
    old = live.parameters
    new, buffers = fresh_values(live, wanted, seed)
    for name in sorted(wanted):
        fits = name in new and [p.shape for p in new[name]] == [p.shape for p in old[name]]
        if not fits:
            fresh = [tuple(p.shape) for p in new[name]] if name in new else "nothing of that name"
            here = [tuple(p.shape) for p in old[name]]
            raise ModelError(
                f"cannot reinit {name!r}: a fresh {resolution.model} has {fresh}, this model {here}",
                notes=["the model was changed after it was created; say reinit: false for what was changed"],
            )
    for name in sorted(wanted):  # sharded tensors want one order in all processes
        for target, value in zip(old[name], new[name], strict=True):
            put(target, value)
    for name in sorted(row.name for row in resolution.buffers if row.reinit and row.name in buffers):
        for buffer, value_anew in zip(live.buffers[name], buffers[name], strict=True):
            buffer.copy_(value_anew)
