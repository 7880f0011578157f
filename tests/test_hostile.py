"""Plans from people who mean no good, and from broken disks: an error within a second, nothing else."""

from __future__ import annotations

import random
import re
import time

import pytest

from freezeplan import FreezePlanError, load_plan, patterns
from freezeplan.catalogue import shipped
from freezeplan.description import Description, Module, Tensor
from freezeplan.plan import Plan
from freezeplan.resolve import resolve

ALIASES = "version: 1\na: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + at)}: &{chr(98 + at)} [{', '.join([f'*{chr(97 + at)}'] * 9)}]\n" for at in range(9)
)
HOSTILE = {
    "bomb.yaml": (ALIASES, "more than 100,000 values for a plan\n  an alias that holds itself, or others, does this"),
    "deep.yaml": ("rules: " + "[" * 5000 + "]" * 5000, "nested too deeply for a plan"),
    "deep.json": ('{"rules": ' + "[" * 90_000 + "]" * 90_000 + "}", "nested too deeply for a plan"),
    "deep.toml": ("rules = " + "[" * 5000 + "]" * 5000, "nested too deeply for a plan"),
    "tag.yaml": (
        "version: 1\nrules: !!python/object/apply:os.system ['true']\n",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system'; a plan has plain values only",
    ),
    "key.yaml": ("version: 1\nrules:\n  - {{match: a}: frozen}\n", "a key is text, found a CommentedKeyMap"),
    "large.yaml": ("name: " + "x" * 300_000, "300,006 characters; a plan has at most 262,144"),
    "name.yaml": (
        'version: 1\nname: "x\\e[2Jy"\nrules:\n  - {match: .*, lr_mult: 1}\n',
        "2:7: expected printable characters on one line, found 'x\\x1b[2Jy'",
    ),
    "name.json": (
        '{"version": 1, "name": "a\\nb", "rules": [{"match": ".*", "lr_mult": 1}]}',
        "1:24: expected printable characters on one line, found 'a\\nb'",
    ),
    "name.toml": (
        'version = 1\nname = "x\\u202Ey"\nrules = [{match = ".*", lr_mult = 1}]\n',
        "2:8: expected printable characters on one line, found 'x\\u202ey'",
    ),
    "description.yaml": (
        'version: 1\ndescription: "two\\nlines\\a"\nrules:\n  - {match: .*, lr_mult: 1}\n',
        "2:14: expected printable characters and ends of lines, found 'two\\nlines\\x07'",
    ),
    "phase.yaml": (
        'version: 1\nphases:\n  - {name: "\\e]0;x", until: 1}\n  - {name: b}\nrules:\n  - {match: .*, lr_mult: 1}\n',
        "3:12: expected printable characters on one line, found '\\x1b]0;x'",
    ),
    "metric.yaml": (
        'version: 1\nphases:\n  - {name: a, until: {metric: "\\r", patience: 1}}\n  - {name: b}\n'
        "rules:\n  - {match: .*, lr_mult: 1}\n",
        "3:22: expected printable characters on one line, found '\\r'",
    ),
    "pattern.yaml": (
        'version: 1\nrules:\n  - {match: "a\\e[2J]", lr_mult: 1}\n',
        "3:13: pattern 'a\\x1b[2J]' has characters that cannot be printed",
    ),
    "key.toml": (
        '"a\\u001b" = 1\nversion = 1\nrules = [{match = ".*", lr_mult = 1}]\n',
        "1:1: unknown key 'a\\x1b'\n  known keys: " + ", ".join(Plan.model_fields),
    ),
    "zero.yaml": ("version: 1\x00", "not YAML: unacceptable character #x0000: special characters are not allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_sentence(name, tmp_path):
    """Aliases that blow up, depth, tags that would run code, size, and what a terminal would obey."""
    text, message = HOSTILE[name]
    (tmp_path / name).write_text(text)
    begun = time.perf_counter()
    with pytest.raises(FreezePlanError) as error:
        load_plan(tmp_path / name)

    placed = re.match(r"\d+:\d+: ", message)
    assert str(error.value) == f"{tmp_path / name}:{'' if placed else ' '}{message}"
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_numbers_of_thousands_of_digits(suffix, tmp_path):
    """Python refuses to read them, by a bare ValueError."""
    text = {"yaml": "version: {}", "toml": "version = {}", "json": '{{"version": {}}}'}[suffix].format("9" * 5000)
    (tmp_path / f"plan.{suffix}").write_text(text)
    with pytest.raises(FreezePlanError, match=rf"plan\.{suffix}: not {suffix.upper()}: Exceeds the limit"):
        load_plan(tmp_path / f"plan.{suffix}")


def test_patterns_that_never_end_are_stopped(tmp_path):
    """By the place of the rule; on whatever thread, without a signal."""
    pattern = "(a|a)+b"
    (tmp_path / "slow.yaml").write_text(f"version: 1\nrules:\n  - match: '{pattern}'\n    frozen: true\n")
    plan = load_plan(tmp_path / "slow.yaml")
    described = Description("toy", (Tensor("a" * 60, (1,), ""),), (Module("", ("Toy",)),))
    begun = time.perf_counter()
    with pytest.raises(patterns.SlowPatternError) as error:
        resolve(plan, described)

    assert str(error.value) == (
        f"{tmp_path / 'slow.yaml'}:3:5: pattern {pattern!r} takes more than 0.5 seconds\n"
        "  repetitions inside repetitions, or of alternatives that begin alike, try every way to split a name"
    )
    assert time.perf_counter() - begun < 5


def mutated(content, chance):
    """Some bytes changed, taken away, doubled, or moved."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(content)) if content else 0
        way = chance.randrange(4)
        if way == 0 and content:
            content[at] = chance.choice(b"\x00\xff\n\t :-[]{}\"'\\*&!|>#%@`0a.")
        elif way == 1:
            del content[at : at + chance.randint(1, 8)]
        elif way == 2:
            content[at:at] = content[at : at + chance.randint(1, 40)]
        else:
            content[at:at] = bytes(chance.choice(b'\x00\xff\n\t :-[]{}"*&!.(+)?|') for _ in range(chance.randint(1, 5)))
    return bytes(content)


@pytest.mark.slow
def test_ten_thousand_mutated_plans(tmp_path):
    """Bytes of every preset, changed at random: a plan or an error, each within a second of the processor's time."""
    chance = random.Random(0)
    presets = [path.read_bytes() for path in shipped().values()]
    found: set[str] = set()
    path, loaded, slowest = tmp_path / "plan.yaml", 0, 0.0
    for _ in range(10_000):
        path.write_bytes(mutated(chance.choice(presets), chance))
        begun = time.process_time()
        try:
            load_plan(path)
            loaded += 1
        except FreezePlanError as error:
            found.add(str(error))
        slowest = max(slowest, time.process_time() - begun)

    assert 500 < loaded < 9_500
    assert all(found)
    assert slowest < 1
