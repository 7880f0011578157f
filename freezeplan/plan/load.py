"""File, preset or dict -> Plan. Every mistake of a file is reported at once, each with ``file:line:column``.

YAML 1.2 and JSON carry positions down to the value (ruamel.yaml), TOML down to the key. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from freezeplan.errors import FreezePlanWarning, PlanError, did_you_mean, printable
from freezeplan.plan import catalogue
from freezeplan.plan.location import Loc, Source
from freezeplan.plan.refusal import refusal, stage_notes
from freezeplan.plan.schema import Plan
from freezeplan.plan.toml_places import KEY, toml_places

PlanLike = Plan | Mapping[str, Any] | str | Path
"""What every function that takes a plan accepts: a Plan, a dict, a path, or the name of a preset."""

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_ESCAPE_HINT = r"in a regular expression write single quotes, 'features\.0', or two backslashes, " + r'"features\\.0"'
_QUOTE_HINT = (
    r"inline braces end a plain pattern at [ ] { } and a comma: quote it, {match: 'blocks\.[0-3]', frozen: true}"
)
_IN_A_PATTERN = re.compile(r"""[^\s\[\]{},:'"][\[{]|[\]}][^\s\[\]{},:'"]""")
"""A bracket that stands against text: the end of a plain pattern, or the beginning of one."""


def load_plan(plan: PlanLike) -> Plan:
    """Read and check a plan; whether it fits a model is ``resolve_plan``'s business.

    Args:
        plan: A Plan (returned as it is), a dict, a path to a YAML 1.2, TOML or JSON file (``.yaml``, ``.yml``,
            ``.toml``, ``.json``), or the name of a preset such as ``linear_probe``.

    Returns:
        The plan; it remembers where it was written for later errors.

    Raises:
        PlanError: If it is none of these, the file or preset does not exist, cannot be parsed, or is not a valid plan.
            It lists all problems of the file, each with its place, what was found and what was expected.

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
    try:
        path = Path(plan)
    except TypeError:
        raise _no_plan(plan) from None
    if path.suffix.lower() in _SUFFIXES:
        return _parse(read_text(path), path.suffix.lower(), str(plan))
    name = str(plan)
    presets = catalogue.shipped()
    if name in presets:
        return _shipped(name)
    added = catalogue.added()
    if name in added:
        return _from_package(added[name])
    notes = did_you_mean(name, [*presets, *added]) or (f"presets: {', '.join([*presets, *added])}",)
    notes += (f"a plan file ends in one of {' '.join(_SUFFIXES)}",)
    if path.is_dir():
        raise PlanError("is a folder, expected a plan file or the name of a preset", where=name, notes=notes[-1:])
    raise PlanError(f"no preset is called {name!r}", notes=notes)


def _no_plan(found: object) -> PlanError:
    message = f"a plan is a Plan, a mapping, a path or the name of a preset; found a {type(found).__name__}"
    if hasattr(found, "named_parameters"):  # a model, told without torch
        return PlanError(message, notes=["the order is resolve_plan(plan, model) and apply_plan(model, plan)"])
    is_list = isinstance(found, (list, tuple))
    return PlanError(message, notes=["rules stand in a mapping: {'version': 1, 'rules': [...]}"] if is_list else [])


@functools.cache
def _shipped(name: str) -> Plan:
    """A preset of this package; a plan cannot be changed, so one is enough."""
    return _parse(catalogue.shipped()[name].read_text(encoding="utf-8"), ".yaml", f"{name}.yaml")


def load_presets() -> dict[str, Plan]:
    """Return every preset by name: those that ship, then those that other packages add.

    Warns:
        FreezePlanWarning: Where another package's plan cannot be read; the rest is returned.

    Examples:
        >>> load_presets()["linear_probe"].rules[0].role
        ('head',)
    """
    found = {name: load_plan(name) for name in catalogue.shipped()}
    for name, file in catalogue.added().items():
        try:
            found[name] = _from_package(file)
        except PlanError as error:
            warnings.warn(f"preset {name!r} is left out: {error}", FreezePlanWarning, stacklevel=2)
    return found


def _from_package(file: Traversable) -> Plan:
    """Read another package's plan; its errors name the file."""
    try:
        return _parse(file.read_text(encoding="utf-8"), ".yaml", str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot be read: {error}", where=str(file)) from None


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        PlanError: If it does not exist, with the nearest names beside it, cannot be read, cannot be the name of a file,
            or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise PlanError("no such file", where=str(path), notes=did_you_mean(path.name, siblings)) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    except ValueError as error:  # a zero in the name
        raise PlanError(f"no name of a file: {error}", where=printable(str(path))) from None
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}", where=str(path)) from None


