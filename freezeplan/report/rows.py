"""Resolution -> rows, counts, lines and trees: plain data, JSON-able; nothing here prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from freezeplan.plan.schema import Plateau
from freezeplan.resolve.resolution import Resolution, Row, RuleUse


def as_json(resolution: Resolution, lr: float | None = None) -> dict[str, Any]:
    """Return a resolution as plain data for ``json.dumps``.

    Args:
        resolution: What a plan means for a model.
        lr: The base learning rate. With it each tensor has its ``lr`` and each group its ``lrs``, one a phase, beside
            the multipliers.

    Returns:
        ``model``, ``plan``, ``frozen`` and ``trainable`` (``tensors``, ``elements``), ``groups``, ``tensors`` (an entry
        for each, in the model's order; ``lr_mult`` is None when frozen, ``rule`` counts from 1 and is None for the
        plan's default), ``rules``, ``hints``, ``random`` and ``alive``.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model
        >>> found = as_json(resolve_plan("linear_probe", create_model("resnet18", num_classes=10, meta=True)))
        >>> found["trainable"], found["tensors"][-1]["name"], found["tensors"][-1]["rule"]
        ({'tensors': 2, 'elements': 5130}, 'fc.bias', 1)
    """
    found: dict[str, Any] = {
        "model": resolution.model,
        "parts": dict(resolution.timm_parts),
        "plan": resolution.plan.title,
        "frozen": count(resolution.frozen),
        "trainable": count(resolution.trained),
        "groups": [
            {
                "name": group.name,
                "lr_mult": group.lr_mult,
                "rates": list(group.rates),
                "wd_mult": group.wd_mult,
                "tensors": len(group.tensors),
                "elements": group.elements,
            }
            for group in resolution.groups
        ],
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "frozen": row.frozen,
                "lr_mult": row.lr_mult,
                "wd_mult": row.wd_mult,
                "mode": row.mode,
                "reinit": row.reinit,
                "rule": row.rule,
                "aliases": list(row.aliases),
            }
            for row in resolution.rows
        ],
        "rules": [
            {"rule": use.number, "text": use.text, "where": use.where, "matched": use.matched, "decided": use.decided}
            for use in resolution.uses
        ],
        "phases": [
            {
                "name": part.phase,
                "end": phase_end(resolution, part),
                "frozen": count(part.frozen),
                "trainable": count(part.trained),
            }
            for part in resolution.phases
        ],
        "hints": list(resolution.hints),
        "unplaced": list(resolution.unplaced),
        "random": list(resolution.random),
        "alive": list(resolution.alive),
    }
    if lr is not None:
        found["lr"] = lr
        for group in found["groups"]:
            group["lrs"] = [effective(lr, rate) for rate in group["rates"]]
        for tensor in found["tensors"]:
            tensor["lr"] = effective(lr, tensor["lr_mult"])
    return found


def effective(lr: float, lr_mult: float | None) -> float | None:
    """Return the learning rate of what is trained with a multiple of ``lr``; None where it is frozen.

    Examples:
        >>> effective(1e-3, 0.5), effective(1e-3, None)
        (0.0005, None)
    """
    return None if lr_mult is None else lr * lr_mult


def count(rows: Iterable[Row]) -> dict[str, int]:
    """Return the number of ``tensors`` and of their ``elements``."""
    rows = list(rows)
    return {"tensors": len(rows), "elements": sum(row.elements for row in rows)}


def phase_end(resolution: Resolution, part: Resolution) -> str:
    """Say when a phase ends: ``until epoch 3``, ``until 50%``, ``until loss is flat for 2 epochs``, ``to the end``."""
    until = next(phase.until for phase in resolution.plan.phases if phase.name == part.phase)
    if until is None:
        return "to the end"
    if isinstance(until, Plateau):
        return f"until {until.metric} is flat for {until.patience} epoch{'s' * (until.patience > 1)}"
    return f"until {until}" if isinstance(until, str) else f"until epoch {until}"


def rule_line(use: RuleUse, resolution: Resolution) -> str:
    """Say what one rule matched and what it decided.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model
        >>> found = resolve_plan("linear_probe", create_model("resnet18", num_classes=10, meta=True))
        >>> rule_line(found.uses[1], found)
        'rule 2 (match: .*) matched 62, decided 60; 2 were decided by rule 1, line 8'
    """
    found, also = f"matched {use.matched}, decided {use.decided}", "and"
    if use.matched and not use.decided:
        found, also = f"matches {use.matched} tensors and decides none of them", "but"
    line = f"rule {use.number} ({use.text}) {found}"
    if use.modules:
        line += f", {also} the mode of {use.modules} module{'s' * (use.modules > 1)} without parameters"
    source = resolution.plan.source
    taken = [f"{n} were decided by rule {number}{source.line(('rules', number - 1))}" for number, n in use.takers]
    if not use.matched and not use.modules:
        taken = ["optional: nothing of the kind in this model"]
    return "; ".join([line, *taken])


@dataclass(frozen=True)
class Node:
    """A module, or several alike side by side, in the tree of decisions."""

    name: str
    tensors: int
    elements: int
    decision: str
    """What happens to everything below; empty where it differs and the children say."""
    frozen: bool | None
    """Whether everything below is frozen; None where it differs."""
    children: tuple[Node, ...] = ()
    alike: int = field(default=1, compare=False)
    """How many modules the node stands for."""


def tree(resolution: Resolution) -> Node:
    """Fold the decisions to a tree: a module whose tensors share one is a leaf, equal neighbours are one node.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model
        >>> found = tree(resolve_plan("voc_vgg16/frozen_convs", create_model("vgg16", num_classes=20, meta=True)))
        >>> [(node.name, node.decision, node.elements) for node in found.children]  # doctest: +NORMALIZE_WHITESPACE
        [('features', 'frozen, rule 3', 14714688),
         ('pre_logits', 'lr x 1, rule 2', 119545856),
         ('head', 'lr x 1, rule 1', 81940)]
    """
    return _node(resolution.model, [(tuple(row.name.split(".")), row) for row in resolution.rows])


def _node(name: str, below: Sequence[tuple[tuple[str, ...], Row]]) -> Node:
    rows = [row for _, row in below]
    decisions = {_decision(row) for row in rows}
    frozen = {row.frozen for row in rows}
    children: list[Node] = []
    if len(decisions) > 1:
        parts: dict[str, list[tuple[tuple[str, ...], Row]]] = {}
        for path, row in below:
            parts.setdefault(path[0], []).append((path[1:], row))
        children = _merge([_node(part, inner) for part, inner in parts.items()])
    return Node(
        name,
        len(rows),
        sum(row.elements for row in rows),
        decisions.pop() if len(decisions) == 1 else "",
        frozen.pop() if len(frozen) == 1 else None,
        tuple(children),
    )


def _decision(row: Row) -> str:
    parts = ["frozen" if row.frozen else f"lr x {row.lr_mult:g}"]
    if (row.mode == "eval") != row.frozen:
        parts.append(row.mode)
    if row.reinit:
        parts.append("reinit")
    parts.append("default" if row.rule is None else f"rule {row.rule}")
    return ", ".join(parts)


def _merge(nodes: list[Node]) -> list[Node]:
    """Make numbered neighbours with the same decisions inside one node: 0, 1, 2 become 0..2."""
    merged: list[Node] = []
    for node in nodes:
        last = merged[-1] if merged else None
        if last and last.name[-1:].isdigit() and node.name.isdigit() and _shape(last) == _shape(node):
            first = re.split(r"\.\.", last.name)[0]
            merged[-1] = Node(
                f"{first}..{node.name}",
                last.tensors + node.tensors,
                last.elements + node.elements,
                node.decision,
                node.frozen,
                node.children,
                last.alike + 1,
            )
        else:
            merged.append(node)
    return merged


def _shape(node: Node) -> object:
    return (node.decision, tuple((child.name, _shape(child)) for child in node.children))
