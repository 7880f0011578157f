"""Reading plans: every mistake with its place, whole error texts beside the files in ``plans/bad``."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from freezeplan import apply_plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model
from freezeplan.plan.catalogue import shipped
from freezeplan.plan.load import load_plan, read_data
from freezeplan.plan.schema import Plan, Rule

BAD = Path(__file__).parents[1] / "plans" / "bad"
FILES = sorted(file.name for file in BAD.iterdir() if file.suffix != ".txt")


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_every_mistake_in_its_place(name, monkeypatch, golden):
    """Every mistake of a file is reported at once with file, line and column, what was found and what to do."""
    monkeypatch.chdir(BAD)

    with pytest.raises(PlanError) as error:
        load_plan(name)

    golden(BAD / f"{name}.txt", f"{error.value}\n")


COLON = "\n  a colon and a space stand behind each key"
COMMA = "\n  a comma is missing, or the bracket at line 3 is not closed"
AT_A_TAB = "not YAML: while scanning for the next token: found character '\\t' that cannot start any token\n  "
MAPPING = "not YAML: while parsing a flow mapping: expected ',' or '}', but got "
PLACES = [
    pytest.param("  - match: a\n    frozen true\n", "4:5: not YAML: expected key: value, found 'frozen true'" + COLON),
    pytest.param(
        "  - match: a\n    frozen true\n  - match: b\n    lr_mult: 1\n",
        "4:5: not YAML: expected key: value, found 'frozen true'" + COLON,
    ),
    pytest.param("  - {match: a}\nname x\n", "4:1: not YAML: expected key: value, found 'name x'" + COLON),
    pytest.param("  - match a\n\n    frozen: true\n", "3:5: not YAML: expected key: value, found 'match a'" + COLON),
    pytest.param("  - match: a\n     frozen: true\n", "4:12: not YAML: mapping values are not allowed here"),
    pytest.param("  - match: a: b\n", "3:13: not YAML: mapping values are not allowed here"),
    pytest.param("\t- {match: a, frozen: true}\n", f"3:1: {AT_A_TAB}indent with spaces, not a tab"),
    pytest.param("  - match: a\n\tfrozen: true\n", f"4:1: {AT_A_TAB}indent with spaces, not a tab"),
    pytest.param("  - match:\ta\n", f"3:11: {AT_A_TAB}write spaces, not a tab"),
    pytest.param("  - {match: a frozen: true}\n", f"3:21: {MAPPING}':'{COMMA}"),
    pytest.param("  - {match: 'a' frozen: true}\n", f"3:17: {MAPPING}'<scalar>'{COMMA}"),
    pytest.param("  - {match: a, frozen: true\n  - {match: b}\n", f"4:5: {MAPPING}'{{'{COMMA}"),
    pytest.param("  - {match: a, frozen: true\n", f"3:5: {MAPPING}'<stream end>'{COMMA}"),
    pytest.param(
        "  - {match: 'a, frozen: true}\n",
        "3:13: not YAML: while scanning a quoted scalar: found unexpected end of stream",
    ),
]


@pytest.mark.parametrize(("rules", "message"), PLACES)
def test_a_mistake_of_yaml_is_named_where_it_is(rules, message, tmp_path, monkeypatch):
    """Not where the parser notices it, which may be behind the end of the file; with a hint that can be the reason."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"version: 1\nrules:\n{rules}", encoding="utf-8")
    with pytest.raises(PlanError) as error:
        load_plan("a.yaml")

    assert str(error.value) == f"a.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "place"), [("version 1\nrules: [{match: a}]\n", "1:1"), ("version: 1\nrules\n  - {match: a}\n", "2:1")]
)
def test_a_key_at_the_top_without_a_colon_is_named(text, place, tmp_path):
    """The first one, or the one above the rules."""
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as error:
        load_plan(file)

    assert str(error.value).startswith(f"{file}:{place}: not YAML: expected key: value, found '")


def test_an_error_can_be_sent_to_another_process():
    """An error keeps its problems, one for each mistake, through a pickle."""
    with pytest.raises(PlanError) as error:
        load_plan({"version": 2, "rules": []})
    again = pickle.loads(pickle.dumps(error.value))

    assert (type(again), str(again), again.problems) == (PlanError, str(error.value), error.value.problems)
    assert [problem.where for problem in again.problems] == ["version", "rules"]


