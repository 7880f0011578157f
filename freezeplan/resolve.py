"""Plan x model description -> Resolution. Pure: names and shapes in, rows out; no torch.

Three sentences, three errors. For each setting, the first matching rule that sets it wins. Every parameter gets a rate.
Every rule wins something somewhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from freezeplan.description import Description
from freezeplan.errors import PlanError, Problem, did_you_mean
from freezeplan.hints import find_hints
from freezeplan.patterns import SlowPatternError
from freezeplan.plan import SELECTORS, Mode, Plan, Rule
from freezeplan.resolution import Resolution, Row, RuleUse
from freezeplan.select import ROOT_NOTE, Selection, explain_miss, match_types, names_root, select


def resolve(plan: Plan, model: Description) -> Resolution:
    """Decide for every tensor and every module of a model what the plan does to it.

    Args:
        plan: The plan.
        model: Names, shapes, classes and roles; ``freezeplan.zoo.describe`` makes it.

    Returns:
        The decisions. Nothing is changed.

    Raises:
        PlanError: With all problems at once: a rule that matches nothing (not ``optional``) or is shadowed, a role that
            is not known for this model, a parameter without a rate, ``eval`` against ``train`` in one module, nothing
            left to train in some phase, or ``wd_mult`` or ``reinit`` that differs between phases.
    """
    _check_known(plan, model)
    parts = tuple(_decide(part, model) for part in plan.parts)
    problems: list[Problem] = []
    for number, part in enumerate(parts):
        own = len(plan.phases[number].rules) if plan.phases else 0
        problems += [problem for index, problem in part.unused.items() if index < own]
    problems += _unused_in_all(plan, parts)
    problems += [problem for part in parts for problem in part.problems]
    # Where a rule is dead or shadowed, what it would have trained is not known: that is said first.
    if problems := problems or list(_idle(plan, model, parts)):
        raise PlanError(dict.fromkeys(problems))
    views = [part.view() for part in parts]
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


@dataclass(frozen=True)
class _Decided:
    """One part of a plan on a model: what is wrong with it, and what it means if nothing is."""

    problems: tuple[Problem, ...]
    unused: Mapping[int, Problem]
    """Index of a rule that decides nothing -> what to say of it."""
    trains: bool
    """Whether anything is left to train."""
    view: Callable[[], Resolution]


def _unused_in_all(plan: Plan, parts: Sequence[_Decided]) -> Iterator[Problem]:
    """The plan's own rules that decide nothing in any phase."""
    offsets = [len(phase.rules) for phase in plan.phases] or [0]
    for index in range(len(plan.rules)):
        found = [part.unused.get(offset + index) for part, offset in zip(parts, offsets, strict=True)]
        if found[-1] is not None and all(found):
            yield found[-1]


def _idle(plan: Plan, model: Description, parts: Sequence[_Decided]) -> Iterator[Problem]:
    """The parts that leave nothing to train."""
    for number, part in enumerate(parts):
        if not part.trains:
            phase = f" in phase {plan.phases[number].name!r}" if plan.phases else ""
            yield Problem(
                f"every parameter of {model.model} is frozen{phase}; nothing is left to train",
                plan.source.where(("phases", number) if plan.phases else ("rules",)),
                ("give what shall learn a rule above, such as {role: head, lr_mult: 1}",),
            )


def _select(plan: Plan, index: int, model: Description) -> Selection:
    try:
        return select(plan.rules[index], model)
    except SlowPatternError as error:
        (problem,) = error.problems
        raise SlowPatternError(replace(problem, where=plan.source.where(("rules", index)))) from None


def _decide(plan: Plan, model: Description) -> _Decided:
    """Decide one part of a plan, without phases."""
    selections = [_select(plan, index, model) for index in range(len(plan.rules))]
    winners = {
        setting: _first(
            selection.tensors if setting in rule.settings else ()
            for rule, selection in zip(plan.rules, selections, strict=True)
        )
        for setting in ("rate", "wd_mult", "mode", "reinit")
    }
    module_rules = _first(selection.modules for selection in selections)
    uses = tuple(_uses(plan, model, selections, winners, module_rules))
    said = {index: _rate(plan, index) for index in (None, *range(len(plan.rules)))}
    rates = {tensor.name: said[winners["rate"].get(tensor.name)] for tensor in model.tensors}
    unused = dict(_unused(plan, model, selections, uses))
    problems = [*_uncovered(plan, rates), *_overlaps(plan, selections)]
    modes_by_rule, conflicts = _decided_modes(plan, model, winners["mode"], module_rules)
    return _Decided(
        problems=(*problems, *conflicts),
        unused=unused,
        trains=any(not frozen for frozen, _ in filter(None, rates.values())),
        view=lambda: _view(plan, model, winners, rates, modes_by_rule, uses),
    )


