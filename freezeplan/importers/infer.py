"""A model frozen by hand -> the shortest plan that says the same.

A rule list is searched for, first match wins: for each rate as the one of the catch-all, with and without a rule ahead
that keeps one role or class apart, the rest is covered greedily by roles, stages, classes, modules and at last single
tensors. The shortest list found is held against the model, so that what is returned is right even where a shorter one
exists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from freezeplan.errors import ApplyError
from freezeplan.importers.by_hand import ByHand, read, tidy
from freezeplan.model import describer, names
from freezeplan.model.description import Description
from freezeplan.plan.schema import Plan, Rule
from freezeplan.resolve.resolver import resolve
from freezeplan.resolve.select import select

_CLOSE = 1e-9
"""Two rates are one where they differ by less than this, relatively."""


def infer_plan(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Plan:
    """Return a short plan that freezes and trains what a model frozen by hand does. Changes nothing.

    Without an optimizer what has ``requires_grad`` is trained at rate 1. With one, what it does not hold, or holds at
    the rate 0, is frozen too. The rate of a group is its ``initial_lr``, which a scheduler keeps there, or its ``lr``.
    ``lr_mult`` is relative to the largest rate (or is ``lr_scale``, where groups carry that; or 1, where all have
    ``lr=None``), ``wd_mult`` to the largest ``weight_decay`` of what is trained. Apply the plan with these two as
    ``lr`` and ``weight_decay``.

    Modules with trained parameters of their own that are in eval, while the model is in train, get ``mode: eval``:
    batch norm with frozen statistics. What is frozen and left in train is not copied: a plan puts it in eval. Nor is a
    parametrized tensor that is trained in part, such as a weight under ``weight_norm``: a plan trains it whole.

    Args:
        model: Any module.
        optimizer: The optimizer that trains it.

    Returns:
        A plan that ``resolve_plan`` has been asked about: the same flags, rates and decays, tensor by tensor.

    Raises:
        ApplyError: If nothing is trained, or the optimizer holds nothing of this model, or has a rate or a weight decay
            that a plan cannot give.

    Warns:
        FreezePlanWarning: Where a parametrized tensor is trained in part.

    Examples:
        >>> from freezeplan.model import create_model
        >>> model = create_model("resnet18", num_classes=3)
        >>> for name, parameter in model.named_parameters():
        ...     _ = parameter.requires_grad_(name.startswith(("layer4", "fc")))
        >>> [rule.text for rule in infer_plan(model).rules]
        ['stage: ..3', 'match: .*']
    """
    described = describer.describe(model)
    found = read(names.unwrap(model), described, optimizer)
    space = _Space(described)
    decay, floor = _layer_decay(described, found.rates)
    rates = found.rates if decay is None else {name: rate and 1.0 for name, rate in found.rates.items()}
    weight_decay, factors = _weight_decay(described, found.decays)
    rules = [
        *_exceptions(space, found.modes, "mode", usual="train"),
        *_exceptions(space, factors, "wd_mult", usual=1.0),
        *(Rule(**pick.selector, **_rate(value)) for pick, value in space.cover(rates)),
    ]
    plan = Plan(
        version=1, rules=rules, weight_decay=weight_decay, layer_decay=decay, layer_decay_min_scale=floor or None
    )
    _check(plan, described, found)
    return plan


def shortest_rules(
    model: Description, wanted: Mapping[str, Any], *, usual: object = ...
) -> list[tuple[dict[str, Any], Any]]:
    """Return the shortest list found, first match first, that gives each tensor the value that is wanted for it.

    Args:
        model: The model.
        wanted: Tensor -> value; tensors that are missing may get any.
        usual: The value that a tensor has without a rule; by default there is none, and the last rule takes all.

    Returns:
        The keys of a rule that select, and the value that such a rule sets.

    Examples:
        >>> from freezeplan.model import create_model, describe
        >>> model = describe(create_model("test_resnet", meta=True))
        >>> shortest_rules(model, {t.name: t.name.startswith("fc.") for t in model.tensors})
        [({'match': ['fc']}, True), ({'match': ['.*']}, False)]
    """
    if not wanted or all(value == usual for value in wanted.values()):
        return []
    return [(pick.selector, value) for pick, value in _Space(model).cover(wanted, usual=usual)]


def _layer_decay(model: Description, rates: Mapping[str, float | None]) -> tuple[float | None, float]:
    """The decay and the floor that give all rates, as timm's; (None, 0) where none does or few rates are told apart."""
    trained = {name: rate for name, rate in rates.items() if rate is not None}
    if len(set(trained.values())) < 4 or "layer_decay" in model.unknown:
        return None, 0.0
    least = min(trained.values())
    above = [(model.exponents[name], rate) for name, rate in trained.items() if model.exponents[name] and rate > least]
    decay = tidy(round(above[0][1] ** (1 / above[0][0]), 9)) if above else 1.0
    if not 0 < decay < 1:
        return None, 0.0
    for floor in (0.0, least):
        if all(
            math.isclose(max(floor, decay ** model.exponents[n]), rate, rel_tol=1e-7) for n, rate in trained.items()
        ):
            return decay, floor
    return None, 0.0