def test_every_golden_has_its_bad_file():
    """A mistake's text stands beside the file that makes it."""
    assert sorted(file.stem for file in BAD.glob("*.txt")) == FILES


PRESETS = (
    "bitfit, discriminative, frozen_stages_1, frozen_stages_2, frozen_stages_3, frozen_stages_4, frozen_stem, full, "
    "gradual_unfreeze, head_then_all, linear_probe, llrd, llrd_65, lp_ft, norm_and_head, norm_only, surgical_first, "
    "surgical_last, voc_vgg16/frozen_convs, voc_vgg16/low_conv_lr, voc_vgg16/same_lr, voc_vgg16/scratch"
)

MISSING = [
    pytest.param("plan.yml", "plan.yml: no such file\n  did you mean 'plan.yaml', 'plan.toml'?", id="near-name"),
    pytest.param(
        Path("below/pln.yaml"), "below/pln.yaml: no such file\n  did you mean 'plan.yaml'?", id="near-name-below"
    ),
    pytest.param("nowhere/plan.yaml", "nowhere/plan.yaml: no such file", id="no-such-folder"),
    pytest.param("folder.yaml", "folder.yaml: cannot be read: Is a directory", id="folder"),
    pytest.param(
        "below",
        "below: is a folder, expected a plan file or the name of a preset\n"
        "  a plan file ends in one of .yaml .yml .toml .json",
        id="folder-without-suffix",
    ),
    pytest.param("a\0.yaml", "a\\x00.yaml: no name of a file: embedded null byte", id="zero-in-the-name"),
    pytest.param(
        "linear_prob",
        "no preset is called 'linear_prob'\n  did you mean 'linear_probe'?\n"
        "  a plan file ends in one of .yaml .yml .toml .json",
        id="preset-near-name",
    ),
    pytest.param(
        "plan.txt",
        f"no preset is called 'plan.txt'\n  presets: {PRESETS}\n  a plan file ends in one of .yaml .yml .toml .json",
        id="other-suffix",
    ),
]


