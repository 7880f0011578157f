"""The fields of a plan: what each key may hold, how it is checked, and how it is written again. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from freezeplan.plan.regex import objection

Role = Literal["head", "stem", "body", "norm", "bias", "pos_embed", "no_weight_decay"]
ROLES: tuple[Role, ...] = Role.__args__  # type: ignore[attr-defined]
Mode = Literal["eval", "train"]

_STAGE = re.compile(r"-?\d+|(?:-?\d+)?\.\.(?:-?\d+)?")

SELECTORS = ("match", "type", "role", "stage")
"""The keys of a rule that select; all that are given must hold."""

SETTINGS = ("rate", "wd_mult", "layer_decay", "mode", "reinit")
"""What a rule can set; the rate by one of two keys, ``frozen`` and ``lr_mult``."""


def _check_pattern(pattern: str) -> str:
    if not pattern:
        raise PydanticCustomError("bad_pattern", "an empty pattern matches no name")
    reason = objection(pattern) or ("" if pattern.isprintable() else "has characters that cannot be printed")
    if reason:
        facts = {"pattern": _short(pattern), "reason": reason}
        raise PydanticCustomError("bad_pattern", "pattern {pattern} {reason}", facts)
    return pattern


def check_printable(text: str) -> str:
    """Refuse what a terminal would obey, and ends of lines."""
    if not text.isprintable():
        raise PydanticCustomError(
            "not_printable", "expected printable characters on one line, found {found}", {"found": _short(text)}
        )
    return text


def check_lines(text: str) -> str:
    """Refuse what a terminal would obey, but for ends of lines."""
    if not all(line.isprintable() for line in text.split("\n")):
        raise PydanticCustomError(
            "not_printable", "expected printable characters and ends of lines, found {found}", {"found": _short(text)}
        )
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:60]}...")


def _check_multiplier(value: object) -> object:
    if value == 0 and not isinstance(value, bool):
        raise PydanticCustomError(
            "lr_mult_zero", "lr_mult must be greater than 0, found 0; to freeze, say frozen: true"
        )
    return value


def _check_frozen(value: object) -> object:
    if value is not True:
        raise PydanticCustomError(
            "frozen_not_true",
            "frozen can only be true, found {found}; to train, give lr_mult instead",
            {"found": repr(value)},
        )
    return value


def check_version(value: object) -> object:
    """Refuse any version of the language but 1."""
    if isinstance(value, bool) or value != 1:
        raise PydanticCustomError(
            "bad_version",
            "version is 1, the number, found {found}; this freezeplan reads version 1",
            {"found": repr(value)},
        )
    return value


def _check_not_empty(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise PydanticCustomError("empty_list", "an empty list selects nothing")
    return values


def check_stage(value: object) -> str:
    """Normalise to text: ``2``, ``-1``, ``1..3``, ``..2``, ``3..``."""
    text = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    if not _STAGE.fullmatch(text) or text == "..":
        raise PydanticCustomError(
            "bad_stage",
            "stage is an integer or a range, 2, -1, 1..3, ..2 or 3.., found {found}",
            {"found": repr(value)},
        )
    first, _, last = text.partition("..")
    if first and last and (first[0] == "-") == (last[0] == "-") and int(first) > int(last):
        raise PydanticCustomError(
            "stage_backwards", "stage {first}..{last} runs backwards", {"first": first, "last": last}
        )
    return text


def _stage_out(value: tuple[str, ...]) -> object:
    """Dump a single stage as the integer that it was."""
    written = [text if ".." in text else int(text) for text in value]
    return written[0] if len(written) == 1 else written


def _one_or_more(schema: dict[str, Any]) -> Any:
    """Let a list be written as its only element, in files, in the JSON schema and when dumped again."""
    return (
        AfterValidator(_check_not_empty),
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        PlainSerializer(lambda value: value[0] if len(value) == 1 else list(value), when_used="json-unless-none"),
        WithJsonSchema({"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}),
    )


Pattern = Annotated[str, Field(strict=True), AfterValidator(_check_pattern)]
Multiplier = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), BeforeValidator(_check_multiplier)]
LayerDecay = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Frozen = Annotated[Literal[True], BeforeValidator(_check_frozen)]

_string: dict[str, Any] = {"type": "string", "minLength": 1}
_role: dict[str, Any] = {"type": "string", "enum": list(ROLES)}
patterns, roles = _one_or_more(_string), _one_or_more(_role)
_stage: dict[str, Any] = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": rf"^(?:{_STAGE.pattern})$"}]}
stages = (
    AfterValidator(_check_not_empty),
    BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,)),
    PlainSerializer(_stage_out, when_used="json-unless-none"),
    WithJsonSchema({"anyOf": [_stage, {"type": "array", "items": _stage, "minItems": 1}]}),
)
