"""What a selector selects: the whole-name rule, roles, aliases, and what is said where nothing matches."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from freezeplan.api import resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.model.description import Description, Module, Tensor, prefixes
from freezeplan.plan.schema import Rule
from freezeplan.resolve.select import escaped, explain_miss, match_tensors, select

NAMES = (
    "pos_embed",
    "features.0.weight",
    "features.0.bias",
    "features.1.weight",
    "features.10.weight",
    "features.10.bias",
    "blocks.1.norm.weight",
    "blocks.1.mlp.fc1.weight",
    "blocks.10.norm.weight",
    "head.fc.weight",
    "head.fc.bias",
)


def model_of(names, **roles):
    """A description of tensors with these names, and of every module above them."""
    modules = dict.fromkeys(("", *(part for name in names for part in prefixes(name))))
    return Description(
        "toy",
        tuple(Tensor(name, (2, 3), name.rpartition(".")[0]) for name in names),
        tuple(Module(name, ("Part",)) for name in modules),
        {role: frozenset(of) for role, of in roles.items()},
    )


TOY = model_of(NAMES, head=["head.fc.weight", "head.fc.bias"], bias=[name for name in NAMES if name.endswith("bias")])


PATTERNS = [
    pytest.param("features", {n for n in NAMES if n.startswith("features.")}, id="module-and-all-below"),
    pytest.param(r"features\.1", {"features.1.weight"}, id="features.1-is-not-features.10"),
    pytest.param("features.1", {"features.1.weight"}, id="a-bare-dot-is-one-character"),
    pytest.param(
        r"features\.(0|10)",
        {n for n in NAMES if n.startswith("features") and n != "features.1.weight"},
        id="alternatives",
    ),
    pytest.param("feature", set(), id="a-part-of-a-name-is-nothing"),
    pytest.param("eatures", set(), id="the-end-of-a-name-is-nothing"),
    pytest.param("features.", set(), id="a-dot-at-the-end-is-nothing"),
    pytest.param("blocks.1.", {"blocks.10.norm.weight"}, id="blocks.1.-takes-block-10"),
    pytest.param(r"blocks\.1\..*", {"blocks.1.norm.weight", "blocks.1.mlp.fc1.weight"}, id="all-in-block-1"),
    pytest.param(r".*\.bias", {n for n in NAMES if n.endswith("bias")}, id="every-bias"),
    pytest.param(r".*\.norm", {"blocks.1.norm.weight", "blocks.10.norm.weight"}, id="modules-by-their-last-name"),
    pytest.param(".*", set(NAMES), id="catch-all"),
    pytest.param("pos_embed", {"pos_embed"}, id="parameter-of-the-root"),
    pytest.param("head.fc.weight", {"head.fc.weight"}, id="one-parameter"),
    pytest.param("HEAD", set(), id="case-counts"),
    pytest.param("(?i)HEAD", {"head.fc.weight", "head.fc.bias"}, id="unless-said"),
    pytest.param("head|pos_embed", {"head.fc.weight", "head.fc.bias", "pos_embed"}, id="alternatives-without-brackets"),
    pytest.param("^head$", {"head.fc.weight", "head.fc.bias"}, id="anchors-change-nothing"),
    pytest.param("(?!head).*", {n for n in NAMES if not n.startswith("head")}, id="all-but-the-head"),
    pytest.param("(?=.*bias)features.*", {"features.0.bias", "features.10.bias"}, id="lookahead-needs-the-full-name"),
    pytest.param("features(?!x)", set(), id="a-lookaround-reaches-no-module"),
    pytest.param(
        r".*(?<!norm)\.weight", {n for n in NAMES if n.endswith("weight") and "norm" not in n}, id="lookbehind"
    ),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_a_pattern_selects_by_whole_names(pattern, expected):
    """A pattern matches the whole name of a parameter or of a module above it; with a lookaround, of a parameter."""
    assert match_tensors([pattern], TOY) == expected
    assert set(select(Rule(match=pattern, frozen=True), TOY).tensors) == expected


def test_a_list_means_any_of_them():
    """A list of patterns or roles selects what any of them selects, in the model's order."""
    selection = select(Rule(match=[r"head\.fc\.bias", "pos_embed", "nothing"], frozen=True), TOY)

    assert selection.tensors == ("pos_embed", "head.fc.bias")
    assert select(Rule(role=["head", "bias"], frozen=True), TOY).tensors == (
        "features.0.bias",
        "features.10.bias",
        "head.fc.weight",
        "head.fc.bias",
    )


