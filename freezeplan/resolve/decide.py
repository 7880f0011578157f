"""The rules of one plan without phases -> which rule decides what of a model. Pure: no judgement, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from freezeplan.model.description import Description
from freezeplan.plan.fields import SETTINGS, Mode
from freezeplan.plan.regex import SlowPatternError
from freezeplan.plan.schema import Plan
from freezeplan.resolve.resolution import RuleUse
from freezeplan.resolve.select import Selection, select


@dataclass(frozen=True)
class Decided:
    """Which rule decides what, in one phase."""

    plan: Plan
    """The plan of the phase: its rules, then the plan's."""
    selections: tuple[Selection, ...]
    """What each rule selects."""
    decided_by: Mapping[str, Mapping[str, int]]
    """Setting -> tensor -> index of the rule that decides it."""
    rates: Mapping[str, tuple[bool, float | None] | None]
    """Tensor -> (frozen, lr_mult), as the rule or the plan's default says; None where neither does."""
    modes: Mapping[str, Mapping[Mode, int]]
    """Module -> mode -> index of the first rule that gives it; more than one mode is a conflict."""
    uses: tuple[RuleUse, ...]

    @property
    def trains(self) -> bool:
        """Whether anything is left to train."""
        return any(not frozen for frozen, _ in filter(None, self.rates.values()))


def decide(plan: Plan, model: Description) -> Decided:
    r"""Find the rule that decides each setting of each tensor and each module: the first that matches and sets it.

    Args:
        plan: A plan without phases.
        model: The model.

    Raises:
        PlanError: If a pattern takes too long.

    Examples:
        >>> from freezeplan.model.description import Tensor
        >>> toy = Description("toy", (Tensor("fc.weight", (1,), "fc"), Tensor("fc.bias", (1,), "fc")), ())
        >>> rules = [{"match": r"fc\.bias", "lr_mult": 2.0}, {"match": ".*", "frozen": True}]
        >>> decide(Plan(version=1, rules=rules), toy).rates
        {'fc.weight': (True, None), 'fc.bias': (False, 2.0)}
    """
    selections = tuple(_select(plan, index, model) for index in range(len(plan.rules)))
    decided_by = {
        setting: _first(
            selection.tensors if setting in rule.settings else ()
            for rule, selection in zip(plan.rules, selections, strict=True)
        )
        for setting in SETTINGS
    }
    module_rules = _first(selection.modules for selection in selections)
    said = {index: _rate(plan, index) for index in (None, *range(len(plan.rules)))}
    return Decided(
        plan=plan,
        selections=selections,
        decided_by=decided_by,
        rates={tensor.name: said[decided_by["rate"].get(tensor.name)] for tensor in model.tensors},
        modes=dict(_modes(plan, model, decided_by["mode"], module_rules)),
        uses=tuple(_uses(plan, model, selections, decided_by, module_rules)),
    )


def _select(plan: Plan, index: int, model: Description) -> Selection:
    try:
        return select(plan.rules[index], model)
    except SlowPatternError as error:
        (problem,) = error.problems
        raise SlowPatternError(replace(problem, where=plan.source.where(("rules", index)))) from None


def _first(claimed: Iterable[Sequence[str]]) -> dict[str, int]:
    """Name -> index of the first rule that claims it, of what each rule claims in the plan's order."""
    decided_by: dict[str, int] = {}
    for index, names in reversed(list(enumerate(claimed))):  # so the first is written last
        decided_by |= dict.fromkeys(names, index)
    return decided_by


def _rate(plan: Plan, index: int | None) -> tuple[bool, float | None] | None:
    """(frozen, lr_mult) as the winning rule or the plan's default says, or None where neither does."""
    rate = plan.default if index is None else plan.rules[index]
    return None if rate is None else (bool(rate.frozen), rate.lr_mult)


def _modes(
    plan: Plan, model: Description, tensor_rules: Mapping[str, int], module_rules: Mapping[str, int]
) -> Iterator[tuple[str, dict[Mode, int]]]:
    """The modules that rules give a mode, each mode with the first rule that says so."""
    if not tensor_rules and not module_rules:
        return
    for module in model.modules:
        deciding = {tensor_rules[name] for name in model.own[module.name] if name in tensor_rules}
        deciding |= {module_rules[module.name]} if module.name in module_rules else set()
        wanted = {mode: index for index in sorted(deciding, reverse=True) if (mode := plan.rules[index].mode)}
        if wanted:
            yield module.name, wanted


def _uses(
    plan: Plan,
    model: Description,
    selections: Sequence[Selection],
    decided_by: Mapping[str, Mapping[str, int]],
    module_rules: Mapping[str, int],
) -> Iterator[RuleUse]:
    for index, (rule, selection) in enumerate(zip(plan.rules, selections, strict=True)):
        lost: Sequence[str] = selection.tensors
        for setting in rule.settings:
            lost = [name for name in lost if decided_by[setting][name] != index]
        takers = Counter(decided_by[rule.settings[0]][name] + 1 for name in lost)
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
