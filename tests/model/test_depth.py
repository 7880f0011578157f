"""Stages and layers: where a tensor stands, by timm's own groups wherever it has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
from families import FAMILIES, ZOO
from timm.optim import param_groups_layer_decay

from freezeplan import Plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe

EVERYTHING = {"match": ".*", "lr_mult": 1}


def frozen_by(model: Any, *rules: dict[str, Any]) -> set[str]:
    plan = {"version": 1, "rules": [*rules, EVERYTHING]}
    return {row.name for row in resolve_plan(plan, model).frozen}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_is_timms_tensor_by_tensor(family: str) -> None:
    """The multipliers, the floor and which tensors decay are those of timm.optim.param_groups_layer_decay."""
    model = create_model(ZOO[family]["model"], num_classes=10, meta=True)
    if not hasattr(model, "group_matcher"):
        pytest.skip("timm has no matcher for this architecture; the stages take its place")
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, layer_decay=0.65, min_scale=0.05, no_weight_decay_list=exempt)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"] > 0) for g in groups for p in g["params"]}

    plan = {"version": 1, "layer_decay": 0.65, "layer_decay_min_scale": 0.05, "rules": [EVERYTHING]}
    found = {row.name: (row.lr_mult, row.wd_mult > 0) for row in resolve_plan(plan, model).rows}

    assert found == expected


STAGES = {
    "vgg16": [4, 4, 6, 6, 6],
    "vgg16_bn": [8, 8, 12, 12, 12],
    "resnet50": [3, 30, 39, 57, 30],
    "convnext_tiny": [4, 27, 31, 85, 31],
    "efficientnet_b0": [3, 10, 26, 26, 39, 39, 52, 16],
    "vit_base_patch16_224": [4, *[12] * 11, 14],
    "caformer_s18": [3, 33, 36, 93, 33],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_have_as_many_tensors_as_a_reader_counts(name: str) -> None:
    """VGG16 has five stages of 2, 2, 3, 3 and 3 convolutions and no stem; ResNet-50 a stem and four."""
    counts = Counter(describe(create_model(name, meta=True)).stages.values())

    assert [counts[stage] for stage in sorted(counts)] == STAGES[name]


def test_the_first_three_stages() -> None:
    """Of VGG16 seven convolutions, of ResNet-50 the stem and layer1 to layer3, of ViT-B the embeddings and 3 blocks."""
    vgg = frozen_by(create_model("vgg16", meta=True), {"stage": "..3", "frozen": True})
    resnet = frozen_by(create_model("resnet50", meta=True), {"stage": "..3", "frozen": True})
    vit = frozen_by(create_model("vit_base_patch16_224", meta=True), {"stage": "..3", "frozen": True})

    assert sorted(name for name in vgg if name.endswith("weight")) == [
        f"features.{index}.weight" for index in (0, 10, 12, 14, 2, 5, 7)
    ]
    assert {name.split(".")[0] for name in resnet} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert Counter(".".join(name.split(".")[: 1 + name.startswith("blocks")]) for name in vit) == {
        "cls_token": 1,
        "pos_embed": 1,
        "patch_embed": 2,
        "blocks.0": 12,
        "blocks.1": 12,
        "blocks.2": 12,
    }


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (0, {"conv1", "bn1"}),
        ("1..2", {"layer1", "layer2"}),
        ("3..", {"layer3", "layer4"}),
        (-1, {"layer4"}),
        ("..-3", {"conv1", "bn1", "layer1", "layer2"}),
        ([1, -1], {"layer1", "layer4"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_ways_to_write_a_stage(stage: Any, parts: set[str]) -> None:
    """An integer, a range with open ends, from the top, and a list of them."""
    found = frozen_by(create_model("resnet18", meta=True), {"stage": stage, "frozen": True})

    assert {name.split(".")[0] for name in found} == parts


def test_all_selectors_of_a_rule_must_hold() -> None:
    """type and stage together: the batch norms of one stage."""
    model = create_model("resnet18", meta=True)
    found = frozen_by(model, {"type": "BatchNorm.*", "stage": 1, "match": r".*\.weight", "frozen": True})

    assert sorted(found) == [f"layer1.{block}.bn{number}.weight" for block in (0, 1) for number in (1, 2)]


def test_a_type_takes_the_module_and_all_below() -> None:
    """A container's class selects everything in it."""
    found = frozen_by(create_model("resnet18", meta=True), {"type": "BasicBlock", "frozen": True})

    assert {name.split(".")[0] for name in found} == {"layer1", "layer2", "layer3", "layer4"}