def read_data(path: Path) -> tuple[Any, Source]:
    """Read a YAML 1.2, TOML or JSON file: plain data, and where each part of it stands.

    Raises:
        PlanError: If the file cannot be read or parsed, with the place.
    """
    return _data(read_text(path), path.suffix.lower(), str(path))


def _parse(text: str, suffix: str, name: str) -> Plan:
    return _validate(*_data(text, suffix, name))


LARGEST = 256 * 1024
"""Bytes of a plan file; the largest preset has less than one hundredth of it."""
_DEEPEST, _MOST = 32, 100_000


def _data(text: str, suffix: str, name: str) -> tuple[Any, Source]:
    if len(text) > LARGEST:
        raise PlanError(f"{len(text):,} characters; a plan has at most {LARGEST:,}", where=name)
    try:
        return _parsed(text, suffix, name)
    except RecursionError:
        raise PlanError("nested too deeply for a plan", where=name) from None


def _check_size(node: Any, name: str) -> None:
    """Refuse what aliases blow up or tie into a ring, before anything walks through all of it."""
    count, open_ = 0, [(node, 0)]
    while open_:
        found, depth = open_.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            what = "nested too deeply" if depth > _DEEPEST else f"more than {_MOST:,} values"
            note = "an alias that holds itself, or others, does this"
            raise PlanError(f"{what} for a plan", where=name, notes=[note])
        tag = getattr(getattr(found, "tag", None), "value", None)
        if tag is not None:
            raise PlanError(f"the tag {tag!r}; a plan has plain values only", where=name)
        keys = [key for key in found if not isinstance(key, (str, int, float))] if isinstance(found, Mapping) else []
        if keys:
            raise PlanError(f"a key is text, found a {type(keys[0]).__name__}", where=name)
        parts = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
        open_ += [(part, depth + 1) for part in parts]


def _parsed(text: str, suffix: str, name: str) -> tuple[Any, Source]:
    if suffix == ".toml":
        try:
            return tomllib.loads(text), Source(name, dict(toml_places(text)))
        except tomllib.TOMLDecodeError as error:
            message, _, place = str(error).partition(" (at line ")
            line, _, column = place.rstrip(")").partition(", column ")
            where = f"{name}:{line}:{column}" if column else name
            raise PlanError(_lower(message), where=where, notes=(_ESCAPE_HINT,) if "\\" in message else ()) from None
        except ValueError as error:  # an integer of thousands of digits
            raise PlanError(f"not TOML: {error}", where=name) from None
    if suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            hints = (r'JSON needs two backslashes: "features\\.0"',) if "escape" in error.msg else ()
            raise PlanError(_lower(error.msg), where=f"{name}:{error.lineno}:{error.colno}", notes=hints) from None
        except ValueError as error:  # an integer of thousands of digits
            raise PlanError(f"not JSON: {error}", where=name) from None
        _check_size(data, name)
        return data, Source(name, _json_positions(text, name))
    if _brackets(text) > _DEEPEST * 8:  # the parser would take seconds to fail
        raise PlanError("nested too deeply for a plan", where=name)
    marked = _parse_yaml(text, name)
    _check_size(marked, name)
    return _plain(marked), Source(name, dict(_positions(marked, ())))


def _json_positions(text: str, name: str) -> dict[Loc, tuple[int, int]]:
    """The places in valid JSON, all of which but for a few characters is YAML; none where these few stand."""
    try:
        marked = _marked(text.replace("\t", " "))  # YAML refuses tabs; in JSON they only stand between tokens
        return dict(_positions(marked, ()))
    except DuplicateKeyError as error:
        raise _duplicate(name, error) from None
    except (YAMLError, ValueError):
        json.loads(text, object_pairs_hook=functools.partial(_check_unique, name))
        return {}


def _check_unique(name: str, pairs: list[tuple[str, Any]]) -> None:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise PlanError(f"duplicate key {key!r}", where=name)


