"""A Python config as data: literals, ``dict(...)`` and names of both. The file is read and never executed."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError
from freezeplan.plan.load import read_text
from freezeplan.plan.location import Loc, Source

SECTIONS = ("model", "optim_wrapper", "optimizer", "paramwise_cfg")
"""Variables that a tool reads by their names, whether others use them or not."""
_READ_BASE = "read_base"


@dataclass(frozen=True)
class Unread:
    """Stands for an expression whose value only running the file would give."""

    text: str
    """The expression."""
    position: tuple[int, int]
    """Its line and column, both from 1."""


def read_python(path: Path) -> tuple[dict[str, Any], Source]:
    """Return a config's variables, and where each part of their values stands.

    A variable that others use, such as ``norm_cfg``, is a part of these and not returned by itself.

    A variable that code changes after it was assigned (a loop, ``.update(...)``, ``config["key"] = ...``) and every
    other expression is an ``Unread``. Configs that inherit have the key ``_base_``, lazy ones too.

    Raises:
        PlanError: If the file cannot be read or is not Python.
    """
    text = read_text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PlanError(f"not Python: {error}", where=str(path)) from None
    assigned = dict(_assigned(tree))
    changed = _changed(tree)
    places: dict[Loc, tuple[int, int]] = {}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    wanted = [name for name in assigned if name not in used or name in SECTIONS]
    reader = _Reader(assigned, changed, places)
    data = {name: reader.name(name, assigned[name], (name,)) for name in wanted}
    base = next((node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == _READ_BASE), None)
    if base is not None:
        data.setdefault("_base_", _READ_BASE)
        places.setdefault(("_base_",), _position(base))
    return data, Source(str(path), places)


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


def _changed(tree: ast.Module) -> Mapping[str, ast.AST]:
    """Variables whose value is not that of their one assignment -> what changes them."""
    found: dict[str, ast.AST] = {}
    stored = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_stored(node))
    for node in ast.walk(tree):
        target: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = node.func.value
        elif isinstance(node, (ast.Subscript, ast.Attribute, ast.Name)) and _is_stored(node):
            once = isinstance(node, ast.Name) and stored[node.id] == 1
            target = None if once else node
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name):
            found[target.id] = node
    return found


def _is_stored(node: ast.Name | ast.Subscript | ast.Attribute) -> bool:
    return isinstance(node.ctx, (ast.Store, ast.Del))


def _position(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset + 1


@dataclass(frozen=True)
class _Reader:
    """Reads one variable; the names on the way to it cannot stand for themselves."""

    assigned: Mapping[str, ast.expr]
    changed: Mapping[str, ast.AST]
    places: dict[Loc, tuple[int, int]]
    above: frozenset[str] = frozenset()

    def name(self, name: str, node: ast.AST, loc: Loc) -> Any:
        """The value of a variable, or what makes it unknown."""
        if name in self.changed:
            return self.unread(self.changed[name], loc)
        if name not in self.assigned or name in self.above:
            return self.unread(node, loc)
        inner = _Reader(self.assigned, self.changed, self.places, self.above | {name})
        return inner.value(self.assigned[name], loc)

    def value(self, node: ast.expr, loc: Loc) -> Any:
        self.places[loc] = _position(node)
        if isinstance(node, ast.Name):
            return self.name(node.id, node, loc)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            pairs = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            if len(pairs) == len(node.keywords):
                return {key: self.value(value, (*loc, key)) for key, value in pairs.items()}
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            keys = [str(key.value) for key in node.keys if isinstance(key, ast.Constant)]
            return {key: self.value(value, (*loc, key)) for key, value in zip(keys, node.values, strict=True)}
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(value, (*loc, index)) for index, value in enumerate(node.elts)]
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return self.unread(node, loc)

    def unread(self, node: Any, loc: Loc) -> Unread:
        self.places[loc] = _position(node)
        text = " ".join(ast.unparse(node).split())
        return Unread(text if len(text) <= 60 else f"{text[:57]}...", self.places[loc])
