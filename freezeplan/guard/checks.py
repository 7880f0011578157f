"""What other code did to a model or an optimizer since a plan was applied: flags, modes, parameters, gradients.

Each check compares the live model with its Resolution. They run at the first step of an optimizer and between epochs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from freezeplan.apply import freeze
from freezeplan.errors import Problem
from freezeplan.guard import schedulers
from freezeplan.model import describer, names
from freezeplan.resolve.resolution import Resolution

_IS = ("is", "are")
_NO_INF = "'No inf checks were recorded'"
_REPLACED = "load_state_dict(assign=True), to_empty, reset_classifier and fully_shard replace parameters"


@dataclass(frozen=True)
class Multipliers:
    """What the plan multiplies for each live trained parameter, by its ``id``."""

    rates: Mapping[int, float]
    """Its rate, in the phase that holds now."""
    decays: Mapping[int, float]
    """Its weight decay."""


def of_model(
    model: nn.Module,
    part: Resolution,
    stepping: Optimizer | None = None,
    is_new: Callable[[nn.Parameter], bool] = lambda _: False,
) -> list[Problem]:
    """Return what of a model is not as its plan left it.

    Args:
        model: The model, without wrappers.
        part: What the plan means for it in the phase that it is in.
        stepping: The optimizer that is about to step, if one is: loops with several switch off what the others train.
        is_new: Whether a parameter came into the model after the plan was applied.
    """
    held = None if stepping is None else {id(p) for group in stepping.param_groups for p in group["params"]}
    return [*_parameters(model, part, held, is_new), *_modes(model, part), *_reentrant(model, part), *_units(model)]


def _parameters(
    model: nn.Module, part: Resolution, held: set[int] | None, is_new: Callable[[nn.Parameter], bool]
) -> Iterator[Problem]:
    live = names.parameters(model)
    known = {name for row in part.rows for name in (row.name, *row.aliases)}
    advice = (_REPLACED, "apply_plan(..., replace=True) takes the model as it is now")
    lost = [row.name for row in part.rows if row.name not in live]
    if lost:
        yield Problem(f"{_count(lost, 'parameter', _IS)} no longer in the model", notes=advice)
    added = [name for name in live if name not in known]
    if added:
        yield Problem(f"{_count(added, 'parameter')} added to the model after the plan was applied", notes=advice)
    rows = [(row, live[row.name]) for row in part.rows if row.name in live]
    reshaped = [row.name for row, found in rows if row.shape not in [tuple(p.shape) for p in found]]
    if reshaped and not _sharded(model):  # a shard of FullyShardedDataParallel is flat
        yield Problem(
            f"{_count(reshaped, 'parameter', _IS)} of another shape than when the plan was applied", notes=advice
        )
    trained = [(row.name, found) for row, found in rows if row.frozen and any(p.requires_grad for p in found)]
    swapped = [name for name, found in trained if any(p.requires_grad and is_new(p) for p in found)]
    if swapped:
        yield Problem(
            f"{_count(swapped, 'frozen parameter')} replaced after the plan was applied, and what replaced it is "
            "trained",
            notes=("a module that is swapped in brings parameters of its own: swap it, then apply the plan", advice[1]),
        )
    thawed = [name for name, _ in trained if name not in set(swapped)]
    if thawed:
        yield Problem(
            f"{_count(thawed, 'frozen parameter')} set to requires_grad=True by other code",
            notes=("nothing but the plan should set it: a phase thaws what it names",),
        )
    stopped = [
        row.name
        for row, found in rows
        if not row.frozen
        and not all(
            p.requires_grad or not p.is_floating_point() or (held is not None and id(p) not in held) for p in found
        )
    ]
    if stopped:
        yield Problem(
            f"{_count(stopped, 'trained parameter')} set to requires_grad=False by other code",
            notes=("they learn nothing; freeze them in the plan if that is meant",),
        )
    stale = [row.name for row, found in rows if row.frozen and any(p.grad is not None for p in found)]
    if stale:
        yield Problem(
            f"{_count(stale, 'frozen parameter')} left with a gradient by other code",
            notes=("an optimizer that holds them would move them, also with a gradient of zeros; set .grad = None",),
        )


def _modes(model: nn.Module, part: Resolution) -> Iterator[Problem]:
    held = {
        name: [module for module in found if names.unwrap(module) is module]
        for name, found in names.modules(model).items()
        if part.modes.get(name) == "eval"
    }
    switched = [name for name, found in held.items() if any(module.training for module in found)]
    pinned = freeze.pinned(model)
    loose = [name for name, found in held.items() if any(id(module) not in pinned for module in found)]
    if loose:
        yield Problem(
            f"{_count(loose, 'module', _IS)} no longer held in eval",
            notes=(
                "replaced after the plan was applied, by convert_sync_batchnorm for one; apply the plan after that",
            ),
        )
    elif switched:
        yield Problem(
            f"{_count(switched, 'frozen module')} put in train by hand",
            notes=("model.train() leaves them in eval; .training = True does not: statistics and dropout come alive",),
        )


def _reentrant(model: nn.Module, part: Resolution) -> Iterator[Problem]:
    """Reentrant checkpointing gives no gradient to a segment whose input needs none: one behind a frozen prefix."""
    found, first = describer.reentrant(model), next(iter(part.trained), None)
    if not found or first is None:
        return
    description = describer.describe(model)
    if first.name in description.roles.get("head", ()):
        return
    if part.rows[0].frozen and description.stages.get(first.name, 1) > 0:
        yield Problem(
            f"{found} checkpoints with use_reentrant=True behind a frozen prefix: {first.name!r} and what else is in "
            "its segment get no gradient, without an error",
            notes=(describer.reentrant_advice(model),),
        )


def _sharded(model: nn.Module) -> dict[str, nn.Module]:
    """The units of FullyShardedDataParallel, by name."""
    return {
        name: module for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel"
    }


def _units(model: nn.Module) -> Iterator[Problem]:
    """The units of FullyShardedDataParallel that hold frozen and trained parameters in one flat one."""
    units = _sharded(model)
    mixed = []
    for name, unit in units.items():
        inner = {
            id(p) for other in units.values() if other is not unit and _inside(other, unit) for p in other.parameters()
        }
        if len({p.requires_grad for p in unit.parameters() if id(p) not in inner}) > 1:
            mixed.append(name or "the model itself")
    if mixed:
        yield Problem(
            f"{_count(mixed, 'FullyShardedDataParallel unit', _IS)} of frozen and trained parameters",
            notes=("wrap what is frozen and what is trained as units of their own, or use fully_shard",),
        )


def _inside(module: nn.Module, above: nn.Module) -> bool:
    return any(module is part for part in above.modules())


def of_optimizers(
    model: nn.Module,
    resolution: Resolution,
    optimizers: Sequence[Optimizer],
    multipliers: Multipliers,
    kind: str,
    *,
    all_known: bool,
    stepping: bool,
) -> list[Problem]:
    """Return what is wrong between a model, its plan and the optimizers that train it together.

    Args:
        model: The model, without wrappers.
        resolution: What the plan means for it, in all phases.
        optimizers: Those that train it.
        multipliers: Those of what is trained, now.
        kind: For whom the plan was applied: ``torch``, ``timm`` or ``any``.
        all_known: Whether these are all, so that what is trained must be in one of them.
        stepping: Whether it is about to step.
    """
    if not optimizers:
        return []
    problems = [*_held(model, resolution, optimizers, all_known=all_known)]
    trainable = {id(parameter) for named in freeze.trained(model, resolution) for _, parameter in named}
    for optimizer in optimizers:
        title = type(optimizer).__name__
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p.requires_grad or id(p) in trainable for p in held):
            problems.append(
                Problem(
                    f"{title} holds no parameter that any phase trains: it does nothing, and under a GradScaler its "
                    f"step would stop with {_NO_INF}",
                    notes=("make it from applied.param_groups",),
                )
            )
        elif not any(p.requires_grad for p in held) and _scaler_is_live():
            problems.append(
                Problem(
                    f"{title} holds no parameter that is trained now: GradScaler.step(optimizer) would stop with "
                    f"{_NO_INF}",
                    notes=("leave it out of the loop until a phase trains what it holds",),
                )
            )
        flattened = schedulers.fault(optimizer, multipliers.rates, kind, stepping=stepping)
        decayed = schedulers.decay_fault(optimizer, multipliers.decays)
        problems += [found for found in (flattened, decayed) if found is not None]
    return problems


def _scaler_is_live() -> bool:
    """Whether an enabled GradScaler is anywhere; slow, so only asked where it decides."""
    return any(issubclass(type(found), GradScaler) and found.is_enabled() for found in gc.get_objects())


def _held(
    model: nn.Module, resolution: Resolution, optimizers: Sequence[Optimizer], *, all_known: bool
) -> Iterator[Problem]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    called = {name for group in groups for name in group.get("param_names", ())}
    trained = freeze.trained(model, resolution)
    missing = [name for named in trained for name, parameter in named if id(parameter) not in held]
    replaced = [name for name in missing if name in called]
    if replaced:
        yield Problem(
            f"{_count(replaced, 'trained parameter')} replaced after the optimizer was made: it trains others",
            notes=(_REPLACED, "make the optimizer from applied.param_groups after that"),
        )
    elif missing and all_known:
        yield Problem(
            f"{_count(missing, 'trained parameter', _IS)} in no optimizer",
            notes=("make it from applied.param_groups; of several, check all: applied.check(first, second)",),
        )
    live = names.parameters(model)
    frozen = [row.name for row in resolution.always_frozen if any(id(p) in held for p in live.get(row.name, ()))]
    if frozen:
        yield Problem(
            f"{_count(frozen, 'frozen parameter', _IS)} in an optimizer",
            notes=(
                "it would move them by momentum or weight decay as soon as they have a gradient, also one of zeros",
                "make it from applied.param_groups, not from model.parameters()",
            ),
        )


def _count(found: Sequence[str], noun: str, verb: tuple[str, str] = ("was", "were")) -> str:
    """``2 frozen parameters, such as 'conv1.weight', were``."""
    if len(found) == 1:
        return f"1 {noun}, {found[0]!r}, {verb[0]}"
    return f"{len(found)} {noun}s, such as {found[0]!r}, {verb[1]}"