def test_role_and_match_must_both_hold():
    """A rule with a role and a pattern selects what both select."""
    assert select(Rule(role="bias", match="features", frozen=True), TOY).tensors == (
        "features.0.bias",
        "features.10.bias",
    )
    assert select(Rule(role="head", match="features", frozen=True), TOY).tensors == ()


def test_modules_without_parameters_are_selected_for_their_mode():
    """Dropout and other modules without parameters are selected by name, the root by nothing."""
    toy = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))

    assert select(Rule(match="1", mode="eval"), describe(toy)).modules == ("1", "1.0", "1.1")
    assert select(Rule(match=".*", mode="eval"), describe(toy)).modules == ("1", "1.0", "1.1")
    assert select(Rule(match=".*", mode="eval"), describe(toy)).tensors == ("0.weight", "0.bias")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


@pytest.mark.parametrize("pattern", ["encoder", "decoder.weight", "(?=dec).*weight"])
def test_a_tied_weight_is_one_tensor_under_any_of_its_names(pattern):
    """Tied weights are one tensor; a pattern for any of its names selects it."""
    model = describe(Tied())

    assert [(tensor.name, tensor.aliases) for tensor in model.tensors] == [
        ("encoder.weight", ("decoder.weight",)),
        ("decoder.bias", ()),
    ]
    assert select(Rule(match=pattern, frozen=True), model).tensors == ("encoder.weight",)


def test_the_earliest_rule_for_any_name_of_a_tied_weight_wins():
    """For a tied weight the earliest rule that matches any of its names wins."""
    rules = [{"match": r"tied\.decoder", "lr_mult": 0.1}, {"match": ".*", "lr_mult": 1}]
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "tied": Tied()})

    resolution = resolve_plan({"version": 1, "rules": rules}, model)

    assert [(row.name, row.rule) for row in resolution.rows] == [
        ("first.weight", 2),
        ("first.bias", 2),
        ("tied.encoder.weight", 1),
        ("tied.decoder.bias", 1),
    ]


part = st.text("ab01_", min_size=1, max_size=3)
dotted = st.lists(part, min_size=1, max_size=3).map(".".join)


@given(st.lists(dotted, min_size=1, max_size=12, unique=True), st.data())
def test_a_literal_pattern_matches_itself_and_what_is_below(names, data):
    """A name with its dots escaped selects exactly that parameter, or exactly what is below that module."""
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    model = model_of(names)
    chosen = data.draw(st.sampled_from([name for full in names for name in (*prefixes(full), full)]))

    assert match_tensors([re.escape(chosen)], model) == {
        name for name in names if name == chosen or name.startswith(f"{chosen}.")
    }


@given(st.lists(dotted, min_size=1, max_size=12, unique=True), dotted)
def test_all_but_a_module_is_the_complement_of_that_module(names, chosen):
    """``(?!name(\\.|$)).*`` selects exactly what ``name`` leaves."""
    model = model_of([name for name in names if not any(other.startswith(f"{name}.") for other in names)])
    everything = {tensor.name for tensor in model.tensors}
    literal = re.escape(chosen)

    assert match_tensors([rf"(?!{literal}(\.|$)).*"], model) == everything - match_tensors([literal], model)


