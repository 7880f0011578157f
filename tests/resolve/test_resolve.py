"""Plan x model -> decisions: three sentences, three errors, the modes of modules, and the properties that follow."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from freezeplan.api import resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import create_model, describe
from freezeplan.plan.load import load_plan
from freezeplan.plan.schema import Plan
from freezeplan.report.rows import rule_line
from freezeplan.resolve.resolver import resolve

CATCH_ALL = {"match": ".*", "lr_mult": 1}


def plan_of(*rules, **keys):
    return {"version": 1, "rules": list(rules), **keys}


def toy():
    """Two blocks and a head; dropout and batch norm in each block."""

    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    return nn.ModuleDict({"one": block(), "two": block(), "head": nn.Linear(4, 2)})


def decisions(resolution):
    return {row.name: (row.lr_mult, row.rule) for row in resolution.rows}


def test_the_first_matching_rule_wins():
    """Rules stand in order of precedence, and multipliers never multiply each other."""
    resolution = resolve_plan(
        plan_of({"match": r"one\.0", "lr_mult": 0.1}, {"match": "one", "frozen": True}, CATCH_ALL), toy()
    )

    assert decisions(resolution) == {
        "one.0.weight": (0.1, 1),
        "one.0.bias": (0.1, 1),
        "one.1.weight": (None, 2),
        "one.1.bias": (None, 2),
        "two.0.weight": (1.0, 3),
        "two.0.bias": (1.0, 3),
        "two.1.weight": (1.0, 3),
        "two.1.bias": (1.0, 3),
        "head.weight": (1.0, 3),
        "head.bias": (1.0, 3),
    }
    assert {row.name for row in resolution.frozen} == {"one.1.weight", "one.1.bias"}


def test_each_setting_has_its_own_first_rule():
    """A rule for the norms' mode, one for decay and one for the rate compose."""
    resolution = resolve_plan(
        plan_of(
            {"role": "norm", "mode": "eval"},
            {"match": "one", "wd_mult": 0.5},
            {"match": ".*", "lr_mult": 0.2, "wd_mult": 2, "reinit": True},
        ),
        toy(),
    )
    by_name = {row.name: row for row in resolution.rows}

    assert {row.lr_mult for row in resolution.rows} == {0.2}
    assert {name: by_name[name].wd_mult for name in ("one.0.weight", "two.0.weight", "two.0.bias")} == {
        "one.0.weight": 0.5,
        "two.0.weight": 2.0,
        "two.0.bias": 0.0,
    }
    assert {name for name, mode in resolution.modes.items() if mode == "eval"} == {"one.1", "two.1"}
    assert all(row.reinit for row in resolution.rows)


def test_reinit_false_settles_it_for_later_rules():
    """reinit: false keeps the values, whatever a later rule says."""
    resolution = resolve_plan(plan_of({"match": "head", "reinit": False}, {**CATCH_ALL, "reinit": True}), toy())

    assert {row.name for row in resolution.rows if not row.reinit} == {"head.weight", "head.bias"}


def test_the_default_is_the_rate_of_what_no_rule_gives_one():
    """What no rule gives a rate gets the plan's default, and no rule is named for it."""
    frozen = resolve_plan(plan_of({"match": "head", "lr_mult": 1}, default={"frozen": True}), toy())
    slow = resolve_plan(plan_of({"match": "head", "lr_mult": 1}, default={"lr_mult": 0.1}), toy())

    assert len(frozen.frozen) == 8
    assert decisions(slow)["one.0.weight"] == (0.1, None)
    assert [(group.name, len(group.tensors)) for group in slow.groups] == [
        ("lr_mult=0.1", 2),
        ("lr_mult=0.1, no decay", 6),
        ("lr_mult=1", 1),
        ("lr_mult=1, no decay", 1),
    ]


