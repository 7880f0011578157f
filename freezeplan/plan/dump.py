"""A plan -> YAML that a person would write: one rule a line. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freezeplan.plan.schema import Plan

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_ORDER = ("version", "name", "description")
_LAST = ("phases", "rules")


def dump(plan: Plan, *, comments: Sequence[str] = ()) -> str:
    r"""Return a plan as YAML; ``load_plan`` reads an equal one from it.

    Args:
        plan: The plan.
        comments: Lines that stand ahead of it, without ``#``.

    Examples:
        >>> plan = Plan(version=1, rules=[{"match": r"layer1\.0", "frozen": True}, {"match": ".*", "lr_mult": 1}])
        >>> print(dump(plan, comments=["one block"]), end="")
        # one block
        version: 1
        rules:
          - {match: 'layer1\.0', frozen: true}
          - {match: '.*', lr_mult: 1}
    """
    data = plan.model_dump(mode="json", exclude_defaults=True)
    middle = [key for key in data if key not in (*_ORDER, *_LAST)]
    lines = [f"# {line}" for comment in comments for line in comment.splitlines()]
    for key in (*_ORDER, *middle, *_LAST):
        if key == "phases" and key in data:
            lines += ["phases:", *(line for phase in data[key] for line in _phase(phase))]
        elif key == "rules":
            lines += ["rules:", *(f"  - {_flow(rule)}" for rule in data[key])]
        elif key in data:
            lines.append(f"{key}: {_flow(data[key])}")
    return "\n".join(lines) + "\n"


def _phase(phase: Mapping[str, Any]) -> Iterator[str]:
    rules = phase.get("rules", ())
    yield "  - " + f"name: {_flow(phase['name'])}"
    if "until" in phase:
        yield f"    until: {_flow(phase['until'])}"
    if rules:
        yield "    rules:"
        yield from (f"      - {_flow(rule)}" for rule in rules)


def _flow(value: Any) -> str:
    """One value in YAML's flow style."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return _text(value) if isinstance(value, str) else str(value)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and text.isascii():
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    escaped = (f"\\U{ord(c):08x}" if not c.isprintable() else f"\\{c}" if c in '\\"' else c for c in text)
    return f'"{"".join(escaped)}"'