def _weight_decay(model: Description, decays: Mapping[str, float]) -> tuple[Any, Mapping[str, float]]:
    """The plan's ``weight_decay``, and the factor of each tensor that rules have to give on top of it."""
    if all(decay == (0.0 if name in model.no_decay else 1.0) for name, decay in decays.items()):
        return "timm", {}
    return "all", decays


def _rate(value: float | None) -> dict[str, Any]:
    return {"frozen": True} if value is None else {"lr_mult": value}


def _exceptions(space: _Space, wanted: Mapping[str, Any], key: str, *, usual: object) -> Iterator[Rule]:
    """Rules that set ``key`` where it is not what it is without a rule."""
    if any(value != usual for value in wanted.values()):
        for pick, value in space.cover(wanted, usual=usual):
            yield Rule(**pick.selector, **{key: value})


@dataclass(frozen=True)
class _Pick:
    """A selector and what it selects, one bit a tensor."""

    key: str
    values: tuple[str, ...]
    mask: int

    @property
    def selector(self) -> dict[str, Any]:
        return {self.key: list(self.values)}

    def merged(self, other: _Pick) -> _Pick:
        return _Pick(self.key, (*self.values, *other.values), self.mask | other.mask)


class _Space:
    """Everything that a rule can select in one model, the preferred ways first."""

    def __init__(self, model: Description):
        self._bit = {tensor.name: 1 << index for index, tensor in enumerate(model.tensors)}
        self._all = (1 << len(model.tensors)) - 1
        seen: set[tuple[str, int]] = set()
        self._picks: list[_Pick] = []
        for key, value, tensors in _selectors(model):
            pick = _Pick(key, (value,), sum(self._bit[name] for name in tensors))
            if pick.mask and (key, pick.mask) not in seen:
                seen.add((key, pick.mask))
                self._picks.append(pick)

    def cover(self, wanted: Mapping[str, Any], usual: object = ...) -> list[tuple[_Pick, Any]]:
        """Return the shortest rule list found that gives each tensor the value that is wanted for it.

        Tensors that are not in ``wanted`` may get any value. With ``usual`` this value needs no rule at the end.
        """
        masks: dict[Any, int] = {}
        for name, value in wanted.items():
            masks[value] = masks.get(value, 0) | self._bit[name]
        best: list[tuple[_Pick, Any]] | None = None
        apart = [pick for pick in self._picks if pick.key in ("role", "type")]
        by_name = [pick for pick in self._picks if pick.key == "match"]
        for last in masks if usual is ... else [usual]:
            for first, picks in [(None, by_name), *((first, self._picks) for first in (None, *apart))]:
                limit = len(best) + 8 if best else len(self._picks)
                found = self._greedy(picks, masks, last, first, ends=usual is ..., limit=limit)
                if found is not None and (best is None or _cost(found) < _cost(best)):
                    best = found
        assert best is not None, "single tensors cover everything"
        return best

    def _greedy(
        self,
        picks: Sequence[_Pick],
        masks: Mapping[Any, int],
        last: object,
        first: _Pick | None,
        *,
        ends: bool,
        limit: int,
    ) -> list[tuple[_Pick, Any]] | None:
        """Take again and again what decides most of what ``last`` does not, and nothing wrongly."""
        cared = 0
        for mask in masks.values():
            cared |= mask
        left = cared
        rules: list[tuple[_Pick, Any]] = []
        before: list[int] = []

        def add(pick: _Pick, value: Any) -> None:
            nonlocal left
            for index, (earlier, its) in enumerate(rules):
                wrong = pick.mask & before[index] & ~masks[value]
                if its == value and earlier.key == pick.key and not wrong:
                    rules[index] = (earlier.merged(pick), value)
                    break
            else:
                rules.append((pick, value))
                before.append(left)
            left &= ~pick.mask

        if first is not None:
            mine = first.mask & left
            value = next((value for value, mask in masks.items() if mine and not mine & ~mask), ...)
            if value != last or not _mostly(mine, first.mask):  # others are found below
                return None
            add(first, value)
        while open_ := left & ~masks.get(last, 0):
            taken, most = None, 0
            for pick in picks:
                count = (pick.mask & open_).bit_count()
                if count <= most:
                    continue
                mine = pick.mask & left
                value = next((v for v, mask in masks.items() if not mine & ~mask), ...)
                if value is not ... and _mostly(mine, pick.mask & cared):
                    taken, most, chosen = pick, count, value
            assert taken is not None, "a tensor's own name selects it alone"
            add(taken, chosen)
            if len(rules) > limit:
                return None
        if ends and left:
            rules.append((_Pick("match", (".*",), self._all), last))
        return rules


