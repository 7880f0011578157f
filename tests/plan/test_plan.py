"""The plan language as data: what is accepted, what is refused, and that a plan cannot change."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from freezeplan.errors import PlanError
from freezeplan.plan.load import load_plan
from freezeplan.plan.schema import Plan, Rate, Rule

ALL = {"match": ".*", "lr_mult": 1}


def with_rule(**rule):
    return {"version": 1, "rules": [rule]}


ACCEPTED_RULES = [
    pytest.param({"match": "features", "frozen": True}, {"match": "features", "frozen": True}, id="frozen"),
    pytest.param({"match": "features", "lr_mult": 1}, {"match": "features", "lr_mult": 1.0}, id="whole-number-rate"),
    pytest.param({"match": "a", "lr_mult": 1e-3}, {"match": "a", "lr_mult": 0.001}, id="small-rate"),
    pytest.param({"match": ["a"], "lr_mult": 2}, {"match": "a", "lr_mult": 2.0}, id="list-of-one-is-one"),
    pytest.param({"match": ["a", "b"], "lr_mult": 2}, {"match": ["a", "b"], "lr_mult": 2.0}, id="list"),
    pytest.param({"match": ("a", "b"), "lr_mult": 2}, {"match": ["a", "b"], "lr_mult": 2.0}, id="tuple"),
    pytest.param({"role": "norm", "mode": "eval"}, {"role": "norm", "mode": "eval"}, id="mode-alone"),
    pytest.param(
        {"role": ["head", "bias"], "match": "fc", "frozen": True},
        {"match": "fc", "role": ["head", "bias"], "frozen": True},
        id="role-and-match",
    ),
    pytest.param({"match": "a", "wd_mult": 0}, {"match": "a", "wd_mult": 0.0}, id="no-decay"),
    pytest.param({"match": "a", "reinit": False}, {"match": "a", "reinit": False}, id="keep-values"),
    pytest.param(
        {"match": "a", "lr_mult": 0.1, "wd_mult": 2, "mode": "train", "reinit": True, "optional": True},
        {"match": "a", "lr_mult": 0.1, "wd_mult": 2.0, "mode": "train", "reinit": True, "optional": True},
        id="every-setting",
    ),
]


@pytest.mark.parametrize(("rule", "dumped"), ACCEPTED_RULES)
def test_a_rule_is_accepted(rule, dumped):
    """A rule selects with match, role or both, and sets a rate, wd_mult, layer_decay, mode or reinit."""
    plan = load_plan(with_rule(**rule))

    assert plan.model_dump(mode="json", exclude_defaults=True) == {"version": 1, "rules": [dumped]}


REJECTED_RULES = [
    pytest.param(
        {"match": "a", "lr_mult": 0},
        "rules[0].lr_mult: lr_mult must be greater than 0, found 0; to freeze, say frozen: true",
        id="lr_mult-zero",
    ),
    pytest.param(
        {"match": "a", "lr_mult": -0.0},
        "rules[0].lr_mult: lr_mult must be greater than 0, found 0; to freeze, say frozen: true",
        id="lr_mult-minus-zero",
    ),
    pytest.param(
        {"match": "a", "lr_mult": "0.2"},
        "rules[0].lr_mult: lr_mult must be a number, found '0.2' (text)",
        id="lr_mult-text",
    ),
    pytest.param(
        {"match": "a", "lr_mult": True}, "rules[0].lr_mult: lr_mult must be a number, found true", id="lr_mult-true"
    ),
    pytest.param(
        {"match": "a", "lr_mult": False}, "rules[0].lr_mult: lr_mult must be a number, found false", id="lr_mult-false"
    ),
    pytest.param(
        {"match": "a", "lr_mult": -1}, "rules[0].lr_mult: lr_mult must be greater than 0, found -1", id="lr_mult-below"
    ),
    pytest.param(
        {"match": "a", "lr_mult": float("inf")},
        "rules[0].lr_mult: lr_mult must be a finite number, found inf",
        id="lr_mult-infinite",
    ),
    pytest.param(
        {"match": "a", "lr_mult": float("nan")},
        "rules[0].lr_mult: lr_mult must be a finite number, found nan",
        id="lr_mult-nan",
    ),
    pytest.param(
        {"match": "a", "frozen": "yes"},
        "rules[0].frozen: frozen can only be true, found 'yes'; to train, give lr_mult instead",
        id="frozen-text",
    ),
    pytest.param(
        {"match": "a", "frozen": 1},
        "rules[0].frozen: frozen can only be true, found 1; to train, give lr_mult instead",
        id="frozen-number",
    ),
    pytest.param(
        {"match": "a", "frozen": True, "lr_mult": 1},
        "rules[0]: a rule has frozen or lr_mult, not both",
        id="both-rates",
    ),
    pytest.param(
        {"match": "a", "wd_mult": -1}, "rules[0].wd_mult: wd_mult must be 0 or greater, found -1", id="wd_mult-below"
    ),
    pytest.param(
        {"match": "a", "wd_mult": "1"},
        "rules[0].wd_mult: wd_mult must be a number, found '1' (text)",
        id="wd_mult-text",
    ),
    pytest.param(
        {"match": "a", "wd_mult": True}, "rules[0].wd_mult: wd_mult must be a number, found true", id="wd_mult-true"
    ),
    pytest.param(
        {"match": "a", "mode": "evil"},
        "rules[0].mode: mode is one of 'eval' or 'train', found 'evil' (text)\n  did you mean 'eval'?",
        id="mode-unknown",
    ),
    pytest.param(
        {"match": "a", "mode": True},
        "rules[0].mode: mode is one of 'eval' or 'train', found true",
        id="mode-true",
    ),
    pytest.param(
        {"match": "a", "reinit": "true"},
        "rules[0].reinit: reinit must be true or false, found 'true' (text)",
        id="reinit-text",
    ),
    pytest.param(
        {"match": "a", "reinit": 1}, "rules[0].reinit: reinit must be true or false, found 1", id="reinit-number"
    ),
    pytest.param(
        {"match": "a", "lr_mult": 1, "optional": "no"},
        "rules[0].optional: optional must be true or false, found 'no' (text)",
        id="optional-text",
    ),
    pytest.param({"match": [], "lr_mult": 1}, "rules[0].match: an empty list selects nothing", id="match-empty-list"),
    pytest.param({"role": [], "lr_mult": 1}, "rules[0].role: an empty list selects nothing", id="role-empty-list"),
    pytest.param({"match": "", "lr_mult": 1}, "rules[0].match[0]: an empty pattern matches no name", id="match-empty"),
    pytest.param(
        {"match": ["a", 1], "lr_mult": 1}, "rules[0].match[1]: match must be text, found 1", id="match-number-in-list"
    ),
    pytest.param(
        {"match": "blocks.(0|1", "lr_mult": 1},
        "rules[0].match[0]: pattern 'blocks.(0|1' is not a regular expression: "
        "missing ), unterminated subpattern at character 8",
        id="match-no-regex",
    ),
    pytest.param(
        {"role": "nrom", "lr_mult": 1},
        "rules[0].role[0]: role is one of "
        "'head', 'stem', 'body', 'norm', 'bias', 'pos_embed' or 'no_weight_decay', found 'nrom' (text)\n"
        "  did you mean 'norm'?",
        id="role-unknown",
    ),
    pytest.param(
        {"lr_mult": 1}, "rules[0]: a rule selects with match, type, role or stage; this one has none", id="no-selector"
    ),
    pytest.param(
        {"match": "a", "optional": True},
        "rules[0]: a rule sets something: frozen, lr_mult, wd_mult, layer_decay, mode or reinit",
        id="no-setting",
    ),
    pytest.param(
        {"match": "a", "lr_mul": 0.2},
        "rules[0].lr_mul: unknown key 'lr_mul'\n  did you mean 'lr_mult', 'wd_mult'?",
        id="key-near-another",
    ),
    pytest.param(
        {"match": "a", "lr_mult": 1, "warm_up_epochs": 3},
        "rules[0].warm_up_epochs: unknown key 'warm_up_epochs'\n"
        "  known keys: match, type, role, stage, frozen, lr_mult, wd_mult, layer_decay, mode, reinit, optional",
        id="key-near-nothing",
    ),
]


@pytest.mark.parametrize(("rule", "message"), REJECTED_RULES)
def test_a_rule_is_refused_with_its_reason(rule, message):
    """Types are strict and every refusal says what was found and what was expected."""
    with pytest.raises(PlanError) as error:
        load_plan(with_rule(**rule))

    assert str(error.value) == message


REJECTED_PLANS = [
    pytest.param({"rules": [ALL]}, "the key 'version' is missing\n  start the plan with 'version: 1'", id="no-version"),
    pytest.param({"version": 1}, "the key 'rules' is missing", id="no-rules"),
    pytest.param(
        {"version": "1", "rules": [ALL]},
        "version: version is 1, the number, found '1'; this freezeplan reads version 1",
        id="version-text",
    ),
    pytest.param(
        {"version": 2, "rules": [ALL]},
        "version: version is 1, the number, found 2; this freezeplan reads version 1",
        id="version-2",
    ),
    pytest.param(
        {"version": True, "rules": [ALL]},
        "version: version is 1, the number, found True; this freezeplan reads version 1",
        id="version-true",
    ),
    pytest.param({"version": 1, "rules": []}, "rules: a plan has at least one rule, found an empty list", id="empty"),
    pytest.param(
        {"version": 1, "rules": [ALL, "features"]},
        "rules[1]: a rule must be a mapping of keys to values, found 'features' (text)",
        id="rule-is-text",
    ),
    pytest.param({"version": 1, "name": 3, "rules": [ALL]}, "name: name must be text, found 3", id="name-is-a-number"),
    pytest.param(
        {"version": 1, "rules": [ALL], "default": {"lr_mult": "0.1"}},
        "default.lr_mult: lr_mult must be a number, found '0.1' (text)",
        id="default-text",
    ),
    pytest.param(
        {"version": 1, "rules": [ALL], "default": {"lr_mul": 1}},
        "default.lr_mul: unknown key 'lr_mul'\n  did you mean 'lr_mult'?",
        id="default-unknown-key",
    ),
    pytest.param(
        {"version": 1, "rules": [ALL], "seeds": []},
        "seeds: unknown key 'seeds'\n"
        "  known keys: version, name, description, rules, default, layer_decay, layer_decay_min_scale, "
        "weight_decay, overlap, phases",
        id="unknown-key",
    ),
    pytest.param(
        {"version": 2, "rules": [{"match": "a", "lr_mult": 0}, {"frozen": True}]},
        "version: version is 1, the number, found 2; this freezeplan reads version 1\n\n"
        "rules[0].lr_mult: lr_mult must be greater than 0, found 0; to freeze, say frozen: true\n\n"
        "rules[1]: a rule selects with match, type, role or stage; this one has none",
        id="several-at-once",
    ),
]


@pytest.mark.parametrize(("data", "message"), REJECTED_PLANS)
def test_a_plan_is_refused_with_every_reason_at_once(data, message):
    """A plan with three mistakes is refused once with three reasons."""
    with pytest.raises(PlanError) as error:
        load_plan(data)

    assert str(error.value) == message


def test_a_plan_cannot_change():
    """A plan, its rules and the lists in them are frozen, so a plan can be a key of a dict."""
    plan = Plan(version=1, rules=[{"match": ["a", "b"], "frozen": True}])
    same = Plan(version=1, rules=[Rule(match=["a", "b"], frozen=True)])

    assert {plan: "found"}[same] == "found"
    assert plan.rules[0].match == ("a", "b")
    with pytest.raises(ValidationError, match="Instance is frozen"):
        plan.name = "other"
    with pytest.raises(ValidationError, match="Instance is frozen"):
        plan.rules[0].lr_mult = 2.0


def test_default_is_exactly_one_rate():
    """The default is one rate: frozen, or a multiple of the learning rate."""
    assert Plan(version=1, rules=[ALL], default={"frozen": True}).default == Rate(frozen=True)
    assert Plan(version=1, rules=[ALL], default={"lr_mult": 0.5}).default == Rate(lr_mult=0.5)
    for neither_nor in ({}, {"frozen": True, "lr_mult": 1}):
        with pytest.raises(PlanError):
            load_plan({"version": 1, "rules": [ALL], "default": neither_nor})


RULE_TEXTS = [
    pytest.param({"match": "features"}, "match: features", id="one"),
    pytest.param({"match": ["a", "b"]}, "match: [a, b]", id="list"),
    pytest.param({"role": "norm", "match": "layer1"}, "match: layer1, role: norm", id="both"),
]


@pytest.mark.parametrize(("selectors", "text"), RULE_TEXTS)
def test_a_rule_is_quoted_as_a_reader_would_write_it(selectors, text):
    """Reports name a rule by its selectors."""
    assert Rule(**selectors, frozen=True).text == text


def test_plans_compare_by_what_they_say(tmp_path):
    """Two plans that say the same are equal, whatever they were written in."""
    file = tmp_path / "plan.yaml"
    file.write_text("version: 1\nrules: [{match: [head], lr_mult: 1}]\n")

    assert load_plan(file) == Plan(version=1, rules=[Rule(match="head", lr_mult=1.0)])
    assert load_plan(file) != Plan(version=1, rules=[Rule(match="head", lr_mult=2.0)])


def test_title_is_the_name_or_else_the_file(tmp_path, monkeypatch):
    """A plan without a name is called by its file in reports."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("version: 1\nrules: [{match: .*, lr_mult: 1}]\n")

    assert load_plan("mine.yaml").title == "mine.yaml"
    assert load_plan("linear_probe").title == "linear_probe"
    assert Plan(version=1, rules=[ALL]).title == "plan"