REFUSED = [
    pytest.param(
        "  - {match: head, lr_mult: 1}\n",
        "plan.yaml:3:3: 8 parameters get no rate: 'one.0.weight', 'one.0.bias', 'one.1.weight', ...\n"
        "  end the rules with a catch-all such as {match: .*, frozen: true}, or give the plan a default",
        id="uncovered",
    ),
    pytest.param(
        "  - {match: '(?!head.bias).*', lr_mult: 1}\n",
        "plan.yaml:3:3: 1 parameter gets no rate: 'head.bias'\n"
        "  end the rules with a catch-all such as {match: .*, frozen: true}, or give the plan a default",
        id="one-uncovered",
    ),
    pytest.param(
        "  - {match: heads, lr_mult: 1}\n  - {match: .*, frozen: true}\n",
        "plan.yaml:3:13: rule 1 (match: heads) matches no parameter of ModuleDict\n"
        "  did you mean 'head'?\n"
        "  a rule that need not match on every model says optional: true",
        id="dead",
    ),
    pytest.param(
        "  - match:\n      - classifier\n      - fully_connected\n    lr_mult: 1\n  - {match: .*, frozen: true}\n",
        "plan.yaml:4:7: rule 1 (match: [classifier, fully_connected]) matches no parameter of ModuleDict\n"
        "  top level of ModuleDict (tensors): one (4), two (4), head (2)\n"
        "  a rule that need not match on every model says optional: true",
        id="dead-list",
    ),
    pytest.param(
        "  - {match: one, frozen: true}\n  - {match: two, frozen: true}\n  - {match: .*, lr_mult: 1}\n"
        "  - {match: 'one|two', lr_mult: 0.1}\n",
        "plan.yaml:6:5: rule 4 (match: one|two) decides nothing: "
        "all 8 tensors that it matches are decided by rule 1, line 3 (4), rule 2, line 4 (4)\n"
        "  the first matching rule wins: move this one up, or delete it",
        id="shadowed",
    ),
    pytest.param(
        "  - {match: .*, lr_mult: 1}\n  - {match: one, frozen: true, optional: true}\n",
        "plan.yaml:4:5: rule 2 (match: one) decides nothing: "
        "all 4 tensors that it matches are decided by rule 1, line 3 (4)\n"
        "  the first matching rule wins: move this one up, or delete it",
        id="optional-does-not-excuse-a-shadowed-rule",
    ),
    pytest.param(
        "  - {match: one, mode: eval}\n  - {match: 'one\\.2', mode: train}\n  - {match: .*, lr_mult: 1}\n",
        "plan.yaml:4:5: rule 2 (match: one\\.2) decides nothing: rules above it do\n"
        "  the first matching rule wins: move this one up, or delete it",
        id="shadowed-mode-of-dropout",
    ),
    pytest.param(
        "  - {match: .*, frozen: true}\n",
        "plan.yaml:3:3: every parameter of ModuleDict is frozen; nothing is left to train\n"
        "  give what shall learn a rule above, such as {role: head, lr_mult: 1}",
        id="nothing-trainable",
    ),
    pytest.param(
        "  - {match: 'one\\.2', lr_mult: 1}\n  - {match: .*, lr_mult: 1}\n",
        "plan.yaml:3:13: rule 1 (match: one\\.2) matches no parameter of ModuleDict\n"
        "  'one.2' is a module without parameters (Dropout)\n"
        "  a rule that need not match on every model says optional: true",
        id="rate-for-dropout",
    ),
    pytest.param(
        "  - {match: 'head.bias', mode: train}\n  - {match: head, mode: eval}\n  - {match: .*, lr_mult: 1}\n",
        "plan.yaml:4:5: module 'head' cannot be in eval and in train: rule 1 says train and rule 2 says eval\n"
        "  a mode belongs to a module, not to one of its parameters: select the module",
        id="eval-against-train",
    ),
    pytest.param(
        "  - {match: heads, lr_mult: 1}\n  - {match: one, frozen: true}\n  - {match: one, lr_mult: 1}\n",
        "plan.yaml:3:13: rule 1 (match: heads) matches no parameter of ModuleDict\n"
        "  did you mean 'head'?\n"
        "  a rule that need not match on every model says optional: true\n\n"
        "plan.yaml:5:5: rule 3 (match: one) decides nothing: "
        "all 4 tensors that it matches are decided by rule 2, line 4 (4)\n"
        "  the first matching rule wins: move this one up, or delete it\n\n"
        "plan.yaml:3:3: 6 parameters get no rate: 'two.0.weight', 'two.0.bias', 'two.1.weight', ...\n"
        "  end the rules with a catch-all such as {match: .*, frozen: true}, or give the plan a default",
        id="all-at-once",
    ),
]


