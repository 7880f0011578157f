"""Places in TOML: every key of any document that the parser accepts is found where it stands."""

from __future__ import annotations

import tomllib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freezeplan.plan import toml_places
from freezeplan.plan.toml_places import KEY

DOCUMENT = '''\
version = 1  # a comment with = and [brackets]
description = """
[[rules]]
match = "not a key"
"""
default.lr_mult = 0.5

[[phases]]
name = "head"
until = { metric = "val_loss", patience = 2 }

  [[phases.rules]]
  role = [
    "head",
    "bias", # and ] more
  ]
  "lr_mult" = 1

[[phases]]
name = 'all'

[[rules]]
match = '.*=.*'
lr_mult = 1
'''


def at(data: Any, loc: tuple[str | int, ...]) -> Any:
    for part in loc:
        data = data[part]
    return data


def keys_and_values(text: str) -> dict[tuple[str | int, ...], Any]:
    """The path to each value -> the places of its key and of itself."""
    found = dict(toml_places.toml_places(text))
    assert found.pop(()) == (1, 1)
    return {loc: (found[*loc, KEY], place) for loc, place in found.items() if loc[-1] != KEY}


def test_every_way_to_write_a_key_is_found() -> None:
    """Tables, lists of tables, tables below them, dotted and quoted keys, values over several lines."""
    lines = DOCUMENT.split("\n")
    found = keys_and_values(DOCUMENT)

    assert found == {
        ("version",): ((1, 1), (1, 11)),
        ("description",): ((2, 1), (2, 15)),
        ("default",): ((6, 1), (6, 19)),
        ("default", "lr_mult"): ((6, 1), (6, 19)),
        ("phases", 0): ((8, 1), (8, 1)),
        ("phases", 0, "name"): ((9, 1), (9, 8)),
        ("phases", 0, "until"): ((10, 1), (10, 9)),
        ("phases", 0, "rules", 0): ((12, 3), (12, 3)),
        ("phases", 0, "rules", 0, "role"): ((13, 3), (13, 10)),
        ("phases", 0, "rules", 0, "lr_mult"): ((17, 3), (17, 15)),
        ("phases", 1): ((19, 1), (19, 1)),
        ("phases", 1, "name"): ((20, 1), (20, 8)),
        ("rules", 0): ((22, 1), (22, 1)),
        ("rules", 0, "match"): ((23, 1), (23, 9)),
        ("rules", 0, "lr_mult"): ((24, 1), (24, 11)),
    }
    assert lines[16][14:] == "1"


KEYS = st.sampled_from(["match", "a-b", "x1", '"quoted = key"', "'lit.eral'"])
VALUES = st.sampled_from(
    [
        "1", '"te # xt"', "'li = teral'", "[1, 2]", "[\n  1,\n  [2],\n]", '"""\n[x]\ny = 1\n"""', "{a = 1}",
        '"a \\" ["', "'\\'", '"""a \\""" [\n """""', "'''\\\n'[''''", "[ # ] \"\n '#', {b = [\n]}\n]", '""', "''''''",
    ]
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["t", "u.v", "'w w'"]), st.lists(st.tuples(KEYS, VALUES), max_size=4))))
def test_what_is_found_is_what_the_parser_reads(tables: list[tuple[str, list[tuple[str, str]]]]) -> None:
    """Each key of each list of tables has a path that leads to its value in the parsed document."""
    lines = []
    for name, pairs in tables:
        lines += ["", f"[[{name}]]", *(f"{key} = {value}" for key, value in dict(pairs).items())]
    text = "\n".join(lines)
    data = tomllib.loads(text)

    found = keys_and_values(text)

    assert len(found) == sum(1 + len(dict(pairs)) for _, pairs in tables)
    for loc, (key, value) in found.items():
        line = text.split("\n")[value[0] - 1]
        assert key[0] == value[0]
        if isinstance(loc[-1], int):
            assert line.startswith("[[")
            assert isinstance(at(data, loc), dict)
        else:
            name, _, written = line.partition(" = ") if line[0] not in "\"'" else line.rpartition(f"{line[0]} = ")
            assert loc[-1] == name.strip("\"'")
            assert line[value[1] - 1 :] == written
            at(data, loc)


@pytest.mark.parametrize(
    "rule",
    [
        "  {{match = 'layer{0}', lr_mult = 0.5}},\n",
        "  {{match = [\n    'layer{0}', # one\n  ], lr_mult = 0.5}},\n",
        "  {{match = '''\nlayer{0}''', lr_mult = 0.5}},\n",
    ],
)
def test_a_value_of_many_lines_is_read_once(rule, monkeypatch) -> None:
    """The parser gets no more text than the document has, however many lines a list of rules takes."""
    text = f"rules = [\n{''.join(map(rule.format, range(200)))}]\n"
    given = []

    def counted(part: str) -> Any:
        given.append(len(part))
        return tomllib.loads(part)

    monkeypatch.setattr(toml_places, "tomllib", SimpleNamespace(loads=counted, TOMLDecodeError=tomllib.TOMLDecodeError))

    assert keys_and_values(text) == {("rules",): ((1, 1), (1, 9))}
    assert sum(given) <= len(text)