REFUSED = [
    pytest.param(
        {"stage": "5..", "frozen": True},
        "rule 1 (stage: 5..) matches no parameter of resnet18\n"
        "  resnet18 has a stem (stage 0) and 4 stages\n"
        "  a rule that need not match on every model says optional: true",
        id="too-few-stages",
    ),
    pytest.param(
        {"type": "Batchnorm2d", "frozen": True},
        "rule 1 (type: Batchnorm2d) matches no parameter of resnet18\n"
        "  did you mean 'BatchNorm2d', '_BatchNorm'?\n"
        "  a rule that need not match on every model says optional: true",
        id="type",
    ),
    pytest.param(
        {"stage": ">2", "frozen": True},
        "rules[0].stage[0]: stage is an integer or a range, 2, -1, 1..3, ..2 or 3.., found '>2'\n  write 3..",
        id="stage",
    ),
    pytest.param(
        {"stage": "-1..-3", "frozen": True},
        "rules[0].stage[0]: stage -1..-3 runs backwards\n  write -3..-1",
        id="stage-backwards",
    ),
    pytest.param(
        {"stage": 1, "match": "layer4", "frozen": True},
        "rule 1 (match: layer4, stage: 1) matches no parameter of resnet18\n"
        "  resnet18 has a stem (stage 0) and 4 stages\n"
        "  match and stage select something each, and nothing together\n"
        "  a rule that need not match on every model says optional: true",
        id="nothing-together",
    ),
]


@pytest.mark.parametrize(("rule", "message"), REFUSED)
def test_what_does_not_fit_is_refused(rule: dict[str, Any], message: str) -> None:
    """Too deep a stage, a misspelt class, a stage in another notation."""
    with pytest.raises(PlanError) as error:
        frozen_by(create_model("resnet18", meta=True), rule)

    assert str(error.value) == message


def test_depth_of_what_is_not_timms_is_not_known() -> None:
    """Roles and stages of another library's model are an error that says so; match and type work."""
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    with pytest.raises(PlanError) as error:
        frozen_by(
            model,
            {"stage": 1, "frozen": True},
            {"role": "stem", "frozen": True},
            {"role": "no_weight_decay", "frozen": True},
        )

    assert str(error.value) == (
        "ResNet is no timm model and holds none, so its stages are not known; select with match or type\n\n"
        "role stem is not known: ResNet is no timm model and holds none, so its stem is not known; select with match "
        "or type\n\n"
        "role no_weight_decay is not known: ResNet is no timm model and holds none, so its list of tensors without "
        "weight decay is not known; select with match or type"
    )
    assert len(frozen_by(model, {"type": "BatchNorm2d", "frozen": True})) == 40


def test_weight_decay_of_everything() -> None:
    """weight_decay: all gives biases and norms their decay too; timm's rule is the default."""
    model = create_model("resnet18", meta=True)
    timms = resolve_plan({"version": 1, "rules": [EVERYTHING]}, model)
    every = resolve_plan({"version": 1, "weight_decay": "all", "rules": [EVERYTHING]}, model)

    assert {row.wd_mult for row in every.rows} == {1.0}
    assert sum(row.wd_mult for row in timms.rows) == 21


def test_overlap_can_be_an_error() -> None:
    """overlap: error names the two rules, what both set, and a tensor."""
    rules = [
        {"match": "layer1", "frozen": True},
        {"match": "layer.*", "lr_mult": 0.1},
        {"role": "norm", "mode": "eval"},
    ]
    model = create_model("resnet18", meta=True)
    with pytest.raises(PlanError) as error:
        resolve_plan({"version": 1, "overlap": "error", "default": {"lr_mult": 1}, "rules": rules}, model)

    assert str(error.value) == (
        "rules 1 (match: layer1) and 2 (match: layer.*) both set rate on 12 tensors, such as 'layer1.0.conv1.weight'\n"
        "  overlap: error allows no such pair; narrow one of them, or say overlap: first"
    )
    narrow = Plan(version=1, overlap="error", default={"lr_mult": 1}, rules=[rules[0], rules[2]])
    assert len(resolve_plan(narrow, model).frozen) == 12


def test_what_timms_matcher_leaves_out_is_listed() -> None:
    """Never silently: hrnet's 64 tensors behind its stages are in the report of a plan that speaks of depth."""
    model = timm.create_model("hrnet_w18_small", num_classes=10)
    with_depth = resolve_plan({"version": 1, "layer_decay": 0.75, "rules": [EVERYTHING]}, model)

    assert len(with_depth.unplaced) == 64
    assert resolve_plan({"version": 1, "rules": [EVERYTHING]}, model).unplaced == ()
