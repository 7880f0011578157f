"""Places in a TOML file, which its parser does not give: a part of the data -> (line, column). No torch.

The document is cut into statements, each parsed on its own by ``tomllib``: a header, or a key with its value. What is
written inside a value, in a list of inline tables for one, has the place of the value.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from freezeplan.plan.location import Loc

_PART = r"""(?:[\w-]+|"(?:\\.|[^"\\])*"|'[^']*')"""
_KEY = re.compile(rf"\s*{_PART}(?:\s*\.\s*{_PART})*\s*=\s*")

_CLOSES = re.compile(r"""[]}"']""")
"""What the last line of a value of several lines has."""


def toml_places(text: str) -> Iterator[tuple[Loc, tuple[int, int], tuple[int, int]]]:
    r"""Yield each key of a valid document: its path, the place of the key, the place of its value; both from 1.

    Args:
        text: A TOML document that ``tomllib`` accepts.

    Examples:
        >>> list(toml_places('version = 1\n\n[[rules]]\nmatch = ".*"'))
        [(('version',), (1, 1), (1, 11)), (('rules', 0), (3, 1), (3, 1)), (('rules', 0, 'match'), (4, 1), (4, 9))]
    """
    table: Loc = ()
    last: dict[Loc, int] = {}  # list of tables -> index of the latest one
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        statement, first = lines[number], number + 1
        number += 1
        place = (first, len(statement) - len(statement.lstrip()) + 1)
        if key := _KEY.match(statement):
            found = _parsed(statement)
            while found is None and number < len(lines):
                statement += f"\n{lines[number]}"
                found = _parsed(statement) if _CLOSES.search(lines[number]) else None
                number += 1
            depth = len(re.findall(_PART, key.group()))
            for part in _keys(found, depth):
                yield (*table, *part), place, (first, key.end() + 1)
        elif place[1] <= len(statement) and statement[place[1] - 1] == "[":
            table = ()
            for part in _keys(_parsed(statement)):
                table = (*table, part[-1])
                if statement.lstrip().startswith("[[") and part == _keys(_parsed(statement))[-1]:
                    last[table] = last.get(table, -1) + 1
                if table in last:
                    table = (*table, last[table])
            yield table, place, place


def _parsed(statement: str) -> Any:
    """The data of one statement; None where it goes on in the next line."""
    try:
        return tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return None


def _keys(data: Any, depth: int | None = None) -> list[Loc]:
    """The paths to a statement's key and to the keys above it, outermost first."""
    found: list[Loc] = []
    while isinstance(data, dict) and data and len(found) != depth:
        ((key, data),) = data.items()
        found.append((*(found[-1] if found else ()), key))
    return found