@pytest.mark.parametrize(("rules", "message"), REFUSED)
def test_a_plan_that_does_not_fit_is_refused_with_what_to_do(rules, message, tmp_path, monkeypatch):
    """Every way in which a plan does not fit a model is an error with the line and the way out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(f"version: 1\nrules:\n{rules}")

    with pytest.raises(PlanError) as error:
        resolve_plan("plan.yaml", toy())

    assert str(error.value) == message


def test_optional_turns_matching_nothing_into_a_line_of_the_report():
    """An optional rule that matches nothing is reported and no error."""
    resolution = resolve_plan(plan_of({"match": "pre_logits", "lr_mult": 1, "optional": True}, CATCH_ALL), toy())

    assert rule_line(resolution.uses[0], resolution) == (
        "rule 1 (match: pre_logits) matched 0, decided 0; optional: nothing of the kind in this model"
    )


COUNTS = [
    pytest.param(
        [{"match": "one|two", "frozen": True}, {"match": "two|head", "lr_mult": 1}],
        [
            "rule 1 (match: one|two) matched 8, decided 8",
            "rule 2 (match: two|head) matched 6, decided 2; 4 were decided by rule 1",
        ],
        [False, True],
        id="weak",
    ),
    pytest.param(
        [{"match": "one|two", "frozen": True}, {"match": ".*", "lr_mult": 1}],
        [
            "rule 1 (match: one|two) matched 8, decided 8",
            "rule 2 (match: .*) matched 10, decided 2; 8 were decided by rule 1",
        ],
        [False, False],
        id="a-catch-all-is-never-weak",
    ),
    pytest.param(
        [{"match": "one|two", "frozen": True}, {"match": "two|head", "lr_mult": 1, "mode": "train"}],
        [
            "rule 1 (match: one|two) matched 8, decided 8",
            "rule 2 (match: two|head) matched 6, decided 6",
        ],
        [False, False],
        id="deciding-one-setting-is-deciding",
    ),
    pytest.param(
        [{"match": ["one", "two"], "mode": "eval"}, {"match": ".*", "lr_mult": 1}],
        [
            "rule 1 (match: [one, two]) matched 8, decided 8, and the mode of 4 modules without parameters",
            "rule 2 (match: .*) matched 10, decided 10",
        ],
        [False, False],
        id="modules",
    ),
]


@pytest.mark.parametrize(("rules", "lines", "weak"), COUNTS)
def test_each_rule_says_what_it_matched_and_what_it_decided(rules, lines, weak):
    """A rule other than a catch-all that decided less than half of what it matched is weak."""
    resolution = resolve_plan(plan_of(*rules), toy())

    assert [rule_line(use, resolution) for use in resolution.uses] == lines
    assert [use.weak for use in resolution.uses] == weak


# The modes of modules ------------------------------------------------------------------------------------------------


class Parent(nn.Module):
    """Owns parameters itself and has children: one with parameters, one without, one deeper down."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.1)
        self.child = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.BatchNorm1d(1, affine=False))


