"""Why a tensor is what it is: which rule decided, and which others match. Plain data from a Resolution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from freezeplan.errors import ModelError, did_you_mean
from freezeplan.report.rows import effective
from freezeplan.resolve.resolution import Resolution, Row, RuleUse


def explain(resolution: Resolution, name: str, lr: float | None = None) -> dict[str, Any]:
    """Say what a plan does to one tensor and which rules had a say in it.

    Args:
        resolution: What the plan means for the model.
        name: A tensor's full name, or one of its aliases.
        lr: The base learning rate; with it each phase has the tensor's ``lr``, None where it is frozen.

    Returns:
        ``name``, ``aliases``, ``shape``, ``part`` (the contained timm model that it is in, such as
        ``encoder: resnet18``; empty if none), ``group`` (None if frozen throughout) and ``phases``: for each one its
        name, ``frozen``, ``lr_mult``, ``wd_mult``, ``mode``, ``reinit``, ``unplaced`` (where the plan speaks of depth:
        whether timm's matcher leaves the tensor out), and ``rules``: every rule that matches, in order, with its
        number, text, place, and the settings that it ``decides`` here. Where ``layer_decay`` decides, what is trained
        has ``decay`` too: the rule's own ``lr_mult``, and ``layer_decay``, its ``exponent`` and ``min_scale``.

    Raises:
        ModelError: If the model has no such tensor, with the nearest names; or if it is a module, with its tensors.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model
        >>> found = explain(resolve_plan("linear_probe", create_model("resnet18", meta=True)), "fc.weight")
        >>> [(rule["rule"], rule["decides"]) for rule in found["phases"][0]["rules"]]
        [(1, ['rate']), (2, [])]
    """
    rows = {alias: row for row in resolution.rows for alias in (row.name, *row.aliases)}
    if name not in rows:
        below = [row.name for alias, row in rows.items() if alias.startswith(f"{name}.")]
        if below:
            shown = ", ".join(map(repr, below[:3])) + (", ..." if below[3:] else "")
            raise ModelError(
                f"{name!r} is a module of {resolution.model}, and a parameter is asked for", notes=[f"it holds {shown}"]
            )
        raise ModelError(f"{resolution.model} has no parameter {name!r}", notes=did_you_mean(name, rows))
    first = rows[name].name
    part = resolution.part_of(first)
    group = next((group.name for group in resolution.groups if first in group.tensors), None)
    return {
        "name": first,
        "aliases": list(rows[name].aliases),
        "shape": list(rows[name].shape),
        "part": f"{part}: {resolution.timm_parts[part]}" if part else "",
        "group": group,
        "phases": [_in_phase(part, first, lr) for part in resolution.parts],
    }


def _in_phase(part: Resolution, name: str, lr: float | None) -> dict[str, Any]:
    row = next(row for row in part.rows if row.name == name)
    return {
        "phase": part.phase,
        "frozen": row.frozen,
        "lr_mult": row.lr_mult,
        **({} if lr is None else {"lr": effective(lr, row.lr_mult)}),
        "wd_mult": row.wd_mult,
        "mode": row.mode,
        "reinit": row.reinit,
        **_decay(part, row),
        "unplaced": name in part.unplaced,
        "rules": list(_rules(part.uses, name)),
    }


def _decay(part: Resolution, row: Row) -> dict[str, Any]:
    """How a trained tensor's rate came about where ``layer_decay`` has a part in it; empty elsewhere."""
    plan = part.plan
    rate = plan.default if row.rule is None else plan.rules[row.rule - 1]
    if row.frozen or row.layer_decay is None or rate is None:
        return {}
    return {
        "decay": {
            "lr_mult": rate.lr_mult,
            "layer_decay": row.layer_decay,
            "exponent": part.exponents[row.name],
            "min_scale": plan.layer_decay_min_scale or 0.0,
        }
    }


def _rules(uses: Iterable[RuleUse], name: str) -> Iterable[dict[str, Any]]:
    settled: set[str] = set()
    for use in uses:
        if name in use.tensors:
            decides = [setting for setting in use.settings if setting not in settled]
            settled.update(decides)
            yield {"rule": use.number, "text": use.text, "where": use.where, "decides": decides}
