"""Why a parameter is what it is, what two plans do differently, and the schema that editors complete from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import freezeplan
from freezeplan import Plan, cli, resolve_plan
from freezeplan.errors import ModelError, PlanError
from freezeplan.model.describer import create_model
from freezeplan.report.diff import compare
from freezeplan.report.explain import explain


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_why_names_the_rule_its_place_and_the_rules_behind_it() -> None:
    """Who decided, where it is written, what else matches, and the rate in each phase."""
    code, out, err = run("why", "head_then_all", "resnet18", "layer1.0.bn1.weight", "--lr", "1e-3")

    assert (code, err) == (0, "")
    assert out == (
        "layer1.0.bn1.weight  64\n"
        "group: lr_mult=frozen/1, no decay\n"
        "\n"
        "phase head\n"
        "frozen, wd x 0, eval\n"
        "  rule 1 (role: body) decides rate  head_then_all.yaml:11:9\n"
        "  rule 2 (match: .*) matches, decides nothing here  head_then_all.yaml:14:5\n"
        "\n"
        "phase all\n"
        "lr x 1 = 0.001, wd x 0, train\n"
        "  rule 1 (match: .*) decides rate  head_then_all.yaml:14:5\n"
    )


def test_why_as_json_gives_each_setting_to_the_rule_that_won_it() -> None:
    """The mode of a norm and its rate come from two rules."""
    code, out, _ = run("why", "bitfit", "resnet18", "bn1.bias", "--json")
    (phase,) = json.loads(out)["phases"]

    assert code == 0
    assert [(rule["rule"], rule["decides"]) for rule in phase["rules"]] == [(1, ["mode"]), (2, ["rate"]), (3, [])]
    assert (phase["frozen"], phase["lr_mult"], phase["mode"]) == (False, 1.0, "eval")


def test_why_as_json_gives_the_rate_of_each_phase() -> None:
    """With a base rate beside the multiplier; none where the tensor is frozen."""
    code, out, _ = run("why", "head_then_all", "resnet18", "layer1.0.bn1.weight", "--lr", "1e-3", "--json")

    assert code == 0
    assert [(phase["lr_mult"], phase["lr"]) for phase in json.loads(out)["phases"]] == [(None, None), (1.0, 1e-3)]


def test_why_gives_the_rate_of_the_rule_and_the_decay_apart(tmp_path: Path) -> None:
    """A rule says 1, and layer_decay makes 0.03 of it; with a floor where the plan has one."""
    code, out, _ = run("why", "llrd", "vit_base_patch16_224", "blocks.0.attn.qkv.weight")
    floored = tmp_path / "floored.yaml"
    floored.write_text("{version: 1, layer_decay: 0.5, layer_decay_min_scale: 0.1, rules: [{match: .*, lr_mult: 2}]}")
    _, low, _ = run("why", str(floored), "vit_base_patch16_224", "pos_embed")
    _, data, _ = run("why", str(floored), "vit_base_patch16_224", "pos_embed", "--json")
    (phase,) = json.loads(data)["phases"]

    assert code == 0
    assert out == (
        "blocks.0.attn.qkv.weight  2304 x 768\n"
        "group: lr_mult=0.0316764\n"
        "\n"
        "lr x 0.0316764, wd x 1, train\n"
        "  lr_mult 1 x layer_decay 0.75^12\n"
        "  rule 1 (match: .*) decides rate  llrd.yaml:9:5\n"
    )
    assert low.splitlines()[3:5] == ["lr x 0.2, wd x 0, train", "  lr_mult 2 x layer_decay 0.5^13, at least 0.1"]
    assert phase["decay"] == {"lr_mult": 2.0, "layer_decay": 0.5, "exponent": 13, "min_scale": 0.1}
    assert phase["lr_mult"] == 0.2


def test_why_says_what_timms_matcher_leaves_out() -> None:
    """VGG's first fully connected layer has no place in timm's groups; what is frozen has no decay."""
    _, out, _ = run("why", "llrd", "vgg16", "pre_logits.fc1.weight")
    plan = Plan(version=1, layer_decay=0.5, rules=[{"role": "head", "lr_mult": 1}], default={"frozen": True})
    frozen, head = (
        explain(resolve_plan(plan, create_model("vgg16", meta=True)), name)["phases"][0]
        for name in ("pre_logits.fc1.weight", "head.fc.weight")
    )

    assert "  left out by timm's matcher (layer_decay 1, a stage only by place)\n" in out
    assert (frozen["unplaced"], "decay" in frozen) == (True, False)
    assert (head["unplaced"], head["decay"]["exponent"]) == (False, 0)


def test_why_of_a_module_names_its_tensors() -> None:
    """What was typed exists, and is no parameter."""
    with pytest.raises(ModelError) as error:
        run("why", "full", "resnet18", "layer4")
    with pytest.raises(ModelError) as small:
        run("why", "full", "resnet18", "fc")

    assert str(error.value) == (
        "'layer4' is a module of resnet18, and a parameter is asked for\n"
        "  it holds 'layer4.0.conv1.weight', 'layer4.0.bn1.weight', 'layer4.0.bn1.bias', ..."
    )
    assert str(small.value) == (
        "'fc' is a module of resnet18, and a parameter is asked for\n  it holds 'fc.weight', 'fc.bias'"
    )


@pytest.mark.parametrize("arguments", [("why", "full", "test_vit", "norm.bias"), ("show", "full", "test_vit")])
def test_a_learning_rate_below_zero_is_refused(arguments: tuple[str, ...]) -> None:
    """It is a mistake of the command line."""
    code, out, err = run(*arguments, "--lr", "-1")

    assert (code, out) == (2, "")
    assert "greater than or equal to 0" in " ".join(err.split())


def test_why_says_when_the_default_decided() -> None:
    """A rate that no rule gives is the plan's default."""
    model = create_model("resnet18", meta=True)
    plan = Plan(version=1, rules=[{"role": "head", "lr_mult": 1}], default={"frozen": True})

    assert explain(resolve_plan(plan, model), "conv1.weight")["phases"][0]["rules"] == []