@pytest.mark.parametrize(("plan", "message"), MISSING)
def test_a_missing_plan_is_refused_with_what_is_near(plan, message, tmp_path, monkeypatch):
    """A file or preset that does not exist is answered with the nearest names."""
    (tmp_path / "below").mkdir()
    (tmp_path / "folder.yaml").mkdir()
    for name in ("plan.yaml", "plan.toml", "below/plan.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(PlanError) as error:
        load_plan(plan)

    assert str(error.value) == message


class SomeModel:
    """A model is told by its parameters, as plans know nothing of torch."""

    named_parameters = None


ORDER = "\n  the order is resolve_plan(plan, model) and apply_plan(model, plan)"
NO_PLANS = [
    pytest.param(SomeModel(), f"a SomeModel{ORDER}", id="model"),
    pytest.param(SomeModel, f"a type{ORDER}", id="class"),
    pytest.param(None, "a NoneType", id="nothing"),
    pytest.param(3, "a int", id="number"),
    pytest.param(b"full", "a bytes", id="bytes"),
    pytest.param(
        [Rule(match=".*", lr_mult=1)],
        "a list\n  rules stand in a mapping: {'version': 1, 'rules': [...]}",
        id="rules",
    ),
    pytest.param((), "a tuple\n  rules stand in a mapping: {'version': 1, 'rules': [...]}", id="no-rules"),
    pytest.param(Rule(match=".*", lr_mult=1), "a Rule", id="rule"),
]


@pytest.mark.parametrize(("given", "found"), NO_PLANS)
def test_what_is_no_plan_is_refused(given, found):
    """Arguments in the wrong order, nothing, the rules alone."""
    with pytest.raises(PlanError) as error:
        load_plan(given)

    assert str(error.value) == f"a plan is a Plan, a mapping, a path or the name of a preset; found {found}"


def test_arguments_in_the_wrong_order():
    """Both calls, with a real model."""
    model = create_model("test_resnet", meta=True)
    for call in (lambda: resolve_plan(model, "full"), lambda: apply_plan("full", model)):
        with pytest.raises(PlanError) as error:
            call()

        expected = "a plan is a Plan, a mapping, a path or the name of a preset; found a ResNet"
        assert str(error.value) == expected + ORDER


SAME = Plan(
    version=1, name="two parts", rules=[Rule(match=r"features\.0", lr_mult=0.2), Rule(match=[".*"], frozen=True)]
)
FORMATS = [
    pytest.param(
        "plan.yaml",
        "version: 1\nname: two parts\nrules:\n  - {match: features\\.0, lr_mult: 0.2}\n  - {match: .*, frozen: true}\n",
        id="yaml",
    ),
    pytest.param(
        "plan.YML",
        'version: 1\nname: two parts\nrules:\n- match: "features\\\\.0"\n  lr_mult: 2e-1\n'
        "- match:\n  - '.*'\n  frozen: True\n",
        id="yaml-block-style",
    ),
    pytest.param(
        "plan.yaml",
        "\ufeff%YAML 1.2\r\n---\r\nversion: 1\r\nname: two parts\r\nrules:\r\n- {match: features\\.0, lr_mult: .2}\r\n"
        "- {match: .*, frozen: true}\r\n",
        id="yaml-from-windows",
    ),
    pytest.param(
        "plan.json",
        '{"version": 1, "name": "two parts", "rules": [\n\t{"match": "features\\\\.0", "lr_mult": 0.2},\n'
        '\t{"match": ".*", "frozen": true}]}',
        id="json",
    ),
    pytest.param(
        "plan.json",
        '\ufeff\t{"version": 1, "name": "two parts",\r\n"rules":\t[\r\n{"match": "features\\\\.0", "lr_mult":\t2e-1},'
        '\r\n{"match": [".*"], "frozen": true}\t]}',
        id="json-from-windows",
    ),
    pytest.param(
        "plan.toml",
        "\ufeffversion = 1\r\nname = 'two parts'\r\n[[rules]]\r\nmatch = 'features\\.0'\r\nlr_mult = 0.2\r\n"
        "[[rules]]\r\nmatch = '.*'\r\nfrozen = true\r\n",
        id="toml-from-windows",
    ),
    pytest.param(
        "plan.toml",
        "version = 1\nname = 'two parts'\n[[rules]]\nmatch = 'features\\.0'\nlr_mult = 0.2\n"
        "[[rules]]\nmatch = ['.*']\nfrozen = true\n",
        id="toml",
    ),
    pytest.param(
        "plan.toml",
        'version = 1\nname = "two parts"\nrules = [{match = "features\\\\.0", lr_mult = 2e-1},'
        " {match = '.*', frozen = true}]\n",
        id="toml-inline",
    ),
]


@pytest.mark.parametrize(("name", "text"), FORMATS)
def test_one_plan_in_three_formats(name, text, tmp_path):
    """YAML, JSON and TOML say the same plan, from any editor on any system."""
    file = tmp_path / name
    file.write_bytes(text.encode())

    assert load_plan(file) == SAME
    assert load_plan(str(file)) == SAME


def json_with(text):
    """A plan that says some text in JSON."""
    return f'{{"version": 1, "description": {text}, "rules": [{{"match": ".*", "lr_mult": 1}}]}}'


NOT_YAML = [
    pytest.param('{"version"\n: 1, "rules": [{"match": ".*", "lr_mult": 1}]}', id="line-ahead-of-colon"),
    pytest.param('{"version": 1, "rules": [{"match": ".*", "lr_mult"\t\r\n\r\n: 1}]}', id="lines-deep-inside"),
    pytest.param(json_with(f'"{"[" * 300}"'), id="many-brackets"),
]


@pytest.mark.parametrize("text", NOT_YAML)
def test_json_is_read_where_it_is_no_yaml(text, tmp_path):
    """The places are found by a parser of YAML, which does not allow all that JSON does."""
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode())

    assert load_plan(file).rules == (Rule(match=".*", lr_mult=1),)


@pytest.mark.parametrize("char", ["\x7f", "\x80", "\uffff", "\ufffe"])
def test_characters_of_json_that_yaml_has_not(char, tmp_path):
    """What is wrong is said of the value, as in any plan, and not of the file."""
    file = tmp_path / "plan.json"
    file.write_text(json_with(f'"a{char}"'), encoding="utf-8")
    with pytest.raises(PlanError) as error:
        load_plan(file)

    found = f"description: expected printable characters and ends of lines, found {f'a{char}'!a}"
    assert str(error.value) == f"{file}: {found}"
    assert read_data(file)[0]["description"] == f"a{char}"


