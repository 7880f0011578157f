"""Places in TOML: every key of any document that the parser accepts is found where it stands."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from freezeplan.plan.toml_places import toml_places

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


def test_every_way_to_write_a_key_is_found() -> None:
    """Tables, lists of tables, tables below them, dotted and quoted keys, values over several lines."""
    lines = DOCUMENT.split("\n")
    found = {loc: (key, value) for loc, key, value in toml_places(DOCUMENT)}

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
    ["1", '"te # xt"', "'li = teral'", "[1, 2]", "[\n  1,\n  [2],\n]", '"""\n[x]\ny = 1\n"""', "{a = 1}"]
)


@given(st.lists(st.tuples(st.sampled_from(["t", "u.v", "'w w'"]), st.lists(st.tuples(KEYS, VALUES), max_size=4))))
def test_what_is_found_is_what_the_parser_reads(tables: list[tuple[str, list[tuple[str, str]]]]) -> None:
    """Each key of each list of tables has a path that leads to its value in the parsed document."""
    lines = []
    for name, pairs in tables:
        lines += ["", f"[[{name}]]", *(f"{key} = {value}" for key, value in dict(pairs).items())]
    text = "\n".join(lines)
    data = tomllib.loads(text)

    found = {loc: (key, value) for loc, key, value in toml_places(text)}

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
