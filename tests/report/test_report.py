"""Decisions as data: JSON, counts, and the folded tree."""

from __future__ import annotations

import json

import pytest
from torch import nn

from freezeplan.api import resolve_plan
from freezeplan.model.describer import create_model
from freezeplan.report.rows import as_json, count, rule_line, tree

CATCH_ALL = {"match": ".*", "lr_mult": 1}


def plan_of(*rules, **keys):
    return {"version": 1, "rules": list(rules), **keys}


def toy():
    block = [nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Dropout(0.1)]
    return nn.ModuleDict({"body": nn.Sequential(*block), "head": nn.Linear(2, 3)})


def test_a_resolution_as_json():
    """A resolution is plain data of a fixed shape: counts, groups, one entry for each tensor, rules and remarks."""
    plan = plan_of(
        {"match": "head", "lr_mult": 0.5, "wd_mult": 2, "reinit": True},
        {"match": r"body\.1", "frozen": True, "mode": "train"},
        {"match": "stem", "frozen": True, "optional": True},
        default={"frozen": True},
        name="mine",
    )
    found = as_json(resolve_plan(plan, toy()))
    frozen = {"frozen": True, "lr_mult": None, "reinit": False, "aliases": []}
    rate = {"lr_mult": 0.5, "rates": [0.5]}
    trained = {"frozen": False, "lr_mult": 0.5, "mode": "train", "reinit": True, "rule": 1, "aliases": []}

    assert found == {
        "model": "ModuleDict",
        "parts": {},
        "plan": "mine",
        "frozen": {"tensors": 3, "elements": 8},
        "trainable": {"tensors": 2, "elements": 9},
        "groups": [
            {"name": "lr_mult=0.5, wd_mult=2", "wd_mult": 2.0, "tensors": 1, "elements": 6} | rate,
            {"name": "lr_mult=0.5, no decay", "wd_mult": 0.0, "tensors": 1, "elements": 3} | rate,
        ],
        "tensors": [
            {"name": "body.0.weight", "shape": [2, 2], "wd_mult": 1.0, "mode": "eval", "rule": None} | frozen,
            {"name": "body.1.weight", "shape": [2], "wd_mult": 0.0, "mode": "train", "rule": 2} | frozen,
            {"name": "body.1.bias", "shape": [2], "wd_mult": 0.0, "mode": "train", "rule": 2} | frozen,
            {"name": "head.weight", "shape": [3, 2], "wd_mult": 2.0} | trained,
            {"name": "head.bias", "shape": [3], "wd_mult": 0.0} | trained,
        ],
        "rules": [
            {"rule": 1, "text": "match: head", "where": "", "matched": 2, "decided": 2},
            {"rule": 2, "text": r"match: body\.1", "where": "", "matched": 2, "decided": 2},
            {"rule": 3, "text": "match: stem", "where": "", "matched": 0, "decided": 0},
        ],
        "phases": [],
        "hints": [],
        "unplaced": [],
        "random": [],
        "alive": ["body.1"],
    }
    assert json.loads(json.dumps(found)) == found


def test_a_base_rate_gives_the_rates_of_tensors_and_groups():
    """Beside the multipliers, one for each phase in a group; what is frozen has none."""
    found = as_json(resolve_plan("head_then_all", create_model("test_resnet", meta=True)), 1e-3)
    tensors = {tensor["name"]: tensor["lr"] for tensor in found["tensors"]}

    assert found["lr"] == 1e-3
    assert {(group["name"], *group["lrs"]) for group in found["groups"]} == {
        ("lr_mult=frozen/1", None, 1e-3),
        ("lr_mult=frozen/1, no decay", None, 1e-3),
        ("lr_mult=1", 1e-3, 1e-3),
        ("lr_mult=1, no decay", 1e-3, 1e-3),
    }
    assert (tensors["layer1.0.conv1.weight"], tensors["fc.weight"]) == (None, 1e-3)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("preset", ["linear_probe", "full", "bitfit", "norm_and_head"])
def test_the_counts_of_a_report_add_up(architecture, preset):
    """Frozen and trainable, the groups and the tensors of a report are the model's parameters."""
    model = create_model(architecture, num_classes=10, meta=True)
    found = as_json(resolve_plan(preset, model))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}

    assert {entry["name"]: entry["shape"] for entry in found["tensors"]} == shapes
    assert found["frozen"]["elements"] + found["trainable"]["elements"] == sum(p.numel() for p in model.parameters())
    assert sum(group["elements"] for group in found["groups"]) == found["trainable"]["elements"]
    assert sum(group["tensors"] for group in found["groups"]) == found["trainable"]["tensors"]


def outline(node):
    """A tree as text: one line for each node."""

    def lines(node, depth):
        yield "  " * depth + f"{node.name}: {node.decision or '-'} ({node.tensors}, {node.elements}, x{node.alike})"
        for child in node.children:
            yield from lines(child, depth + 1)

    return list(lines(node, 0))