def _mostly(decided: int, matched: int) -> bool:
    """Whether a rule decides at least half of what it matches."""
    return 2 * decided.bit_count() >= matched.bit_count()


def _cost(rules: Sequence[tuple[_Pick, Any]]) -> tuple[int, int, int]:
    entries = [value for pick, _ in rules for value in pick.values]
    return len(rules), len(entries), sum(map(len, entries))


def _selectors(model: Description) -> Iterator[tuple[str, str, Sequence[str] | frozenset[str]]]:
    """Every selector of one entry: key, value, and the tensors that it selects; preferred ones first."""
    for role in ("head", "norm", "bias", "stem", "body", "pos_embed", "no_weight_decay"):
        if role not in model.unknown:
            yield "role", role, select(Rule(role=role, frozen=True), model).tensors
    if model.stages and "stage" not in model.unknown:
        first, last = min(model.stages.values()), model.last_stage
        spans = [f"..{end}" for end in range(first, last)] + [f"{start}.." for start in range(first + 1, last + 1)]
        spans += [str(stage) for stage in range(first, last + 1)]
        spans += [f"{start}..{end}" for start in range(first + 1, last) for end in range(start + 1, last)]
        for span in spans:
            yield "stage", span, select(Rule(stage=span, frozen=True), model).tensors
    owners = (module for module in model.modules if module.name and module.types and model.own[module.name])
    for name in dict.fromkeys(module.types[0] for module in owners):  # a bare nn.Module has no class of its own
        yield "type", name, select(Rule(type=name, frozen=True), model).tensors
    for module in model.modules:
        if module.name:
            yield "match", re.escape(module.name), model.below[module.name]
    for kind in dict.fromkeys(tensor.name.rpartition(".")[2] for tensor in model.tensors):
        pattern = rf".*\.{re.escape(kind)}"
        yield "match", pattern, select(Rule(match=pattern, frozen=True), model).tensors
    for tensor in model.tensors:
        yield "match", re.escape(tensor.name), (tensor.name,)


def _check(plan: Plan, model: Description, found: ByHand) -> None:
    """Hold the plan against what was found; a difference would be a mistake in the search above."""
    for row in resolve(plan, model).rows:
        rate = found.rates[row.name]
        same = row.frozen if rate is None else math.isclose(row.lr_mult or 0.0, rate, rel_tol=1e-7)
        if rate is not None and found.decays:
            same = same and math.isclose(row.wd_mult, found.decays[row.name], rel_tol=_CLOSE)
        if not same or found.modes.get(row.name, row.mode) != row.mode:
            raise ApplyError(f"no plan was found that does to {row.name!r} what this model does")
