"""Places in a TOML file, which its parser does not give: a part of the data -> (line, column). No torch.

The document is cut into statements, each of them a header, or a key with its value; ``tomllib`` reads the names in it.
What is written inside a value, in a list of inline tables for one, has the place of the value.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from freezeplan.plan.location import Loc

KEY = "<key>"
"""Behind the path to a value: the place of its key."""

_PART = r"""(?:[\w-]+|"(?:\\.|[^"\\])*"|'[^']*')"""
_AHEAD = re.compile(rf"\s*{_PART}(?:\s*\.\s*{_PART})*\s*=\s*")

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""+'
    r"|'''.*?'''+"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|\#[^\n]*"
    r"|[][{}\n]",
    re.DOTALL,
)
"""Text, a comment, a bracket, the end of a line: what decides where a statement ends."""


def toml_places(text: str) -> Iterator[tuple[Loc, tuple[int, int]]]:
    r"""Yield the place of every part of a valid document: of a value, and under ``(*path, KEY)`` of its key.

    Args:
        text: A TOML document that ``tomllib`` accepts.

    Examples:
        >>> list(toml_places("version = 1"))
        [((), (1, 1)), (('version',), (1, 11)), (('version', '<key>'), (1, 1))]
        >>> dict(toml_places('[[rules]]\nmatch = ".*"'))["rules", 0, "match"]
        (2, 9)
    """
    yield (), (1, 1)
    table: Loc = ()
    last: dict[Loc, int] = {}  # list of tables -> index of the latest one
    for line, statement in _statements(text):
        place = (line, len(statement) - len(statement.lstrip()) + 1)
        if ahead := _AHEAD.match(statement):
            names = _names(f"{ahead.group()}0")
            for end in range(1, len(names) + 1):
                path = (*table, *names[:end])
                yield path, (line, ahead.end() + 1)
                yield (*path, KEY), place
        elif statement.lstrip().startswith("["):
            table = _table(statement, last)
            yield table, place
            yield (*table, KEY), place


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each statement with its first line: it ends where a line does and no text and no bracket is open."""
    line, start, depth = 1, 0, 0
    for token in _TOKEN.finditer(f"{text}\n"):
        depth += (token.group() in "[{") - (token.group() in "]}")
        if token.group() == "\n" and not depth:
            statement = text[start : token.start()]
            yield line, statement
            line, start = line + statement.count("\n") + 1, token.end()


def _table(header: str, last: dict[Loc, int]) -> Loc:
    """The path to the table that a header opens; of a list of tables it is a new one, which is counted."""
    table: Loc = ()
    names = _names(header)
    for end, name in enumerate(names, 1):
        table = (*table, name)
        if end == len(names) and header.lstrip().startswith("[["):
            last[table] = last.get(table, -1) + 1
        if table in last:
            table = (*table, last[table])
    return table


def _names(statement: str) -> list[str]:
    """The names in a header or ahead of a value, outermost first."""
    names: list[str] = []
    data: Any = tomllib.loads(statement)
    while isinstance(data, dict) and data:
        ((name, data),) = data.items()
        names.append(name)
    return names