def test_the_json_schema_forbids_what_the_plan_forbids():
    """The JSON schema forbids unknown keys and knows the words of the language, so editors can complete them."""
    schema = Plan.model_json_schema()
    rule = schema["$defs"]["Rule"]
    pattern = {"type": "string", "minLength": 1}
    role = {"type": "string", "enum": ["head", "stem", "body", "norm", "bias", "pos_embed", "no_weight_decay"]}

    stage, ranged = {"type": "integer"}, {"type": "string", "pattern": r"^(?:-?\d+|(?:-?\d+)?\.\.(?:-?\d+)?)$"}

    def choices(entry):
        return [c for part in entry["anyOf"] for c in choices(part)] if "anyOf" in entry else [entry]

    assert (schema["additionalProperties"], rule["additionalProperties"]) == (False, False)
    assert schema["$defs"]["Rate"]["additionalProperties"] is False
    assert schema["required"] == ["version", "rules"]
    assert {key: choices(entry)[:-1] for key, entry in rule["properties"].items() if key != "optional"} == {
        "match": [pattern, {"type": "array", "items": pattern, "minItems": 1}],
        "type": [pattern, {"type": "array", "items": pattern, "minItems": 1}],
        "role": [role, {"type": "array", "items": role, "minItems": 1}],
        "stage": [stage, ranged, {"type": "array", "items": {"anyOf": [stage, ranged]}, "minItems": 1}],
        "frozen": [{"const": True, "type": "boolean"}],
        "lr_mult": [{"exclusiveMinimum": 0, "type": "number"}],
        "wd_mult": [{"minimum": 0, "type": "number"}],
        "layer_decay": [{"exclusiveMinimum": 0, "maximum": 1, "type": "number"}],
        "mode": [{"enum": ["eval", "train"], "type": "string"}],
        "reinit": [{"type": "boolean"}],
    }
    assert all(entry["description"] for entry in rule["properties"].values())


