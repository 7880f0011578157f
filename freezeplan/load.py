"""File, preset or dict -> Plan. Every mistake of a file is reported at once, each with ``file:line:column``.

YAML 1.2 and JSON carry positions down to the value (ruamel.yaml); TOML gives the path inside the plan instead. Nothing
here imports torch.
"""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError

from freezeplan.errors import PlanError, Problem, did_you_mean
from freezeplan.plan import Plan, Rate, Rule
from freezeplan.source import Loc, Source, loc_text

PlanLike = Plan | Mapping[str, Any] | str | Path
"""What every function that takes a plan accepts: a Plan, a dict, a path, or the name of a preset."""

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_ESCAPE_HINT = r"in a regular expression write single quotes, 'features\.0', or two backslashes, " + r'"features\\.0"'
_QUOTE_HINT = (
    r"inline braces end a plain pattern at [ ] { } and a comma: quote it, {match: 'blocks\.[0-3]', frozen: true}"
)


def load_plan(plan: PlanLike) -> Plan:
    """Read and check a plan; whether it fits a model is ``resolve_plan``'s business.

    Args:
        plan: A Plan (returned as it is), a dict, a path to a YAML 1.2, TOML or JSON file (``.yaml``, ``.yml``,
            ``.toml``, ``.json``), or the name of a preset such as ``linear_probe``.

    Returns:
        The plan; it remembers where it was written for later errors.

    Raises:
        PlanError: If the file or preset does not exist, cannot be parsed, or is not a valid plan. It lists all problems
            of the file, each with its place, what was found and what was expected.

    Examples:
        >>> load_plan("linear_probe").name
        'linear_probe'
        >>> load_plan({"version": 1, "rules": [{"match": ".*", "lr_mul": 0.2}]})
        Traceback (most recent call last):
        ...
        freezeplan.errors.PlanError: rules[0].lr_mul: unknown key 'lr_mul'
          did you mean 'lr_mult', 'wd_mult'?
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return _validate(dict(plan), Source())
    path = Path(plan)
    if path.suffix.lower() in _SUFFIXES:
        return _parse(_read(path), path.suffix.lower(), str(plan))
    presets = preset_files()
    if str(plan) not in presets:
        notes = did_you_mean(str(plan), presets) or (f"presets: {', '.join(presets)}",)
        notes += (f"a plan file ends in one of {' '.join(_SUFFIXES)}",)
        raise PlanError(f"no preset is called {str(plan)!r}", notes=notes)
    return _parse(presets[str(plan)].read_text(encoding="utf-8"), ".yaml", f"{plan}.yaml")


def preset_files() -> dict[str, Traversable]:
    """Return the presets that ship with the package: name -> file, in alphabetical order.

    Examples:
        >>> "voc_vgg16/frozen_convs" in preset_files()
        True
    """

    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                yield f"{prefix}{entry.name.removesuffix('.yaml')}", entry

    return dict(sorted(walk(resources.files("freezeplan") / "presets", "")))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise PlanError("no such plan file", where=str(path), notes=did_you_mean(path.name, siblings)) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _parse(text: str, suffix: str, name: str) -> Plan:
    if suffix == ".toml":
        try:
            return _validate(tomllib.loads(text), Source(name))
        except tomllib.TOMLDecodeError as error:
            message, _, place = str(error).partition(" (at line ")
            line, _, column = place.rstrip(")").partition(", column ")
            where = f"{name}:{line}:{column}" if column else name
            raise PlanError(_lower(message), where=where, notes=(_ESCAPE_HINT,) if "\\" in message else ()) from None
    if suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            hints = (r'JSON needs two backslashes: "features\\.0"',) if "escape" in error.msg else ()
            raise PlanError(_lower(error.msg), where=f"{name}:{error.lineno}:{error.colno}", notes=hints) from None
        marked = _parse_yaml(text.replace("\t", " "), name)  # YAML refuses tabs; in JSON they only stand between tokens
        return _validate(data, Source(name, dict(_positions(marked, ()))))
    marked = _parse_yaml(text, name)
    return _validate(_plain(marked), Source(name, dict(_positions(marked, ()))))


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return YAML(typ="rt", pure=True).load(io.StringIO(text))
    except DuplicateKeyError as error:
        key = re.search(r'found duplicate key "(.*?)"', str(error.problem))
        first = (f"first given at line {error.context_mark.line + 1}",) if error.context_mark else ()
        raise PlanError(
            f"duplicate key {key.group(1)!r}" if key else str(error.problem), where=_mark(name, error), notes=first
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
        if "escape" in str(error.problem):
            notes: tuple[str, ...] = (_ESCAPE_HINT,)
        elif "{" in line:
            notes = (_QUOTE_HINT,)
        else:
            notes = ()
        context = f"{error.context}: " if error.context else ""
        found = f"{context}{error.problem}".replace("\n", " ")
        raise PlanError(f"not YAML: {found}", where=_mark(name, error), notes=notes) from None
    except ValueError as error:  # ruamel raises a bare one for a few broken scalars
        raise PlanError(f"not YAML: {error}", where=name) from None


def _mark(name: str, error: MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


def _plain(node: Any) -> Any:
    """Turn ruamel's nodes, which are subclasses that carry comments, into plain data."""
    if isinstance(node, Mapping):
        return {_plain(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    for plain in (bool, int, float, str):
        if isinstance(node, plain):
            return plain(node)
    return node


def _positions(node: Any, loc: Loc) -> Iterator[tuple[Loc, tuple[int, int]]]:
    """Yield the place of every part: of a value, and under ``(*loc, key, KEY)`` of the key itself."""
    if isinstance(node, CommentedMap):
        if not loc:
            yield loc, (node.lc.line + 1, node.lc.col + 1)
        for key, value in node.items():
            if key in (node.lc.data or {}):  # merged keys (<<: *anchor) have no place of their own
                line, column = node.lc.value(key)
                yield (*loc, key), (line + 1, column + 1)
                line, column = node.lc.key(key)
                yield (*loc, key, _KEY), (line + 1, column + 1)
            yield from _positions(value, (*loc, key))
    elif isinstance(node, CommentedSeq):
        for index, value in enumerate(node):
            line, column = node.lc.item(index)
            yield (*loc, index), (line + 1, column + 1)
            yield from _positions(value, (*loc, index))


_KEY = "<key>"


def _validate(data: Any, source: Source) -> Plan:
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise PlanError(
            f"a plan is a mapping with the keys version and rules, found {found}",
            where=source.file,
            notes=["version: 1", "rules:", "  - {match: .*, lr_mult: 1}"],
        )
    try:
        return Plan.model_validate(data).from_source(source)
    except ValidationError as error:
        raise PlanError(_problem(source, found) for found in error.errors(include_url=False)) from None


_KNOWN: dict[str, type[BaseModel]] = {"rules": Rule, "default": Rate}


def _problem(source: Source, error: Any) -> Problem:
    """One pydantic error -> one sentence; by its type, which is stable, never by its text."""
    kind, loc, found = error["type"], error["loc"], error["input"]
    key, parent = (loc[-1], loc[:-1]) if loc else ("", ())
    notes: tuple[str, ...] = ()
    if kind == "extra_forbidden":
        known = list((_KNOWN[str(loc[0])] if len(loc) > 1 and loc[0] in _KNOWN else Plan).model_fields)
        message = f"unknown key {key!r}"
        notes = did_you_mean(str(key), known)[:1] or (f"known keys: {', '.join(known)}",)
        loc = (*loc, _KEY)
    elif kind == "missing":
        message, loc = f"the key {key!r} is missing", parent
        notes = ("start the plan with 'version: 1'",) if key == "version" else ()
    elif kind == "literal_error":
        expected = error["ctx"]["expected"]
        message = f"{_named(loc)} is one of {expected}, found {_found(found)}"
        notes = did_you_mean(found, re.findall(r"'(\w+)'", expected)) if isinstance(found, str) else ()
    elif kind in _EXPECTED:
        message = f"{_named(loc)} {_EXPECTED[kind].format(**error.get('ctx', {}))}, found {_found(found)}"
    else:
        message = error["msg"]
    where = source.where(loc)
    place = loc_text(tuple(part for part in loc if part != _KEY))
    if not source.positions:
        where = ": ".join(filter(None, (source.file, place)))
    return Problem(message, where, notes)


_EXPECTED = {
    "string_type": "must be text",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be {ge:g} or greater",
    "finite_number": "must be a finite number",
    "tuple_type": "must be a list or one value",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
}


def _named(loc: Loc) -> str:
    if loc and isinstance(loc[-1], int) and loc[0] == "rules" and len(loc) == 2:
        return "a rule"
    return str(next((part for part in reversed(loc) if isinstance(part, str)), "plan"))


def _found(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, str):
        return f"{value!r} (text)"
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
