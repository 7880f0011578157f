"""What is wrong between a plan and a model, all of it at once, each with its place and what to do. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from freezeplan.errors import Problem, did_you_mean
from freezeplan.model.description import Description, Part
from freezeplan.plan.fields import SELECTORS
from freezeplan.plan.schema import Plan, Rule
from freezeplan.resolve.decide import Decided
from freezeplan.resolve.select import ROOT_NOTE, explain_miss, match_types, names_root, select


def find_problems(plan: Plan, model: Description, parts: Sequence[Decided]) -> list[Problem]:
    """Return every reason for which a plan does not fit a model, in the order in which they should be read.

    Where something is asked for that is not known of the model, that alone is said; and where a rule is dead or
    shadowed, what it would have trained is not known, so that nothing is left to train is said only without such.

    Args:
        plan: The plan, with its phases.
        model: The model.
        parts: What each phase decides; of a plan without phases, the only part.

    Returns:
        The problems, none twice; none if the plan fits.
    """
    if unknown := list(_unknown(plan, model)):
        return unknown
    idle = list(_idle(plan, model, parts))
    unused = [dict(_unused(part, model)) for part in parts]
    found: list[Problem] = []
    for phase, dead in zip(plan.phases, unused, strict=False):
        found += [problem for index, problem in dead.items() if index < len(phase.rules)]
    offsets = [len(phase.rules) for phase in plan.phases] or [0]
    for index in range(len(plan.rules)):  # the plan's own rules decide something in some phase
        everywhere = [dead.get(offset + index) for dead, offset in zip(unused, offsets, strict=True)]
        if everywhere[-1] is not None and all(everywhere):
            found.append(everywhere[-1])
    for part in parts:
        found += [*_uncovered(part), *_overlaps(part), *_conflicts(part)]
    return list(dict.fromkeys(found or idle))


def _unknown(plan: Plan, model: Description) -> Iterator[Problem]:
    """What a plan asks of a model that nobody knows of it: roles, stages, the order of layers."""
    for loc, rule in plan.placed:
        for role in rule.role or ():
            if role in model.unknown:
                where = plan.source.where((*loc, "role"))
                yield Problem(f"role {role} is not known: {model.unknown[role]}", where)
        if rule.stage and "stage" in model.unknown:
            yield Problem(model.unknown["stage"], plan.source.where((*loc, "stage")))
        if rule.layer_decay is not None and "layer_decay" in model.unknown:
            yield Problem(model.unknown["layer_decay"], plan.source.where((*loc, "layer_decay")))
    if plan.layer_decay is not None and "layer_decay" in model.unknown:
        yield Problem(model.unknown["layer_decay"], plan.source.where(("layer_decay",)))


def _idle(plan: Plan, model: Description, parts: Sequence[Decided]) -> Iterator[Problem]:
    """The parts that leave nothing to train."""
    for number, part in enumerate(parts):
        if not part.trains:
            phase = f" in phase {plan.phases[number].name!r}" if plan.phases else ""
            yield Problem(
                f"every parameter of {model.model} is frozen{phase}; nothing is left to train",
                plan.source.where(("phases", number) if plan.phases else ("rules",)),
                ("give what shall learn a rule above, such as {role: head, lr_mult: 1}",),
            )


def _unused(part: Decided, model: Description) -> Iterator[tuple[int, Problem]]:
    """The rules of one phase that decide nothing: index, and what to say of it."""
    plan = part.plan
    for index, (rule, selection, use) in enumerate(zip(plan.rules, part.selections, part.uses, strict=True)):
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
        notes += _depths(model)
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


def _depths(model: Description) -> Iterator[str]:
    """How many stages each part has."""
    for part in model.parts or (Part("", model.model, frozenset(model.stages)),):
        stages = {model.stages[name] for name in part.tensors if name in model.stages}
        stem = "a stem (stage 0)" if 0 in stages else "no stem"
        called = f"{part.name} ({part.architecture})" if part.name else model.model
        yield f"{called} has {stem} and {max(stages, default=0)} stages"


def _overlaps(part: Decided) -> Iterator[Problem]:
    """Under ``overlap: error``: pairs of rules that set the same thing on the same tensors."""
    plan, selections = part.plan, part.selections
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


def _uncovered(part: Decided) -> Iterator[Problem]:
    left = [name for name, rate in part.rates.items() if rate is None]
    if left:
        shown = ", ".join(map(repr, left[:3])) + (", ..." if len(left) > 3 else "")
        yield Problem(
            f"{len(left)} parameter{'s' * (len(left) > 1)} get{'s' * (len(left) == 1)} no rate: {shown}",
            part.plan.source.where(("rules",)),
            ("end the rules with a catch-all such as {match: .*, frozen: true}, or give the plan a default",),
        )


def _conflicts(part: Decided) -> Iterator[Problem]:
    """The modules for which two rules disagree."""
    for module, wanted in part.modes.items():
        if len(wanted) > 1:
            numbers = " and ".join(
                f"rule {index + 1} says {mode}" for mode, index in sorted(wanted.items(), key=lambda w: w[1])
            )
            yield Problem(
                f"module {module!r} cannot be in eval and in train: {numbers}",
                part.plan.source.where(("rules", max(wanted.values()))),
                ("a mode belongs to a module, not to one of its parameters: select the module",),
            )