def test_why_of_a_name_that_does_not_exist_offers_the_nearest() -> None:
    """A misspelt parameter is an error with its neighbours."""
    with pytest.raises(ModelError) as error:
        run("why", "full", "resnet18", "fc.weigth")

    assert (
        str(error.value)
        == "resnet18 has no parameter 'fc.weigth'\n  did you mean 'fc.weight', 'conv1.weight', 'bn1.weight'?"
    )


def test_diff_folds_to_modules_and_says_both_sides() -> None:
    """Two arms of the experiment differ in 26 tensors, which is one line; exit code 1."""
    code, out, err = run("diff", "voc_vgg16/frozen_convs", "voc_vgg16/low_conv_lr", "--model", "vgg16")

    assert (code, err) == (1, "")
    assert out == "features  frozen, eval -> lr x 0.2, train  14,714,688 in 26 tensors\n"


def test_diff_as_json() -> None:
    """The same as data."""
    code, out, _ = run("diff", "full", "frozen_stem", "--model", "resnet18", "--json")

    assert code == 1
    assert [(change["name"], change["after"]) for change in json.loads(out)] == [
        ("conv1", "frozen, eval"),
        ("bn1", "frozen, eval"),
    ]


def test_diff_of_plans_that_decide_the_same() -> None:
    """A plan is the same as itself, and equivalent to one that only says it in another way; exit code 0."""
    assert run("diff", "full", "full", "--model", "test_vit") == (0, "the same plan\n", "")
    assert run("diff", "full", "voc_vgg16/same_lr", "--model", "test_vit") == (
        0,
        "equivalent: the same decisions for every tensor\n",
        "",
    )


def test_diff_of_a_plan_with_phases() -> None:
    """A plan without phases is compared with each phase of the other."""
    _, out, _ = run("diff", "linear_probe", "head_then_all", "--model", "test_resnet")

    assert out.splitlines()[0] == "phase all"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["lp_ft", "head_then_all", "--model", "test_vit"],
            "error: the phases do not end at the same places: ['50%', None] and [1, None]\n",
            id="other-phases",
        ),
        pytest.param(
            ["full", "frozen_stem", "--model", "vgg16"],
            "error: frozen_stem.yaml:7:12: rule 1 (role: stem) matches no parameter of vgg16\n"
            "  vgg16 has no stem and 5 stages\n"
            "  a rule that need not match on every model says optional: true\n",
            id="does-not-fit",
        ),
    ],
)
def test_what_cannot_be_compared_is_exit_code_2(arguments: list[str], message: str) -> None:
    """As diff does: 2 is trouble, and never mistaken for a difference."""
    assert run("diff", *arguments) == (2, "", message)


def test_two_models_are_not_compared() -> None:
    """A difference of plans is one on the same tensors."""
    with pytest.raises(PlanError) as error:
        compare(*(resolve_plan("full", create_model(name, meta=True)) for name in ("test_vit", "test_resnet")))

    assert str(error.value) == "two plans are compared on one model; these are test_vit and test_resnet"


def test_schema_is_that_of_the_models() -> None:
    """What editors complete from is generated, so it cannot drift."""
    code, out, _ = run("schema")
    schema = json.loads(out)

    assert code == 0
    assert schema.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert schema == Plan.model_json_schema()


def test_every_preset_points_editors_at_the_schema() -> None:
    """The first line of each names the schema that ships beside it, which is the one that the command prints."""
    package = Path(freezeplan.__file__).parent
    schema = package / "plan.schema.json"

    assert schema.read_text(encoding="utf-8") == run("schema")[1]
    for file in sorted((package / "presets").rglob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (file.parent / first.partition("=")[2]).resolve() == schema