printable = st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" ")
patterns = st.one_of(
    st.sampled_from([".*", "features", r"blocks\.[0-3]", r".*\.bias", r"(?!head).*", r"a{1,2}"]),
    st.text(printable, min_size=1, max_size=8).map(re.escape),
)
roles = st.sampled_from(["head", "stem", "body", "norm", "bias", "pos_embed", "no_weight_decay"])
stages = st.one_of(st.integers(-3, 9), st.sampled_from(["..2", "3..", "1..3", "..-2"]))
multipliers = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
decays = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
rates = st.one_of(st.fixed_dictionaries({"frozen": st.just(True)}), st.fixed_dictionaries({"lr_mult": multipliers}))


@st.composite
def rules(draw):
    one_or_more = {"match": patterns, "type": patterns, "role": roles, "stage": stages}
    selectors = draw(st.lists(st.sampled_from(["match", "type", "role", "stage"]), min_size=1, unique=True))
    rule = {key: draw(st.lists(one_or_more[key], min_size=1, max_size=3)) for key in selectors}
    others = st.fixed_dictionaries(
        {}, optional={"wd_mult": decays, "mode": st.sampled_from(["eval", "train"]), "reinit": st.booleans()}
    )
    settings = {**draw(st.one_of(st.just({}), rates)), **draw(others)} or draw(rates)
    return Rule(**rule, **settings, optional=draw(st.booleans()))


names = st.none() | st.text(printable, max_size=10)
plans = st.builds(
    Plan,
    version=st.just(1),
    name=names,
    description=names,
    rules=st.lists(rules(), min_size=1, max_size=4),
    default=st.none() | rates.map(lambda rate: Rate(**rate)),
)


@given(plans)
def test_a_dumped_plan_loads_as_the_same_plan(plan):
    """What a plan is dumped to, as data or as JSON text, is read back as an equal plan."""
    assert load_plan(plan.model_dump(mode="json", exclude_defaults=True)) == plan
    assert load_plan(plan.model_dump(mode="json")) == plan
    assert load_plan(plan.model_dump()) == plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