MISSES = [
    pytest.param("featuers", ["did you mean 'features'?"], id="near-name"),
    pytest.param(
        "classifier",
        ["top level of toy (tensors): pos_embed (1), features (5), blocks (3), head (2)"],
        id="near-nothing",
    ),
    pytest.param(
        "norm",
        [
            "a pattern must match a whole name; 'blocks.1.norm.weight' only contains it",
            "'.*norm.*' matches 2 tensors",
        ],
        id="only-a-part",
    ),
]


@pytest.mark.parametrize(("pattern", "lines"), MISSES)
def test_a_pattern_that_matches_nothing_is_answered_with_what_is_near(pattern, lines):
    """Where a pattern matches nothing, the nearest names are offered, or the top level of the model."""
    assert explain_miss(pattern, TOY) == tuple(lines)


def test_a_pattern_for_a_module_without_parameters_says_so():
    """A rate for a module without parameters is answered with what that module is."""
    toy = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    assert explain_miss("1", describe(toy)) == ("'1' is a module without parameters (ReLU)",)


ESCAPED = [
    pytest.param("blocks.1.", r"blocks\.1\.", id="bare-dots"),
    pytest.param(r"blocks\.1", r"blocks\.1", id="escaped-already"),
    pytest.param(r".*\.bias", r".*\.bias", id="any-characters"),
    pytest.param(r"a.+b.?c.{2}", r"a.+b.?c.{2}", id="quantifiers"),
    pytest.param("a[.]b", "a[.]b", id="in-a-class"),
]


@pytest.mark.parametrize(("pattern", "strict"), ESCAPED)
def test_the_escaped_form_of_a_pattern(pattern, strict):
    """A dot that no quantifier follows was probably meant as a dot."""
    assert escaped(pattern) == strict


def test_a_role_that_a_model_lacks_is_refused_with_the_reason():
    """A role that timm cannot know for a model is an error that says what to do instead."""
    with pytest.raises(PlanError) as plain:
        resolve_plan("linear_probe", nn.Linear(2, 2))
    with pytest.raises(PlanError) as headless:
        resolve_plan("linear_probe", create_model("test_resnet", num_classes=0, meta=True))

    assert str(plain.value) == (
        "linear_probe.yaml:8:12: role head is not known: Linear is no timm model and holds none, "
        "so its classifier is not known; select it with match"
    )
    assert str(headless.value) == (
        "linear_probe.yaml:8:12: role head is not known: the classifier of test_resnet has no parameters; "
        "create the model with num_classes greater than 0"
    )


NORMS = [
    pytest.param(nn.BatchNorm2d(3), ["0.weight", "0.bias"], id="BatchNorm"),
    pytest.param(nn.LayerNorm(3), ["0.weight", "0.bias"], id="LayerNorm"),
    pytest.param(nn.GroupNorm(1, 3), ["0.weight", "0.bias"], id="GroupNorm"),
    pytest.param(nn.BatchNorm1d(3, affine=False), ["0"], id="without-parameters"),
    pytest.param(nn.LayerNorm(3, elementwise_affine=False), [], id="without-parameters-or-statistics"),
    pytest.param(nn.Linear(3, 3), [], id="Linear"),
]


@pytest.mark.parametrize(("layer", "expected"), NORMS)
def test_what_a_normalisation_layer_is(layer, expected):
    """The role norm is every layer whose class is called so, of one dimension, also one that only keeps statistics."""
    assert describe(nn.Sequential(layer)).roles["norm"] == set(expected)


def test_biases_are_known_by_their_names():
    """The role bias is every parameter called so, those of recurrent layers included."""
    toy = nn.ModuleDict({"fc": nn.Linear(2, 2), "rnn": nn.LSTM(2, 2), "attn": nn.MultiheadAttention(2, 1)})

    assert describe(toy).roles["bias"] == {
        "fc.bias",
        "rnn.bias_ih_l0",
        "rnn.bias_hh_l0",
        "attn.in_proj_bias",
        "attn.out_proj.bias",
    }


def test_describing_reads_and_changes_nothing():
    """A model on the meta device is described like a real one."""
    with torch.device("meta"):
        meta = describe(create_model("test_vit"))

    assert meta == describe(create_model("test_vit"))
