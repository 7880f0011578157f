"""Plan x model description -> Resolution. Pure: names and shapes in, rows out; no torch.

Three sentences, three errors. For each setting, the first matching rule that sets it wins. Every parameter gets a rate.
Every rule wins something somewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from freezeplan.errors import PlanError
from freezeplan.model.description import Description
from freezeplan.plan.fields import Mode
from freezeplan.plan.schema import Plan
from freezeplan.resolve.decide import Decided, decide
from freezeplan.resolve.hints import find_hints
from freezeplan.resolve.problems import find_problems
from freezeplan.resolve.resolution import BufferRow, Resolution, Row, RuleUse


def resolve(plan: Plan, model: Description) -> Resolution:
    """Decide for every tensor and every module of a model what the plan does to it.

    Args:
        plan: The plan.
        model: Names, shapes, classes and roles; ``freezeplan.model.describer.describe`` makes it.

    Returns:
        The decisions. Nothing is changed.

    Raises:
        PlanError: With all problems at once: a rule that matches nothing (not ``optional``) or is shadowed, a role that
            is not known for this model, a parameter without a rate, ``eval`` against ``train`` in one module, nothing
            left to train in some phase, or ``wd_mult`` or ``reinit`` that differs between phases.
    """
    parts = tuple(decide(part, model) for part in plan.parts)
    if problems := find_problems(plan, model, parts):
        raise PlanError(problems)
    views = [_view(part, model) for part in parts]
    if not plan.phases:
        return _with_warnings(views[0], views[0].weak)
    _check_lasting(plan, views)
    named = [replace(view, phase=phase.name) for view, phase in zip(views, plan.phases, strict=True)]
    weak = replace(named[0], plan=plan, phases=tuple(named)).weak
    phases = tuple(_with_warnings(view, weak) for view in named)
    unplaced = tuple(dict.fromkeys(name for view in views for name in view.unplaced))
    return replace(phases[0], plan=plan, phases=phases, unplaced=unplaced)


def _with_warnings(part: Resolution, weak: Sequence[RuleUse]) -> Resolution:
    return replace(part, hints=(*(use.warning for use in part.uses if use in weak), *part.hints))


def _view(part: Decided, model: Description) -> Resolution:
    """What one phase means, where nothing is wrong with it."""
    plan, decided_by, uses = part.plan, part.decided_by, part.uses
    modes_by_rule = {module: mode for module, wanted in part.modes.items() for mode in wanted}
    decided = {name: rate for name, rate in part.rates.items() if rate is not None}
    frozen = frozenset(name for name, (is_frozen, _) in decided.items() if is_frozen)
    modes = _modes(model, frozen, modes_by_rule)
    _check_caches(plan, model, frozen, modes)

    exempt = model.no_decay if plan.weight_decay == "timm" else frozenset()
    wd_mult = {name: plan.rules[index].wd_mult or 0.0 for name, index in decided_by["wd_mult"].items()}
    reinit = {name: bool(plan.rules[index].reinit) for name, index in decided_by["reinit"].items()}
    decays = {
        tensor.name: plan.layer_decay if index is None else plan.rules[index].layer_decay
        for tensor in model.tensors
        if (index := decided_by["layer_decay"].get(tensor.name)) is not None or plan.layer_decay is not None
    }
    rows = tuple(
        Row(
            name=tensor.name,
            shape=tensor.shape,
            frozen=tensor.name in frozen,
            lr_mult=_decayed(plan, model, tensor.name, decided[tensor.name][1], decays.get(tensor.name)),
            wd_mult=0.0 if tensor.name in exempt else wd_mult.get(tensor.name, 1.0),
            mode=modes[tensor.module],
            reinit=reinit.get(tensor.name, False),
            rule=None if (index := decided_by["rate"].get(tensor.name)) is None else index + 1,
            aliases=tensor.aliases,
            layer_decay=decays.get(tensor.name),
        )
        for tensor in model.tensors
    )
    trained = {row.name: row.lr_mult for row in rows if row.lr_mult is not None}
    return Resolution(
        plan=plan,
        model=model.model,
        rows=rows,
        modes=modes,
        uses=uses,
        buffers=tuple(_buffers(model, modes, frozenset(name for name, anew in reinit.items() if anew))),
        timm_parts={part.name: part.architecture for part in model.parts if part.name},
        hints=tuple(find_hints(plan, model, trained, frozen, modes)),
        random=tuple(
            f"{m.name or model.model}: {m.random}" for m in model.modules if m.random and modes[m.name] == "train"
        ),
        exponents=model.exponents if plan.decays else {},
        unplaced=model.unplaced if plan.decays or any(rule.stage for rule in plan.rules) else (),
        alive=tuple(
            name
            for name, mode in modes_by_rule.items()
            if mode == "train" and (own := model.own[name]) and frozen.issuperset(own)
        ),
    )


def _decayed(plan: Plan, model: Description, name: str, lr_mult: float | None, decay: float | None) -> float | None:
    """The rate times ``layer_decay`` to the power of the layers behind, by timm's arithmetic."""
    if lr_mult is None or decay is None:
        return lr_mult
    return lr_mult * max(plan.layer_decay_min_scale or 0.0, decay ** model.exponents[name])