def blocks(count, **last):
    parts = [nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)) for _ in range(count)]
    return nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": nn.Sequential(*parts), **last})


TREES = [
    pytest.param(
        [{"match": "blocks", "frozen": True}, CATCH_ALL],
        ["ModuleDict: - (14, 38, x1)", "  stem: lr x 1, rule 2 (2, 6, x1)", "  blocks: frozen, rule 1 (12, 32, x1)"],
        id="a-part-with-one-decision-is-a-leaf",
    ),
    pytest.param([CATCH_ALL], ["ModuleDict: lr x 1, rule 1 (14, 38, x1)"], id="one-decision-is-one-line"),
    pytest.param(
        [{"role": "norm", "frozen": True}, CATCH_ALL],
        [
            "ModuleDict: - (14, 38, x1)",
            "  stem: lr x 1, rule 2 (2, 6, x1)",
            "  blocks: - (12, 32, x1)",
            "    0..3: - (12, 32, x4)",
            "      0: lr x 1, rule 2 (1, 4, x1)",
            "      1: frozen, rule 1 (2, 4, x1)",
        ],
        id="equal-neighbours-are-one",
    ),
    pytest.param(
        [{"match": r"blocks\.[01]", "lr_mult": 0.1}, {"match": "blocks", "lr_mult": 0.5, "reinit": True}, CATCH_ALL],
        [
            "ModuleDict: - (14, 38, x1)",
            "  stem: lr x 1, rule 3 (2, 6, x1)",
            "  blocks: - (12, 32, x1)",
            "    0..1: lr x 0.1, reinit, rule 1 (6, 16, x2)",
            "    2..3: lr x 0.5, reinit, rule 2 (6, 16, x2)",
        ],
        id="neighbours-that-differ-are-two",
    ),
    pytest.param(
        [{"role": "norm", "mode": "eval"}, {"match": "stem", "frozen": True, "mode": "train"}, CATCH_ALL],
        [
            "ModuleDict: - (14, 38, x1)",
            "  stem: frozen, train, rule 2 (2, 6, x1)",
            "  blocks: - (12, 32, x1)",
            "    0..3: - (12, 32, x4)",
            "      0: lr x 1, rule 3 (1, 4, x1)",
            "      1: lr x 1, eval, rule 3 (2, 4, x1)",
        ],
        id="a-mode-is-said-where-it-is-not-the-usual-one",
    ),
]


@pytest.mark.parametrize(("rules", "expected"), TREES)
def test_the_tree_says_each_decision_once(rules, expected):
    """The tree folds to the shortest outline: one line for each part that shares a decision."""
    assert outline(tree(resolve_plan(plan_of(*rules), blocks(4)))) == expected


def test_the_default_is_named_in_the_tree():
    """What the plan's default decides says so."""
    found = tree(resolve_plan(plan_of({"match": "stem", "lr_mult": 1}, default={"frozen": True}), blocks(1)))

    assert outline(found)[-1] == "  blocks: frozen, default (3, 8, x1)"


def test_every_leaf_of_the_tree_together_is_the_model():
    """The leaves of a tree hold every tensor once."""
    resolution = resolve_plan("bitfit", create_model("test_vit", meta=True))

    def leaves(node):
        return [leaf for child in node.children for leaf in leaves(child)] if node.children else [node]

    top = tree(resolution)
    assert sum(child.tensors for child in top.children) == top.tensors == len(resolution.rows)
    assert sum(child.elements for child in top.children) == top.elements == count(resolution.rows)["elements"]
    assert {leaf.frozen for leaf in leaves(top)} == {True, False}


def test_a_rule_that_decides_modules_alone_says_so():
    """It matches tensors too, all of which a rule above decides."""
    above = {"role": "norm", "mode": "eval"}
    plan = {"version": 1, "rules": [above, {"match": "norm.*", "mode": "train"}, {"match": ".*", "lr_mult": 1}]}
    model = nn.Sequential()
    model.norm = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
    resolution = resolve_plan(plan, model)

    assert rule_line(resolution.uses[1], resolution) == (
        "rule 2 (match: norm.*) matches 2 tensors and decides none of them, but the mode of 2 modules without "
        "parameters; 2 were decided by rule 1"
    )


def test_one_module_is_no_plural():
    """A rule with mode alone, on the one dropout behind the pooling."""
    plan = {"version": 1, "rules": [{"match": "head_drop", "mode": "eval"}, {"match": ".*", "lr_mult": 1}]}
    resolution = resolve_plan(plan, create_model("test_vit", meta=True))

    assert rule_line(resolution.uses[0], resolution) == (
        "rule 1 (match: head_drop) matched 0, decided 0, and the mode of 1 module without parameters"
    )