MODES = [
    pytest.param(
        [{"match": "part.scale", "frozen": True}, CATCH_ALL],
        {"part", "part.drop"},
        id="own-parameters-frozen-although-children-train",
    ),
    pytest.param(
        [{"match": r"part\.child", "frozen": True}, CATCH_ALL],
        {"part.child", "part.child.0", "part.child.1", "part.child.2"},
        id="a-frozen-subtree-with-what-has-no-parameters",
    ),
    pytest.param(
        [{"match": "part", "frozen": True}, CATCH_ALL],
        {"part", "part.drop", "part.child", "part.child.0", "part.child.1", "part.child.2"},
        id="all-frozen",
    ),
    pytest.param([{"match": "part.scale", "frozen": True, "mode": "train"}, CATCH_ALL], set(), id="train-on-frozen"),
    pytest.param([{"match": r"part\.drop", "mode": "eval"}, CATCH_ALL], {"part.drop"}, id="dropout-by-name"),
    pytest.param(
        [{"match": r"part\.drop", "mode": "train"}, {"match": "part", "frozen": True}, CATCH_ALL],
        {"part", "part.child", "part.child.0", "part.child.1", "part.child.2"},
        id="dropout-kept-random-in-a-frozen-part",
    ),
    pytest.param(
        [{"role": "norm", "mode": "eval"}, CATCH_ALL], {"part.child.2"}, id="statistics-of-a-norm-without-parameters"
    ),
    pytest.param(
        [{"match": "part.scale", "lr_mult": 0.1, "mode": "eval"}, CATCH_ALL],
        {"part", "part.drop"},
        id="eval-on-trained",
    ),
    pytest.param([CATCH_ALL], set(), id="all-trained"),
]


@pytest.mark.parametrize(("rules", "held"), MODES)
def test_which_modules_stand_in_eval(rules, held):
    """A module is in eval if all it owns is frozen, else as a rule says; one without parameters follows its parent."""
    model = nn.ModuleDict({"part": Parent(), "head": nn.Linear(1, 1)})
    resolution = resolve_plan(plan_of(*rules), model)

    assert {name for name, mode in resolution.modes.items() if mode == "eval"} == held
    assert set(resolution.modes) == {name for name, _ in model.named_modules()}
    assert {row.name: row.mode for row in resolution.rows} == {
        row.name: "eval" if row.name.rpartition(".")[0] in held else "train" for row in resolution.rows
    }


def test_a_shared_module_has_one_mode_under_all_of_its_names():
    """A module that stands in two places is listed under both names with one mode."""
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared), "head": nn.Linear(2, 2)})
    resolution = resolve_plan(plan_of({"match": r"two\.0", "frozen": True}, CATCH_ALL), model)

    assert dict(resolution.modes) == {
        "": "train",
        "one": "eval",
        "one.0": "eval",
        "two": "eval",
        "two.0": "eval",
        "head": "train",
    }


def test_train_on_a_frozen_module_gives_the_promise_up_and_is_listed():
    """Frozen modules that a rule keeps in train are listed, as their statistics will move."""
    model = toy()
    plan = plan_of({"role": "norm", "frozen": True, "mode": "train"}, {"match": "one", "frozen": True}, CATCH_ALL)

    assert resolve_plan(plan, model).alive == ("one.1", "two.1")
    assert resolve_plan(plan_of({"match": "one", "frozen": True}, CATCH_ALL), model).alive == ()


def test_what_caches_what_it_trains_is_not_held_in_eval():
    """timm's levit caches attention biases in eval, so its attention is refused there unless it is frozen."""
    model = create_model("levit_128s", meta=True)
    with pytest.raises(PlanError) as error:
        resolve_plan(plan_of({"match": r"stages\.0", "mode": "eval"}, CATCH_ALL), model)
    frozen = resolve_plan(plan_of({"match": r"stages\.0", "frozen": True}, CATCH_ALL), model)

    assert str(error.value) == (
        "module 'stages.0.blocks.0.attn' caches its trained attention biases while in eval; "
        "it cannot train there\n  leave it in train: select norms alone with {role: norm, mode: eval}"
    )
    assert frozen.modes["stages.0.blocks.0.attn"] == "eval"