def _buffers(model: Description, modes: Mapping[str, Mode], anew: frozenset[str]) -> Iterator[BufferRow]:
    """Every buffer; with the tensors that start anew do those that belong to them alone."""
    for name, owner in model.buffers.items():
        module = owner if anew else ""
        while module and not model.below[module]:
            module = module.rpartition(".")[0]
        yield BufferRow(name, modes[owner] == "eval", bool(module) and model.below[module] <= anew)


def _check_lasting(plan: Plan, parts: Sequence[Resolution]) -> None:
    """Refuse phases that disagree on what is settled once: decay stands in the groups, values are drawn at first."""
    for rows in zip(*(part.rows for part in parts), strict=True):
        for setting in ("wd_mult", "reinit"):
            found = {getattr(row, setting) for row in rows}
            if len(found) > 1:
                raise PlanError(
                    f"{setting} of {rows[0].name!r} differs between phases: {', '.join(map(str, sorted(found)))}",
                    where=plan.source.where(("phases",)),
                    notes=[f"{setting} is settled once, for all phases: say it in the plan's own rules"],
                )


def _modes(model: Description, frozen: frozenset[str], decided: Mapping[str, Mode]) -> dict[str, Mode]:
    """Every module's mode while the model trains; see the module rules in the order written here."""
    modes: dict[str, Mode] = {}
    any_below, trained_below, own = _above(model, frozenset()), _above(model, frozen), model.own
    for module in model.modules:  # parents come before their children
        name = module.name
        if name in decided:
            mode = decided[name]
        elif owned := own[name]:
            mode = "eval" if frozen.issuperset(owned) else "train"
        elif name in any_below:
            mode = "train" if name in trained_below else "eval"
        else:
            mode = modes.get(name.rpartition(".")[0], "train")
        modes[name] = mode
        for alias in module.aliases:
            modes[alias] = mode
    return modes


def _above(model: Description, frozen: frozenset[str]) -> set[str]:
    """The modules that own, or stand above, a tensor that is not frozen, under any of its names."""
    found: set[str] = set()
    own = {tensor.module for tensor in model.tensors if tensor.name not in frozen}
    further = [tensor.aliases for tensor in model.tensors if tensor.aliases and tensor.name not in frozen]
    for above in own.union(name.rpartition(".")[0] for name in itertools.chain(*further)):
        while above not in found:  # what stands above it is there already
            found.add(above)
            above = above.rpartition(".")[0]
    return found


def _check_caches(plan: Plan, model: Description, frozen: frozenset[str], modes: Mapping[str, Mode]) -> None:
    """Refuse eval where a module would keep a stale copy of what it trains (timm's ``attention_bias_cache``)."""
    stale = [
        module.name
        for module in model.modules
        if module.caches and modes[module.name] == "eval" and not frozen.issuperset(model.own[module.name])
    ]
    if stale:
        raise PlanError(
            f"module {stale[0]!r} caches its trained attention biases while in eval; it cannot train there",
            where=plan.source.where(("rules",)),
            notes=["leave it in train: select norms alone with {role: norm, mode: eval}"],
        )
