"""What pydantic found wrong with a plan -> one error: each mistake a sentence, in its place, with what to do."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from freezeplan.errors import PlanError, Problem, did_you_mean
from freezeplan.plan.location import Loc, Source, loc_text
from freezeplan.plan.schema import Plan, Rate, Rule
from freezeplan.plan.toml_places import KEY

_EXPECTED = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be {ge:g} or greater",
    "finite_number": "must be a finite number",
    "tuple_type": "must be a list or one value",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
}
"""What a value must be, in words, by the type of pydantic's error."""


def refusal(error: ValidationError, source: Source) -> PlanError:
    """Return what pydantic found as one error, each mistake in its place.

    Args:
        error: What the models of a plan raised.
        source: Where the plan was written.

    Examples:
        >>> try:
        ...     Plan(version=1, rules=[{"match": "fc", "lr_mul": 1}])
        ... except ValidationError as error:
        ...     print(refusal(error, Source("plan.yaml")))
        plan.yaml: rules[0].lr_mul: unknown key 'lr_mul'
          did you mean 'lr_mult', 'wd_mult'?
    """
    return PlanError(_problem(source, found) for found in error.errors(include_url=False))


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
        loc = (*loc, KEY)
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
        if kind == "bad_stage":
            notes = stage_notes(found)
        elif kind == "stage_backwards":
            notes = ("write {last}..{first}".format(**error["ctx"]),)
    where = source.where(loc)
    place = loc_text(tuple(part for part in loc if part != KEY))
    if not source.positions:
        where = ": ".join(filter(None, (source.file, place)))
    return Problem(message, where, notes)


def stage_notes(found: object) -> tuple[str, ...]:
    """Say how a stage is written that was given as a comparison; a bare ``>2`` begins a block of text in YAML.

    Examples:
        >>> stage_notes(">= 2")
        ('write 2..',)
    """
    text = str(found)
    comparison = re.fullmatch(r"([<>])(=?)\s*(\d+)", text)
    if comparison:
        sign, equal, number = comparison.groups()
        bound = int(number) + (0 if equal else 1 if sign == ">" else -1)
        return (f"write {bound}.." if sign == ">" else f"write ..{bound}",)
    if not text.strip():
        return ("in YAML a > or | without quotes begins a block of text; for all behind stage 2 write 3..",)
    return ()


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
