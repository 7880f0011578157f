"""Plans from people who mean no good, and from broken disks: an error within a second, nothing else."""

from __future__ import annotations

import json
import random
import re
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from freezeplan import FreezePlanError, load_plan
from freezeplan.model.description import Description, Module, Tensor
from freezeplan.plan import regex
from freezeplan.plan.catalogue import shipped
from freezeplan.plan.dump import dump
from freezeplan.plan.schema import Phase, Plan, Plateau, Rule
from freezeplan.resolve.resolver import resolve

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
    "deep-key.yaml": ("? {a: {b: 1}}\n: 2\n", "a key is text, found a list or a mapping"),
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
    with pytest.raises(regex.SlowPatternError) as error:
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


def toml(value):
    """A value as TOML writes it inside a line; its strings are JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def written(data, suffix):
    """A plan's data as a file of this kind holds them."""
    if suffix == ".toml":
        return "".join(f"{json.dumps(str(key))} = {toml(part)}\n" for key, part in data.items())
    return json.dumps(data, indent=2)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_mutated_plans(suffix, tmp_path):
    """2,500 a format: bytes of every preset, changed at random: a plan or an error, each within a second of work."""
    chance = random.Random(0)
    plans = [load_plan(name) for name in shipped()]
    if suffix == ".yaml":
        texts = [path.read_bytes() for path in shipped().values()] + [dump(plan).encode() for plan in plans]
    else:
        data = [plan.model_dump(mode="json", exclude_defaults=True) for plan in plans]
        texts = [written(found, suffix).encode() for found in data]
    path = tmp_path / f"plan{suffix}"
    for text, plan in zip(texts, plans, strict=False):
        path.write_bytes(text)
        assert load_plan(path) == plan
    found: set[str] = set()
    loaded, slowest = 0, 0.0
    for _ in range(2_500):
        path.write_bytes(mutated(chance.choice(texts), chance))
        begun = time.process_time()
        try:
            load_plan(path)
            loaded += 1
        except FreezePlanError as error:
            found.add(str(error))
        slowest = max(slowest, time.process_time() - begun)

    assert 50 < loaded < 2_400
    assert all(found)
    assert slowest < 1


KEYS = st.sampled_from([*Plan.model_fields, *Rule.model_fields, *Phase.model_fields, *Plateau.model_fields])
LEAVES = st.one_of(
    st.sampled_from(["head", ".*", "a|b", "(a", "25%", "eval", "timm", "1..3", "x\x1b", 0, 1, 0.5, True, None]),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


def nested(keys):
    """Lists and mappings of anything."""
    return st.recursive(
        LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(keys, part, max_size=4), max_leaves=12
    )


MEANT = {
    "match": [".*", "layer1", ["a", "b"]],
    "role": ["head", ["norm", "bias"]],
    "stage": [1, "2..", [0, "-1"]],
    "type": ["Conv.*"],
    "lr_mult": [0.5, 1],
    "wd_mult": [0, 2.5],
    "mode": ["eval"],
    "reinit": [True, False],
    "optional": [True],
    "default": [{"frozen": True}, {"lr_mult": 1}],
    "layer_decay": [0.7],
    "name": ["a plan"],
    "description": ["two\nlines"],
    "overlap": ["first", "error"],
    "until": [1, "25%", {"metric": "loss", "patience": 2}],
}
"""What may stand under a key; mostly it does."""


def some(**needed):
    """A mapping with keys of these names, most of whose values are meant and the others anything."""
    values = {key: st.sampled_from(MEANT[key] * 20) | LEAVES | nested(KEYS) for key in needed.pop("optional")}
    return st.fixed_dictionaries(needed, optional=values)


RULES = st.lists(
    some(
        match=st.sampled_from([".*", "fc"]), lr_mult=st.just(1), optional=["role", "stage", "wd_mult", "mode", "reinit"]
    )
    | some(type=st.just("Conv.*"), mode=st.just("eval"), optional=["match", "optional", "reinit"]),
    min_size=1,
    max_size=3,
)
PLANS = st.one_of(
    st.dictionaries(KEYS, nested(KEYS), max_size=6),
    st.dictionaries(KEYS | LEAVES, nested(KEYS | LEAVES), max_size=6),
    some(version=st.just(1), rules=RULES, optional=["default", "name", "description", "layer_decay", "overlap"]),
    some(
        version=st.just(1),
        rules=RULES,
        phases=st.tuples(
            some(name=st.just("one"), until=st.just(3), optional=["description"])
            | some(name=st.just("one"), optional=["until"]),
            st.fixed_dictionaries({"name": st.just("two") | LEAVES, "rules": RULES}),
        ).map(list),
        optional=["name"],
    ),
)


def holds_none(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(holds_none, parts))


@pytest.mark.slow
def test_data_with_the_keys_of_plans(tmp_path):
    """1,250 times as a dict and as a file: with the three tests above, ten thousand plans."""
    loaded, slowest = [], [0.0]

    @settings(max_examples=1_250, suppress_health_check=list(HealthCheck))
    @given(PLANS, st.sampled_from([".yaml", ".toml", ".json"]))
    def check(data, suffix):
        path = tmp_path / f"plan{suffix if not holds_none(data) else '.json'}"
        path.write_text(written(data, path.suffix), encoding="utf-8", errors="surrogatepass")
        for plan in (data, path):
            begun = time.process_time()
            with suppress(FreezePlanError):
                loaded.append(load_plan(plan))
            slowest.append(time.process_time() - begun)

    check()
    assert len(slowest) > 2_500
    assert 100 < len(loaded) < 2_400
    assert max(slowest) < 1
