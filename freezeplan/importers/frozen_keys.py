"""What an OpenMMLab config freezes -> rules, and what freezes there and has no rule -> notes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from freezeplan.errors import PlanError
from freezeplan.importers.imported import refused
from freezeplan.importers.python_config import Unread
from freezeplan.plan.location import Loc, Source
from freezeplan.plan.schema import Rule

_FREEZES = re.compile(r"(?i)fr[oe]+ze|requires_grad|norm_eval|bn_eval|partial_bn|no_?grad|detach")
_TYPE_FREEZES = re.compile(r"(?i)fr[oe]+ze")
_COUNTS_AS_HERE = re.compile(r"(?:Res|ResNeXt|ResNeSt|SEResNe|RegNet|HRNet|Swin|Timm|TIMM|ConvNeXt)\w*")


def frozen_rules(data: Mapping[str, Any], source: Source) -> tuple[list[Rule], list[str]]:
    """Return the rules for what a config freezes, and notes on what they say differently or not at all.

    ``frozen_stages``, ``norm_eval``, ``bn_frozen`` and ``norm_cfg=dict(requires_grad=False)`` of a part of ``model``
    become rules for that part, which is called as in the config: ``model.backbone`` is ``backbone``. Of every other key
    or type that speaks of freezing there is a note.

    Args:
        data: The config.
        source: Where its parts stand.

    Raises:
        PlanError: If the value of one of these keys is not one that it can have.

    Examples:
        >>> config = {"model": {"backbone": {"type": "ResNet", "frozen_stages": 1, "norm_eval": True}}}
        >>> rules, notes = frozen_rules(config, Source("config.py"))
        >>> [(rule.text, rule.settings) for rule in rules], notes
        ([('match: backbone, stage: ..1', ('rate',)), ('match: backbone, role: norm', ('mode',))], [])
    """
    rules: list[Rule] = []
    notes: list[str] = []
    inside = {(key, repr(value)) for _, key, value, _ in _entries(data.get("model"), ("model",))}
    for loc, key, value, holder in _entries(data, ()):
        place = source.where(loc)
        if loc[0] != "model" and (key, repr(value)) in inside:  # a variable that the model was put together from
            continue
        if isinstance(value, Unread) and _FREEZES.search(key):
            message = f"{key} is {value.text}, which is not a literal; the file is read, not executed"
            raise PlanError(message, where=place, notes=["write its value out"])
        if isinstance(value, Unread) and key == "model":
            notes.append(f"{place}: model is made by code ({value.text}); what it freezes is not known here")
        if _idle(key, value):
            continue
        scope = _scope(loc)
        if scope is None or key not in ("frozen_stages", "norm_eval", "bn_frozen", "requires_grad"):
            if key == "type" and isinstance(value, str) and _TYPE_FREEZES.search(value):
                notes.append(f"{place}: type {value!r} is not taken over; write a rule for what it freezes")
            elif key != "type" and _FREEZES.search(key):
                notes.append(f"{place}: {key}={value!r} is not taken over; write a rule for what it freezes")
        elif key == "frozen_stages":
            rules.append(_rule(place, scope, stage=_stages(value, place), frozen=True))
            kind = str(holder.get("type", ""))
            if not _COUNTS_AS_HERE.match(kind.rpartition(".")[2]):
                notes.append(
                    f"{place}: frozen_stages of {kind or 'a backbone without type'} may count other parts than timm's "
                    "stages; see which tensors are frozen with freezeplan show"
                )
        elif key == "norm_eval":
            rules.append(_rule(place, scope, role="norm", mode="eval"))
        elif key == "bn_frozen" or loc[-2] == "norm_cfg":
            rules.append(_rule(place, scope, role="norm", frozen=True))
            if not _norm_eval(data, loc[:-2] if key == "requires_grad" else loc[:-1]):
                notes.append(f"{place}: the statistics of these norms go on there; in the plan they stay as they are")
        else:
            notes.append(f"{place}: {key}={value!r} is not taken over; write a rule for what it freezes")
    return list(dict.fromkeys(rules)), notes


def _entries(data: Any, loc: Loc) -> Iterator[tuple[Loc, str, Any, Mapping[str, Any]]]:
    """Every key below, with its place and the dict that holds it."""
    pairs = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        if isinstance(data, Mapping) and key != "paramwise_cfg":
            yield (*loc, str(key)), str(key), value, data
        if key != "paramwise_cfg":
            yield from _entries(value, (*loc, key if isinstance(key, int) else str(key)))


def _idle(key: str, value: Any) -> bool:
    """Whether a key says that nothing is frozen."""
    if key == "requires_grad":
        return value is not False
    return value is None or value is False or value in (-1, "", [], {})


def _scope(loc: Loc) -> dict[str, Any] | None:
    """What selects the part of the model that a key belongs to; None outside ``model``, and inside lists."""
    path = loc[1:-1] if loc[-1] != "requires_grad" else loc[1:-2]
    if loc[0] != "model" or any(isinstance(part, int) for part in path):
        return None
    return {"match": r"\.".join(re.escape(str(part)) for part in path)} if path else {}


def _rule(place: str, scope: Mapping[str, Any], **keys: Any) -> Rule:
    with refused(place):
        return Rule(**scope, **keys)


def _stages(value: Any, place: str) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"frozen_stages is an integer, found {value!r}", where=place)
    return f"..{value}" if value else "0"


def _norm_eval(data: Mapping[str, Any], holder: Loc) -> bool:
    found: Any = data
    for part in holder:
        found = {str(key): value for key, value in found.items()}[str(part)]
    return bool(found.get("norm_eval"))