TWICE = [
    pytest.param(
        '{"version": 1,\n "a": {"b": 1,\n "b": 2}}', ":3:2: duplicate key 'b'\n  first given at line 2", id="yaml"
    ),
    pytest.param('{"version"\n: 1, "a": {"b": 1, "b": 2}}', ": duplicate key 'b'", id="behind-what-is-no-yaml"),
    pytest.param('{"version": 1, "version": 1, "name": "\x7f"}', ": duplicate key 'version'", id="ahead-of-it"),
    pytest.param('{"version": "\x7f", "a": [{}, {"b": 1, "c": {"b": 1}, "b": 1}]}', ": duplicate key 'b'", id="list"),
]


@pytest.mark.parametrize(("text", "message"), TWICE)
def test_a_key_that_is_given_twice_is_an_error_in_any_json(text, message, tmp_path):
    """With its place where that is known."""
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError) as error:
        load_plan(file)

    assert str(error.value) == f"{file}{message}"


def test_what_a_plan_can_be_given_as(tmp_path):
    """A plan is given as a Plan, a dict, a path or the name of a preset, everywhere alike."""
    data = {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}
    file = tmp_path / "plan.json"
    file.write_text('{"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}')
    plan = load_plan(data)

    assert load_plan(plan) is plan
    assert load_plan(file) == plan
    assert load_plan(str(file)) == plan
    assert load_plan("full").rules == plan.rules
    assert load_plan(Path("voc_vgg16/same_lr")).name == "voc_vgg16/same_lr"
    assert data == {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}


SCALARS = [
    pytest.param("1e-3", 0.001, id="exponent"),
    pytest.param("1E+2", 100.0, id="upper-case-exponent"),
    pytest.param(".5", 0.5, id="no-leading-zero"),
    pytest.param("+1", 1.0, id="plus"),
    pytest.param("017", 17.0, id="no-octal"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_numbers_are_those_of_yaml_1_2(text, value, tmp_path):
    """In YAML 1.2, 1e-3 is a number and 017 is seventeen."""
    file = tmp_path / "plan.yaml"
    file.write_text(f"version: 1\nrules: [{{match: .*, lr_mult: {text}}}]\n")

    assert load_plan(file).rules[0].lr_mult == value


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y", "12:30:45"])
def test_words_stay_words(word, tmp_path):
    """In YAML 1.2, no, off and 12:30:45 are text: a module called no is matched by it."""
    file = tmp_path / "plan.yaml"
    file.write_text(f"version: 1\nname: {word}\nrules: [{{match: {word}, lr_mult: 1}}]\n")
    plan = load_plan(file)

    assert (plan.name, plan.rules[0].match) == (word, (word,))


def test_anchors_and_merged_keys_say_it_once(tmp_path):
    """YAML anchors let a plan say a rate once and use it in many rules."""
    file = tmp_path / "plan.yaml"
    file.write_text(
        "version: 1\nrules:\n  - &slow {match: layer1, lr_mult: 0.1}\n"
        "  - {<<: *slow, match: layer2}\n  - {match: .*, lr_mult: 1}\n"
    )

    assert [(rule.match, rule.lr_mult) for rule in load_plan(file).rules] == [
        (("layer1",), 0.1),
        (("layer2",), 0.1),
        ((".*",), 1.0),
    ]


def test_a_plan_remembers_where_it_was_written(tmp_path, monkeypatch):
    """Later errors name the line of a rule, also after the file is read."""
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text("version: 1\nrules:\n  - match: features\n    lr_mult: 0.2\n")
    Path("plan.toml").write_text("version = 1\nrules = [{match = 'features', lr_mult = 0.2}]\n")
    yaml, toml = load_plan("plan.yaml").source, load_plan("plan.toml").source

    assert yaml.where(("rules", 0)) == "plan.yaml:3:5"
    assert yaml.where(("rules", 0, "lr_mult")) == "plan.yaml:4:14"
    assert yaml.line(("rules", 0)) == ", line 3"
    assert (toml.where(("rules", 0)), toml.line(("rules", 0))) == ("plan.toml:2:9", "")
    assert load_plan(load_plan("plan.yaml").model_dump()).source.where(("rules", 0)) == ""


def test_presets_are_plans_with_their_own_names():
    """Every preset is a plan that says its own name and what it is for."""
    presets = {name: load_plan(name) for name in shipped()}

    assert ", ".join(presets) == PRESETS
    assert {name: plan.name for name, plan in presets.items()} == {name: name for name in presets}
    assert all(plan.description for plan in presets.values())
    assert presets["linear_probe"].source.where(("rules", 0)) == "linear_probe.yaml:8:5"