def test_what_stays_random_is_listed():
    """Dropout that is not frozen is listed with its rate."""
    model = toy()

    assert resolve_plan(plan_of({"match": "one", "frozen": True}, CATCH_ALL), model).random == ("two.2: Dropout p=0.5",)
    assert resolve_plan(plan_of({"match": r".*\.2", "mode": "eval"}, CATCH_ALL), model).random == ()


# Hints ---------------------------------------------------------------------------------------------------------------

HINTS = [
    pytest.param(
        "vit_tiny_patch16_224",
        [{"match": "blocks.1.", "frozen": True}, CATCH_ALL],
        [
            "rule 1: a bare '.' matches any character: 'blocks.1.' selects 24 tensors, "
            "'blocks.10.norm1.weight' among them; 'blocks\\.1' selects 12"
        ],
        id="bare-dot",
    ),
    pytest.param(
        "vgg16",
        [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}],
        [
            "role: head is the classifier alone; layers between the last stage and it stay frozen, "
            "such as 'pre_logits.fc1.weight': to train them too, add {match: pre_logits, lr_mult: 1}"
        ],
        id="head-without-pre_logits",
    ),
    pytest.param(
        "inception_next_atto",
        [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}],
        [
            "role: head is the classifier alone; layers between the last stage and it stay frozen, "
            "such as 'head.fc1.weight': to train them too, add {match: head.fc1, lr_mult: 1}"
        ],
        id="head-without-its-first-layer",
    ),
    pytest.param(
        "resnet50_clip",
        [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}],
        [
            "role: head is the classifier alone; layers between the last stage and it stay frozen, "
            "such as 'head.pos_embed': to train them too, add "
            "{match: [head.pos_embed, head.q, head.k, head.v], lr_mult: 1}"
        ],
        id="head-without-its-attention",
    ),
    pytest.param(
        "vgg16",
        [{"role": "head", "lr_mult": 1}, {"match": "pre_logits", "lr_mult": 1}, {"match": ".*", "frozen": True}],
        [],
        id="head-with-pre_logits",
    ),
    pytest.param(
        "test_resnet",
        [{"role": "head", "lr_mult": 0.005}, {"match": ".*", "lr_mult": 0.001}],
        ["every lr_mult is below 0.01: it multiplies lr; for a rate of 1e-4 at lr 5e-4 write 0.2"],
        id="tiny-rates",
    ),
    pytest.param(
        "test_resnet", [{"role": "head", "lr_mult": 0.01}, {"match": ".*", "lr_mult": 0.001}], [], id="not-all-tiny"
    ),
    pytest.param(
        "test_resnet", [{"match": "layer1.0", "lr_mult": 1}, {"match": ".*", "frozen": True}], [], id="harmless-dot"
    ),
]