def _marked(text: str) -> Any:
    reader = YAML(typ="rt", pure=True)
    reader.composer.warn_double_anchors = False  # YAML 1.2 allows them; the warning would quote the file
    return reader.load(io.StringIO(text))


def _duplicate(name: str, error: DuplicateKeyError) -> PlanError:
    key = re.search(r'found duplicate key "(.*?)"', str(error.problem))
    first = (f"first given at line {error.context_mark.line + 1}",) if error.context_mark else ()
    message = f"duplicate key {key.group(1)!r}" if key else str(error.problem)
    return PlanError(message, where=_mark(name, error), notes=first)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return _marked(text)
    except DuplicateKeyError as error:
        raise _duplicate(name, error) from None
    except MarkedYAMLError as error:
        raise _mistake(text.splitlines(), name, error) from None
    except TypeError:  # ruamel's, of a key that cannot be one
        raise PlanError("a key is text, found a list or a mapping", where=name) from None
    except (YAMLError, ValueError) as error:  # ruamel raises a bare one for a few broken scalars
        raise PlanError(f"not YAML: {str(error).splitlines()[0]}", where=name) from None


def _mistake(lines: Sequence[str], name: str, error: MarkedYAMLError) -> PlanError:
    """Say what the parser says, at the place where the mistake is and not where the parser noticed it."""
    place = _without_colon(lines, error)
    if place is not None:
        row, column = place
        found = lines[row][column:].strip()[:60]
        notes = ("a colon and a space stand behind each key",)
        return PlanError(
            f"not YAML: expected key: value, found {found!r}", where=f"{name}:{row + 1}:{column + 1}", notes=notes
        )
    context = f"{error.context}: " if error.context else ""
    said = f"{context}{error.problem}".replace("\n", " ")
    return PlanError(f"not YAML: {said}", where=_mark(name, error), notes=_yaml_notes(lines, error))


def _without_colon(lines: Sequence[str], error: MarkedYAMLError) -> tuple[int, int] | None:
    """The row and column of a key without a colon, which the parser notices at the next one."""
    if "simple key" in str(error.context) and error.context_mark:
        return error.context_mark.line, error.context_mark.column
    if "mapping values are not allowed" not in str(error.problem):
        return None
    above = next((row for row in reversed(range(error.problem_mark.line)) if lines[row].strip()), None)
    if above is None or re.search(r":(\s|$)", lines[above]):
        return None
    return above, len(lines[above]) - len(lines[above].lstrip(" -"))


def _yaml_notes(lines: Sequence[str], error: MarkedYAMLError) -> tuple[str, ...]:
    """What to do about it."""
    mark, problem = error.problem_mark, str(error.problem)
    line, column = (lines[mark.line], mark.column) if mark and mark.line < len(lines) else ("", 0)
    comparison = re.search(r"\bstage['\"]?\s*:\s*(>=?\s*\d+)", line)
    if "escape" in problem:
        return (_ESCAPE_HINT,)
    if comparison:
        return stage_notes(comparison.group(1))
    if "'\\t'" in problem:
        return ("write spaces, not a tab" if line[:column].strip(" \t-") else "indent with spaces, not a tab",)
    if _IN_A_PATTERN.fullmatch(line[max(column - 1, 0) : column + 1]):
        return (_QUOTE_HINT,)
    if problem.startswith("expected ',' or") and error.context_mark:
        return (f"a comma is missing, or the bracket at line {error.context_mark.line + 1} is not closed",)
    return ()


def _brackets(text: str) -> int:
    """The most brackets that are open anywhere; those in strings count, so a limit has to be generous."""
    steps = (1 if char in "[{" else -1 for char in text if char in "[]{}")
    return max(itertools.accumulate(steps), default=0)


def _mark(name: str, error: MarkedYAMLError) -> str:
    at_the_end = error.context_mark and re.search("end of stream|stream end", str(error.problem))
    mark = error.context_mark if at_the_end else error.problem_mark  # where it begins is a place in the file
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
                yield (*loc, key, KEY), (line + 1, column + 1)
            yield from _positions(value, (*loc, key))
    elif isinstance(node, CommentedSeq):
        for index, value in enumerate(node):
            line, column = node.lc.item(index)
            yield (*loc, index), (line + 1, column + 1)
            yield from _positions(value, (*loc, index))


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
        raise refusal(error, source) from None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