def _view(
    plan: Plan,
    model: Description,
    winners: Mapping[str, Mapping[str, int]],
    rates: Mapping[str, tuple[bool, float | None] | None],
    modes_by_rule: Mapping[str, Mode],
    uses: tuple[RuleUse, ...],
) -> Resolution:
    decided = {name: rate for name, rate in rates.items() if rate is not None}
    frozen = frozenset(name for name, (is_frozen, _) in decided.items() if is_frozen)
    modes = _modes(model, frozen, modes_by_rule)
    _check_caches(plan, model, frozen, modes)

    exempt = model.no_decay if plan.weight_decay == "timm" else frozenset()
    wd_mult = {name: plan.rules[index].wd_mult or 0.0 for name, index in winners["wd_mult"].items()}
    reinit = {name: bool(plan.rules[index].reinit) for name, index in winners["reinit"].items()}
    rows = tuple(
        Row(
            name=tensor.name,
            shape=tensor.shape,
            frozen=tensor.name in frozen,
            lr_mult=_decayed(plan, model, tensor.name, decided[tensor.name][1]),
            wd_mult=0.0 if tensor.name in exempt else wd_mult.get(tensor.name, 1.0),
            mode=modes[tensor.module],
            reinit=reinit.get(tensor.name, False),
            rule=None if (index := winners["rate"].get(tensor.name)) is None else index + 1,
            aliases=tensor.aliases,
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
        hints=tuple(find_hints(plan, model, trained, frozen)),
        random=tuple(
            f"{m.name or model.model}: {m.random}" for m in model.modules if m.random and modes[m.name] == "train"
        ),
        exponents=model.exponents if plan.layer_decay else {},
        unplaced=model.unplaced if plan.layer_decay or any(rule.stage for rule in plan.rules) else (),
        alive=tuple(
            name
            for name, mode in modes_by_rule.items()
            if mode == "train" and (own := model.own[name]) and frozen.issuperset(own)
        ),
    )


def _first(claimed: Iterable[Sequence[str]]) -> dict[str, int]:
    """Name -> index of the first rule that claims it, of what each rule claims in the plan's order."""
    winners: dict[str, int] = {}
    for index, names in reversed(list(enumerate(claimed))):  # so the first is written last
        winners |= dict.fromkeys(names, index)
    return winners


def _rate(plan: Plan, index: int | None) -> tuple[bool, float | None] | None:
    """(frozen, lr_mult) as the winning rule or the plan's default says, or None where neither does."""
    rate = plan.default if index is None else plan.rules[index]
    return None if rate is None else (bool(rate.frozen), rate.lr_mult)


def _decayed(plan: Plan, model: Description, name: str, lr_mult: float | None) -> float | None:
    """The rate times ``layer_decay`` to the power of the layers behind, by timm's arithmetic."""
    if lr_mult is None or plan.layer_decay is None:
        return lr_mult
    return lr_mult * max(plan.layer_decay_min_scale or 0.0, plan.layer_decay ** model.exponents[name])


def _uses(
    plan: Plan,
    model: Description,
    selections: Sequence[Selection],
    winners: Mapping[str, Mapping[str, int]],
    module_rules: Mapping[str, int],
) -> Iterator[RuleUse]:
    for index, (rule, selection) in enumerate(zip(plan.rules, selections, strict=True)):
        lost: Sequence[str] = selection.tensors
        for setting in rule.settings:
            lost = [name for name in lost if winners[setting][name] != index]
        takers = Counter(winners[rule.settings[0]][name] + 1 for name in lost)
        yield RuleUse(
            number=index + 1,
            text=rule.text,
            where=plan.source.where(("rules", index)),
            decided=len(selection.tensors) - len(lost),
            modules=sum(module_rules.get(name) == index for name in selection.modules),
            takers=tuple(takers.most_common()),
            everything=len(selection.tensors) == len(model.tensors),
            settings=rule.settings,
            tensors=selection.tensors,
        )


def _check_known(plan: Plan, model: Description) -> None:
    """Refuse what a plan asks of a model that nobody knows of it: roles, stages, the order of layers."""
    problems: list[Problem] = []
    for loc, rule in plan.placed:
        problems += [
            Problem(f"role {role} is not known: {model.unknown[role]}", plan.source.where((*loc, "role")))
            for role in rule.role or ()
            if role in model.unknown
        ]
        if rule.stage and "stage" in model.unknown:
            problems.append(Problem(model.unknown["stage"], plan.source.where((*loc, "stage"))))
    if plan.layer_decay is not None and "layer_decay" in model.unknown:
        problems.append(Problem(model.unknown["layer_decay"], plan.source.where(("layer_decay",))))
    if problems:
        raise PlanError(problems)


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


def _unused(
    plan: Plan, model: Description, selections: Sequence[Selection], uses: Sequence[RuleUse]
) -> Iterator[tuple[int, Problem]]:
    for index, (rule, selection, use) in enumerate(zip(plan.rules, selections, uses, strict=True)):
        if use.decided or use.modules or (rule.optional and not selection.tensors):
            continue
        reaches_modules = rule.settings == ("mode",) and selection.modules
        if not selection.tensors and not reaches_modules:
            yield index, _dead(plan, model, index, rule)
        else:
            above = ", ".join(
                f"rule {number}{plan.source.line(('rules', number - 1))} ({count})" for number, count in use.takers
            )
            yield (
                index,
                Problem(
                    f"rule {index + 1} ({rule.text}) decides nothing: "
                    + (
                        f"all {use.matched} tensors that it matches are decided by {above}"
                        if above
                        else "rules above it do"
                    ),
                    use.where,
                    ("the first matching rule wins: move this one up, or delete it",),
                ),
            )


def _dead(plan: Plan, model: Description, index: int, rule: Rule) -> Problem:
    what = f"rule {index + 1} ({rule.text}) matches no parameter of {model.model}"
    given = [key for key in SELECTORS if getattr(rule, key) is not None]
    alone = {key: rule.model_copy(update=dict.fromkeys(set(given) - {key})) for key in given}
    empty = [key for key in given if not select(alone[key], model).tensors]
    notes: list[str] = []
    for pattern in (rule.match or ()) if "match" in empty else ():
        notes += explain_miss(pattern, model)
    if rule.stage or "stem" in (rule.role or ()):
        stem = "a stem (stage 0)" if 0 in model.stages.values() else "no stem"
        notes.append(f"{model.model} has {stem} and {model.last_stage} stages")
    if rule.type and not match_types(rule.type, model):
        classes = {name for module in model.modules if module.name for name in module.types}
        owners = sorted({module.types[0] for module in model.modules if model.own[module.name]})
        notes += (
            [ROOT_NOTE.format(pattern) for pattern in rule.type if names_root([pattern], model)]
            or [note for pattern in rule.type for note in did_you_mean(pattern, classes)]
            or [f"classes of {model.model}: {', '.join(owners)}"]
        )
    if not empty:
        notes.append(f"{' and '.join(given)} select something each, and nothing together")
    notes.append("a rule that need not match on every model says optional: true")
    return Problem(what, plan.source.where(("rules", index, (empty or given)[0])), tuple(dict.fromkeys(notes)))


def _overlaps(plan: Plan, selections: Sequence[Selection]) -> Iterator[Problem]:
    """Under ``overlap: error``: pairs of rules that set the same thing on the same tensors."""
    if plan.overlap == "first":
        return
    selected = [frozenset(selection.tensors) for selection in selections]
    for late, below in enumerate(plan.rules):
        for early, above in enumerate(plan.rules[:late]):
            shared = [name for name in selections[late].tensors if name in selected[early]]
            both = [setting for setting in below.settings if setting in above.settings]
            if shared and both:
                yield Problem(
                    f"rules {early + 1} ({above.text}) and {late + 1} ({below.text}) both set {both[0]} "
                    f"on {len(shared)} tensors, such as {shared[0]!r}",
                    plan.source.where(("rules", late)),
                    ("overlap: error allows no such pair; narrow one of them, or say overlap: first",),
                )


def _uncovered(plan: Plan, rates: Mapping[str, object]) -> Iterator[Problem]:
    left = [name for name, rate in rates.items() if rate is None]
    if left:
        shown = ", ".join(map(repr, left[:3])) + (", ..." if len(left) > 3 else "")
        yield Problem(
            f"{len(left)} parameter{'s' * (len(left) > 1)} get{'s' * (len(left) == 1)} no rate: {shown}",
            plan.source.where(("rules",)),
            ("end the rules with a catch-all such as {match: .*, frozen: true}, or give the plan a default",),
        )


def _decided_modes(
    plan: Plan, model: Description, tensor_rules: Mapping[str, int], module_rules: Mapping[str, int]
) -> tuple[dict[str, Mode], list[Problem]]:
    """Module -> the mode that a rule gives it; and the modules for which two rules disagree."""
    modes: dict[str, Mode] = {}
    problems: list[Problem] = []
    if not tensor_rules and not module_rules:
        return modes, problems
    for module in model.modules:
        deciding = {tensor_rules[name] for name in model.own[module.name] if name in tensor_rules}
        deciding |= {module_rules[module.name]} if module.name in module_rules else set()
        wanted = {plan.rules[index].mode: index for index in sorted(deciding, reverse=True)}
        if len(wanted) > 1:
            numbers = " and ".join(
                f"rule {index + 1} says {mode}" for mode, index in sorted(wanted.items(), key=lambda w: w[1])
            )
            problems.append(
                Problem(
                    f"module {module.name!r} cannot be in eval and in train: {numbers}",
                    plan.source.where(("rules", max(wanted.values()))),
                    ("a mode belongs to a module, not to one of its parameters: select the module",),
                )
            )
        modes.update((module.name, mode) for mode in wanted if mode is not None)
    return modes, problems


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