def test_dropout_that_follows_a_frozen_token_is_said():
    """A ViT owns its tokens itself, so the dropout ahead of its classifier follows them; a rule brings it back."""
    model = create_model("test_vit", drop_rate=0.5, meta=True)
    rules = [{"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]
    found = resolve_plan(plan_of(*rules), model)
    alive = resolve_plan(plan_of({"match": "head_drop", "mode": "train"}, *rules), model)

    assert found.hints == (
        "head_drop (Dropout p=0.5) is off: it follows test_vit, which is in eval, as 'cls_token' is frozen; to have it "
        "on, put {match: head_drop, mode: train} above",
    )
    assert found.random == ()
    assert (alive.hints, alive.random) == ((), ("head_drop: Dropout p=0.5",))
    assert resolve_plan("full", model).hints == ()
    assert resolve_plan(plan_of(*rules), create_model("test_resnet", drop_rate=0.5, meta=True)).hints == ()


@pytest.mark.parametrize(("architecture", "rules", "hints"), HINTS)
def test_what_is_allowed_and_probably_not_meant_is_said(architecture, rules, hints):
    """A hint fails nothing and says what was probably meant."""
    assert list(resolve_plan(plan_of(*rules), create_model(architecture, meta=True)).hints) == hints


# timm's rule for weight decay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_vit3", "test_efficientnet", "test_nfnet"])
def test_weight_decay_is_timms(architecture):
    """Without wd_mult exactly those parameters decay that timm's param_groups_weight_decay lets decay."""
    model = create_model(architecture)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exceptions = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    exempt, decayed = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=exceptions)
    resolution = resolve_plan("full", model)
    ours = {group.wd_mult: set(group.tensors) for group in resolution.groups}

    assert (exempt["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert ours == {
        0.0: {names[id(parameter)] for parameter in exempt["params"]},
        1.0: {names[id(parameter)] for parameter in decayed["params"]},
    }


def test_a_bias_of_any_shape_does_not_decay():
    """As in timm, what is called bias has no decay, however many dimensions it has; what has one dimension neither."""
    model = nn.Module()
    model.table = nn.Module()
    model.table.bias = nn.Parameter(torch.ones(2, 2))
    model.table.weight = nn.Parameter(torch.ones(2, 2))
    model.table.scale = nn.Parameter(torch.ones(2))
    exempt, _ = timm.optim.param_groups_weight_decay(model, 0.05)

    assert [id(parameter) for parameter in exempt["params"]] == [id(model.table.bias), id(model.table.scale)]
    assert {row.name: row.wd_mult for row in resolve_plan(plan_of(CATCH_ALL), model).rows} == {
        "table.bias": 0.0,
        "table.weight": 1.0,
        "table.scale": 0.0,
    }


def test_wd_mult_multiplies_what_timms_rule_leaves():
    """wd_mult multiplies the decay of what decays; biases and norms stay without."""
    resolution = resolve_plan(
        plan_of({"match": "layer1", "wd_mult": 0}, {"match": ".*", "lr_mult": 1, "wd_mult": 3}),
        create_model("test_resnet", meta=True),
    )

    assert {row.wd_mult for row in resolution.rows if row.name.startswith("layer1.")} == {0.0}
    assert {row.wd_mult for row in resolution.rows if len(row.shape) == 1} == {0.0}
    assert {row.wd_mult for row in resolution.rows if len(row.shape) > 1 and "layer1." not in row.name} == {3.0}


# Presets -------------------------------------------------------------------------------------------------------------

PRESETS = [
    pytest.param("linear_probe", {"fc.weight", "fc.bias"}, id="linear_probe"),
    pytest.param("voc_vgg16/frozen_convs", {"fc.weight", "fc.bias"}, id="frozen_convs"),
    pytest.param(
        "bitfit",
        {"fc.weight"} | {n for n in dict(create_model("test_resnet").named_parameters()) if "bias" in n},
        id="bitfit",
    ),
    pytest.param(
        "norm_and_head",
        {"fc.weight", "fc.bias"} | {n for n, p in create_model("test_resnet").named_parameters() if p.ndim == 1},
        id="norm_and_head",
    ),
]


@pytest.mark.parametrize(("preset", "trained"), PRESETS)
def test_what_a_preset_trains(preset, trained):
    """A preset trains on a residual network exactly what its description says."""
    resolution = resolve_plan(preset, create_model("test_resnet", meta=True))

    assert {row.name for row in resolution.trained} == trained


def test_bitfit_holds_statistics_and_norm_and_head_learns_them():
    """Under bitfit every normalisation layer is in eval; under norm_and_head in train, its statistics included."""
    model = create_model("test_resnet", meta=True)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    modes = {preset: resolve_plan(preset, model).modes for preset in ("bitfit", "norm_and_head")}

    assert {modes["bitfit"][name] for name in norms} == {"eval"}
    assert {modes["norm_and_head"][name] for name in norms} == {"train"}


def test_the_lectures_frozen_convolutions():
    """In VGG16 the plan frozen_convs freezes 14,714,688 elements in 26 tensors."""
    resolution = resolve_plan("voc_vgg16/frozen_convs", create_model("vgg16", num_classes=20, meta=True))

    assert (len(resolution.frozen), sum(row.elements for row in resolution.frozen)) == (26, 14_714_688)
    assert sum(row.elements for row in resolution.rows) == 134_342_484


# Properties ----------------------------------------------------------------------------------------------------------

TOY = describe(toy())
PATTERNS = ["one", "two", "head", r".*\.0", r".*\.bias", r"(?!head).*", "one|two", r"one\.0\.weight", ".*", "nothing"]
patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2)
rates = st.one_of(st.just({"frozen": True}), st.sampled_from([{"lr_mult": 0.1}, {"lr_mult": 1}, {"lr_mult": 2.5}]))


@st.composite
def rules(draw):
    """A rule that always sets a rate, so that only its rate can be decided elsewhere; optional, so that it may miss."""
    extra = st.fixed_dictionaries({}, optional={"wd_mult": st.sampled_from([0, 0.5, 1]), "reinit": st.booleans()})
    return {"match": draw(patterns), "optional": True, **draw(rates), **draw(extra)}


@st.composite
def fitting(draw):
    """A plan that fits the toy model: rules that decide nothing are left out."""
    given_rules = draw(st.lists(rules(), min_size=1, max_size=5))
    while True:
        plan = Plan(version=1, rules=[*given_rules, CATCH_ALL], default=draw(st.none() | rates))
        try:
            return plan, resolve(plan, TOY)
        except PlanError:
            if not given_rules:
                raise
            given_rules = given_rules[:-1]


@given(fitting())
def test_every_tensor_gets_exactly_one_decision(found):
    """Every parameter of a model is decided exactly once, in the model's order."""
    _, resolution = found

    assert [row.name for row in resolution.rows] == [tensor.name for tensor in TOY.tensors]
    assert all(row.frozen == (row.lr_mult is None) for row in resolution.rows)
    assert sum(use.decided for use in resolution.uses) >= len(resolution.rows)


@given(fitting(), rules())
def test_a_rule_at_the_end_changes_no_earlier_decision(found, rule):
    """A rule appended at the end never changes what the rules above decided."""
    plan, before = found
    longer = Plan.model_validate({**plan.model_dump(), "rules": [*plan.rules, rule]})
    try:
        after, refused = resolve(longer, TOY).rows, []
    except PlanError as error:
        after, refused = before.rows, [problem.message.partition(" (")[0] for problem in error.problems]

    assert refused in ([], [f"rule {len(longer.rules)}"])
    assert [(row.rule, row.lr_mult) for row in after] == [(row.rule, row.lr_mult) for row in before.rows]


@given(fitting())
def test_groups_and_the_frozen_are_the_model(found):
    """The optimizer's groups are disjoint, and together with what is frozen they are the model."""
    _, resolution = found
    grouped = [name for group in resolution.groups for name in group.tensors]

    assert len(grouped) == len(set(grouped))
    assert sorted([*grouped, *(row.name for row in resolution.frozen)]) == sorted(t.name for t in TOY.tensors)
    assert len({(group.lr_mult, group.wd_mult) for group in resolution.groups}) == len(resolution.groups)
    assert sum(group.elements for group in resolution.groups) == sum(row.elements for row in resolution.trained)


@given(fitting())
def test_resolving_is_deterministic(found):
    """The same plan on the same model gives the same decisions, also on a second copy of the model."""
    plan, resolution = found
    again = resolve(load_plan(plan.model_dump(mode="json")), describe(toy()))

    assert (again.rows, again.uses, again.modes, again.groups) == (
        resolution.rows,
        resolution.uses,
        resolution.modes,
        resolution.groups,
    )


@given(fitting(), st.randoms(use_true_random=False))
def test_the_order_of_patterns_in_a_list_does_not_matter(found, random):
    """A list means any of its patterns, in whatever order."""
    plan, resolution = found
    turned = [
        rule.model_copy(update={"match": tuple(random.sample(rule.match, len(rule.match)))}) for rule in plan.rules
    ]

    assert resolve(plan.model_copy(update={"rules": tuple(turned)}), TOY).rows == resolution.rows
