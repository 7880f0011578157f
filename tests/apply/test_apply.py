"""Applying a plan: flags, pins, groups, rates at every step, undo, new values; on toys and timm's test models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm
from toy import Toy

import freezeplan
from freezeplan import apply_plan, load_plan
from freezeplan.apply import freeze
from freezeplan.errors import ApplyError, FreezePlanWarning, ModelError
from freezeplan.model.names import canonical

CATCH_ALL = {"match": ".*", "lr_mult": 1}
REST_FROZEN = {"match": ".*", "frozen": True}


def plan_of(*rules, **keys):
    return {"version": 1, "rules": list(rules), **keys}


HEAD_ALONE = plan_of({"match": "head", "lr_mult": 1}, REST_FROZEN)
SLOW_BODY = plan_of({"match": "body", "lr_mult": 0.2}, CATCH_ALL)


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def training(model):
    return {name for name, module in model.named_modules() if module.training}


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def leftovers(model):
    return {name: set(vars(m)) & {"train", "_freezeplan"} for name, m in model.named_modules()}


# Freezing ------------------------------------------------------------------------------------------------------------


def test_flags_and_gradients(toy):
    """What is frozen needs no gradient and has none left; what is trained keeps its own."""
    toy(torch.randn(3, 4)).sum().backward()
    apply_plan(toy, HEAD_ALONE)

    assert {name for name, flag in flags(toy).items() if flag} == {"head.weight", "head.bias"}
    assert {name for name, p in toy.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_what_is_frozen_stands_still_in_a_careless_loop(toy):
    """Momentum, weight decay, zero_grad without None and train() each step move nothing that is frozen."""
    careless = torch.optim.SGD(toy.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    toy(torch.randn(3, 4)).sum().backward()
    careless.step()
    before = values(toy)
    apply_plan(toy, HEAD_ALONE, guard=False)  # which would refuse this optimizer
    for _ in range(3):
        toy.train()
        careless.zero_grad(set_to_none=False)
        toy(torch.randn(3, 4)).sum().backward()
        careless.step()

    assert moved(toy, before) == {"head.weight", "head.bias"}


def test_a_frozen_part_is_the_same_function_in_training(toy):
    """Dropout and statistics of what is frozen stand still, so the frozen part answers the same every time."""
    apply_plan(toy, HEAD_ALONE)
    x = torch.randn(3, 4)
    toy.eval()
    expected = toy.body(x)
    toy.train()

    assert torch.equal(toy.body(x), expected)
    assert torch.equal(toy.body(x), expected)


HELD = {"body", "body.0", "body.1", "body.2"}
LEVELS = [
    pytest.param(lambda m: m.train(), {"", "head"}, id="train"),
    pytest.param(lambda m: m.train(True), {"", "head"}, id="train-true"),
    pytest.param(lambda m: m.train(mode=True), {"", "head"}, id="train-mode-true"),
    pytest.param(lambda m: m.eval(), set(), id="eval"),
    pytest.param(lambda m: m.train(False), set(), id="train-false"),
    pytest.param(lambda m: m.eval().train(), {"", "head"}, id="eval-and-back"),
    pytest.param(lambda m: m.body.train(), {"", "head"}, id="the-part-itself"),
    pytest.param(lambda m: [child.train() for child in m.children()], {"", "head"}, id="each-child"),
    pytest.param(lambda m: nn.Sequential(m).train(), {"", "head"}, id="as-a-part-of-another-model"),
]


@pytest.mark.parametrize(("switch", "expected"), LEVELS)
def test_modes_hold_on_every_level(toy, switch, expected):
    """train() and eval() on the model, on a part or on a model around it leave what is frozen in eval."""
    apply_plan(toy, HEAD_ALONE)
    switch(toy)

    assert training(toy) == expected


def test_train_returns_the_module(toy):
    """A frozen part's train() returns it, as every module's does."""
    apply_plan(toy, HEAD_ALONE)

    assert toy.train() is toy
    assert toy.body.train() is toy.body


def test_a_module_in_eval_above_others_in_train(toy):
    """A rule can hold one module in eval while everything in it trains as usual."""
    apply_plan(toy, plan_of({"role": "norm", "mode": "eval"}, CATCH_ALL))
    statistics = toy.body[1].running_mean.clone()
    toy.train()
    toy(torch.randn(3, 4))

    assert training(toy) == {"", "body", "body.0", "body.2", "head"}
    assert torch.equal(toy.body[1].running_mean, statistics)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.1)
        self.child = nn.Linear(1, 1)


def test_own_parameters_frozen_above_a_trained_child():
    """A module whose own parameters are frozen is in eval, while its trained child follows train()."""
    model = nn.ModuleDict({"part": Nested()})
    apply_plan(model, plan_of({"match": "part.scale", "frozen": True}, CATCH_ALL))

    model.train()
    assert training(model) == {"", "part.child"}
    model.eval()
    assert training(model) == set()


# Undo ----------------------------------------------------------------------------------------------------------------


def test_undo_restores_exactly(toy):
    """undo gives back every flag and mode, leaves nothing on the modules, clears gradients, and keeps values."""
    toy.body[0].weight.requires_grad_(False)
    toy.body[1].eval()
    before = flags(toy), training(toy), leftovers(toy)
    live = apply_plan(toy, HEAD_ALONE)
    toy.train()
    toy(torch.randn(3, 4)).sum().backward()
    now = values(toy)
    live.undo()

    assert (flags(toy), training(toy), leftovers(toy)) == before
    assert {name for name, parameter in toy.named_parameters() if parameter.grad is not None} == set()
    assert moved(toy, now) == set()
    assert freezeplan.applied(toy) is None


def test_undo_twice_is_once(toy):
    """A second undo does nothing, also when another plan is live by then."""
    first = apply_plan(toy, HEAD_ALONE)
    first.undo()
    second = apply_plan(toy, SLOW_BODY, lr=1)
    first.undo()

    assert freezeplan.applied(toy) is second


def test_a_plan_for_the_length_of_a_block(toy):
    """As a context manager the plan is undone at the end, after an error too."""
    with apply_plan(toy, HEAD_ALONE) as live:
        assert freezeplan.applied(toy) is live
        assert sum(flags(toy).values()) == 2
    with pytest.raises(ZeroDivisionError), apply_plan(toy, HEAD_ALONE):
        raise ZeroDivisionError

    assert freezeplan.applied(toy) is None
    assert all(flags(toy).values())


def test_a_second_plan_is_refused_unless_it_replaces(toy):
    """A second live plan is an error that names replace=True; with it the first is undone."""
    first = apply_plan(toy, {**HEAD_ALONE, "name": "first"})
    with pytest.raises(ApplyError) as error:
        apply_plan(toy, SLOW_BODY, lr=1)
    assert freezeplan.applied(toy) is first
    second = apply_plan(toy, SLOW_BODY, lr=1, replace=True)
    toy.train()

    assert str(error.value) == (
        "the plan 'first' is live on this model\n  undo() it first, or apply_plan(..., replace=True)"
    )
    assert freezeplan.applied(toy) is second
    assert all(flags(toy).values())
    assert training(toy) == {name for name, _ in toy.named_modules()}
    second.undo()
    assert leftovers(toy) == {name: set() for name, _ in toy.named_modules()}


ALL = plan_of(CATCH_ALL)


def planned(model):
    apply_plan(model, {**ALL, "name": "first"})
    return model


OVERLAPS = [
    pytest.param(lambda m: (planned(m.body), m), "on 'body', a part of this model", id="part"),
    pytest.param(lambda m: (planned(m), m.body), "on Toy, whose part 'body' is this model", id="whole"),
    pytest.param(
        lambda m: (planned(m), nn.Sequential(nn.ReLU(), m.body[0])),
        "on Toy, whose part 'body.0' is '1' of this model",
        id="shared",
    ),
    pytest.param(
        lambda m: (twin := copy.deepcopy(planned(m)), twin.body), "on Toy, whose part 'body' is this model", id="copy"
    ),
]


@pytest.mark.parametrize(("pair", "where"), OVERLAPS)
def test_a_plan_on_modules_of_another_is_refused(toy, pair, where):
    """A part, the whole, what shares a part, a part of a copy: refused until the first plan is undone."""
    first, second = pair(toy)
    for replace in (False, True):
        with pytest.raises(ApplyError) as error:
            apply_plan(second, ALL, replace=replace)
        assert str(error.value) == (
            f"the plan 'first' is live {where}\n"
            "  undo() it first: each of the two would undo the other's flags and modes"
        )
    freezeplan.applied(first).undo()

    assert freezeplan.applied(apply_plan(second, ALL).model)


def test_a_plan_whose_model_is_gone_is_in_nobodys_way(toy):
    """A model that nobody holds any more is not waited for, though it lies in a cycle with its plan."""
    apply_plan(nn.Sequential(toy.body), ALL)

    assert apply_plan(toy, ALL)


def test_a_replaced_plan_says_so(toy):
    """The groups and seals of a plan that was undone are refused."""
    first = apply_plan(toy, {**HEAD_ALONE, "name": "first"})
    first.undo()
    for use in (lambda: first.param_groups, lambda: list(first), first.trainable_parameters, first.seal):
        with pytest.raises(ApplyError) as error:
            use()

        assert str(error.value) == "the plan 'first' is no longer live on this model: it was undone or replaced"


def test_a_plan_that_does_not_fit_changes_nothing(toy):
    """An error while applying, replacing included, leaves the model as it was."""
    live = apply_plan(toy, HEAD_ALONE)
    before = flags(toy), training(toy), values(toy)
    half = plan_of({"match": "head.bias", "reinit": True}, CATCH_ALL)
    for wrong in (SLOW_BODY, plan_of({"match": "heads", "lr_mult": 1}), plan_of(REST_FROZEN), half):
        with pytest.raises(freezeplan.FreezePlanError):
            apply_plan(toy, wrong, replace=True)

    assert freezeplan.applied(toy) is live
    assert (flags(toy), training(toy)) == before[:2]
    assert moved(toy, before[2]) == set()


def test_repr_says_what_is_live(toy):
    """An applied plan shows its name, its model and its counts."""
    assert repr(apply_plan(toy, HEAD_ALONE)) == "<AppliedPlan 'plan' on Toy: 4 tensors frozen, 2 trained>"


# Groups --------------------------------------------------------------------------------------------------------------

GROUPS = [
    pytest.param(
        {"scheduler": "torch", "lr": 0.1},
        [{"lr": 0.2 * 0.1}, {"lr": 0.2 * 0.1, "weight_decay": 0.0}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.0}],
        id="torch-lr",
    ),
    pytest.param(
        {"scheduler": "torch", "lr": 0.1, "weight_decay": 0.05},
        [
            {"lr": 0.2 * 0.1, "weight_decay": 0.05},
            {"lr": 0.2 * 0.1, "weight_decay": 0.0},
            {"lr": 0.1, "weight_decay": 0.05},
            {"lr": 0.1, "weight_decay": 0.0},
        ],
        id="torch-lr-weight_decay",
    ),
    pytest.param(
        {"scheduler": "timm"},
        [
            {"lr_scale": 0.2},
            {"lr_scale": 0.2, "weight_decay": 0.0},
            {"lr_scale": 1.0},
            {"lr_scale": 1.0, "weight_decay": 0.0},
        ],
        id="timm",
    ),
    pytest.param(
        {"scheduler": "timm", "lr": 0.1, "weight_decay": 0.05},
        [
            {"lr": 0.1, "lr_scale": 0.2, "weight_decay": 0.05},
            {"lr": 0.1, "lr_scale": 0.2, "weight_decay": 0.0},
            {"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.05},
            {"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.0},
        ],
        id="timm-lr-weight_decay",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), GROUPS)
def test_what_a_group_carries(toy, arguments, expected):
    """A group carries names, multiplier and name; lr, lr_scale and weight_decay only as the arguments ask for."""
    live = apply_plan(toy, SLOW_BODY, **arguments)
    common = [
        {"name": "lr_mult=0.2", "lr_mult": 0.2, "wd_mult": 1.0, "param_names": ["body.0.weight"]},
        {
            "name": "lr_mult=0.2, no decay",
            "lr_mult": 0.2,
            "wd_mult": 0.0,
            "param_names": ["body.0.bias", "body.1.weight", "body.1.bias"],
        },
        {"name": "lr_mult=1", "lr_mult": 1.0, "wd_mult": 1.0, "param_names": ["head.weight"]},
        {"name": "lr_mult=1, no decay", "lr_mult": 1.0, "wd_mult": 0.0, "param_names": ["head.bias"]},
    ]
    by_name = dict(toy.named_parameters())

    assert [{key: value for key, value in group.items() if key != "params"} for group in live] == [
        base | extra for base, extra in zip(common, expected, strict=True)
    ]
    for group in live:
        assert [id(parameter) for parameter in group["params"]] == [id(by_name[n]) for n in group["param_names"]]


def test_equal_rates_need_no_lr(toy):
    """Where every multiplier is 1 the groups need no lr and take the optimizer's."""
    optimizer = torch.optim.AdamW(apply_plan(toy, HEAD_ALONE), lr=0.5, weight_decay=0.05)

    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.05), (0.5, 0.0)]
    assert [parameter.shape for parameter in freezeplan.applied(toy).trainable_parameters()] == [(2, 4), (2,)]


REFUSED = [
    pytest.param(
        SLOW_BODY,
        {},
        "this plan trains at 0.2, 1 times the learning rate, and no lr was given\n"
        "  apply_plan(model, plan, lr=1e-3), or scheduler='timm' with a scheduler of timm",
        id="lr-missing",
    ),
    pytest.param(
        plan_of({"match": ".*", "lr_mult": 0.5}),
        {"weight_decay": 0.05},
        "this plan trains at 0.5 times the learning rate, and no lr was given\n"
        "  apply_plan(model, plan, lr=1e-3), or scheduler='timm' with a scheduler of timm",
        id="lr-missing-for-one-rate",
    ),
    pytest.param(
        plan_of({"match": "body", "wd_mult": 0.5}, {**CATCH_ALL, "wd_mult": 2}),
        {"lr": 1e-3},
        "this plan has wd_mult 0.5, 2, and no weight_decay was given\n"
        "  apply_plan(model, plan, lr=1e-3, weight_decay=0.05)",
        id="weight_decay-missing",
    ),
    pytest.param(HEAD_ALONE, {"lr": 0}, "lr is a number > 0, found 0", id="lr-zero"),
    pytest.param(HEAD_ALONE, {"lr": "1e-3"}, "lr is a number > 0, found '1e-3'", id="lr-text"),
    pytest.param(HEAD_ALONE, {"lr": True}, "lr is a number > 0, found True", id="lr-true"),
    pytest.param(HEAD_ALONE, {"lr": float("nan")}, "lr is a number > 0, found nan", id="lr-nan"),
    pytest.param(HEAD_ALONE, {"weight_decay": -1}, "weight_decay is a number >= 0, found -1", id="weight_decay-below"),
    pytest.param(
        HEAD_ALONE, {"scheduler": "tim"}, "scheduler is 'torch', 'timm' or 'any', found 'tim'", id="scheduler"
    ),
]


@pytest.mark.parametrize(("plan", "arguments", "message"), REFUSED)
def test_arguments_that_do_not_suffice_are_refused(toy, plan, arguments, message):
    """A missing rate or decay is refused before anything changes."""
    before = flags(toy)
    with pytest.raises(ApplyError) as error:
        apply_plan(toy, plan, **arguments)

    assert str(error.value) == message
    assert (freezeplan.applied(toy), flags(toy)) == (None, before)


def test_adamw_decays_what_it_should_and_nothing_else(resnet):
    """With zero gradients AdamW shrinks exactly the trained weights of two or more dimensions, by lr x decay x mult."""
    plan = plan_of({"match": "layer[1-4]", "frozen": True}, {"match": "conv1", "lr_mult": 0.5}, CATCH_ALL)
    optimizer = torch.optim.AdamW(apply_plan(resnet, plan, lr=1e-3), weight_decay=0.05)
    before = values(resnet)
    for parameter in resnet.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    rates = {"conv1.0.weight": 0.5, "conv1.3.weight": 0.5, "conv1.6.weight": 0.5, "fc.weight": 1.0}

    assert moved(resnet, before) == set(rates)
    for name, rate in rates.items():
        torch.testing.assert_close(resnet.state_dict()[name], before[name] * (1 - rate * 1e-3 * 0.05))


def test_wd_mult_multiplies_the_decay(toy):
    """A plan's wd_mult multiplies the decay that is given."""
    plan = plan_of({"match": "body", "wd_mult": 0.5}, CATCH_ALL)
    optimizer = torch.optim.SGD(apply_plan(toy, plan, lr=0.1, weight_decay=0.2), weight_decay=99)

    assert {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]} == {
        "body.0.weight": 0.1,
        "body.0.bias": 0.0,
        "body.1.weight": 0.0,
        "body.1.bias": 0.0,
        "head.weight": 0.2,
        "head.bias": 0.0,
    }


def test_an_optimizers_state_survives_a_round_trip(toy):
    """The state of an optimizer with a plan's groups is saved and loaded like any other."""
    optimizer = torch.optim.AdamW(apply_plan(toy, SLOW_BODY, lr=0.1))
    toy(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    again = torch.optim.AdamW(freezeplan.applied(toy))
    again.load_state_dict(optimizer.state_dict())

    assert [group["name"] for group in again.param_groups] == [group["name"] for group in optimizer.param_groups]
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


SCHEDULERS = [
    pytest.param("torch", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0), id="torch-cosine"),
    pytest.param("torch", lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.1), id="torch-step"),
    pytest.param("torch", lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: (e + 1) / 10), id="torch-lambda"),
    pytest.param(
        "timm",
        lambda o: CosineLRScheduler(o, 10, lr_min=0.01, warmup_t=3, warmup_lr_init=0.001),
        id="timm-cosine-with-warm-up-and-floor",
    ),
    pytest.param(
        "timm",
        lambda o: CosineLRScheduler(o, 10, lr_min=0.01, warmup_t=3, warmup_lr_init=0.001, warmup_prefix=True),
        id="timm-cosine-warm-up-first",
    ),
]


@pytest.mark.parametrize(("who", "schedule"), SCHEDULERS)
def test_the_ratio_of_rates_is_the_plans_at_every_step(toy, who, schedule):
    """Measured by what an optimizer really moves, rates stand in the plan's ratio at every step of a schedule."""
    toy.double()
    optimizer = torch.optim.SGD(apply_plan(toy, SLOW_BODY, lr=0.1, scheduler=who), lr=123.0)
    scheduler = schedule(optimizer)
    rates = []
    for epoch in range(10):
        before = values(toy)
        for parameter in toy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        steps = [(before[n] - toy.state_dict()[n]).unique() for n in ("body.0.weight", "head.weight")]
        rates.append([float(step.mean()) for step in steps])
        scheduler.step(*([epoch + 1] if who == "timm" else []))

    assert [body / head for body, head in rates] == pytest.approx([0.2] * 10, rel=1e-9)
    assert len({round(head, 6) for _, head in rates}) >= 4


def test_clipping_sees_only_what_is_trained(toy):
    """trainable_parameters() is for clipping, and looks the parameters up anew."""
    live = apply_plan(toy, HEAD_ALONE)
    toy.head = nn.Linear(4, 2)

    assert [id(parameter) for parameter in live.trainable_parameters()] == [id(p) for p in toy.head.parameters()]


def test_a_parameter_that_is_gone_is_named(toy):
    """Groups of a model that lost a parameter are refused by its name."""
    live = apply_plan(toy, HEAD_ALONE)
    toy.head = nn.Linear(4, 2, bias=False)

    with pytest.raises(ApplyError) as error:
        _ = live.param_groups
    assert str(error.value) == (
        "the parameter 'head.bias' is no longer in the model\n  apply the plan again with replace=True"
    )


WEAK = plan_of({"match": "body", "frozen": True}, {"match": ["body", "head.bias"], "lr_mult": 1}, CATCH_ALL)


def test_a_rule_that_decides_little_is_warned_of(toy, tmp_path, monkeypatch):
    """A rule, no catch-all, that decides less than half of what it matched is warned of with its line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(
        "version: 1\nrules:\n  - {match: body, frozen: true}\n  - {match: [body, head.bias], lr_mult: 1}\n"
        "  - {match: .*, lr_mult: 1}\n"
    )
    with pytest.warns(FreezePlanWarning) as from_data:
        apply_plan(toy, WEAK).undo()
    with pytest.warns(FreezePlanWarning) as from_file:
        apply_plan(toy, "plan.yaml")

    text = (
        "rule 2 (match: [body, head.bias]) matched 5 tensors and decided 1; the first matching rule wins, so the "
        "others went to rule 1 (4): to let it decide them, move it up"
    )
    assert [str(warning.message) for warning in from_data] == [text]
    assert [str(warning.message) for warning in from_file] == [f"plan.yaml:4:5: {text}"]
    assert from_file[0].filename == __file__


# Copies, files, wrappers ---------------------------------------------------------------------------------------------


def test_a_copys_pins_belong_to_the_copy(toy):
    """A deep copy carries the plan on: its pins hold the copy, and undoing there leaves the original."""
    live = apply_plan(toy, HEAD_ALONE)
    twin = copy.deepcopy(toy)
    twin.train()

    assert training(twin) == {"", "head"}
    assert freezeplan.applied(twin).model is twin
    freezeplan.applied(twin).undo()
    twin.train()
    assert training(twin) == {name for name, _ in twin.named_modules()}
    assert freezeplan.applied(toy) is live
    toy.train()
    assert training(toy) == {"", "head"}


class Still(Nested):
    """A part whose ``train`` other code can replace by ``stay``."""

    asked = None

    def stay(self, mode=True):
        self.asked = mode
        return self


@pytest.mark.parametrize("carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_train_that_other_code_put_there_comes_back(carry):
    """A pin passes the mode on to a module's own ``train`` and gives it back; in a copy it is the copy's."""
    model = nn.ModuleDict({"part": Still()})
    model["part"].train = model["part"].stay
    apply_plan(model, plan_of({"match": "part.scale", "frozen": True}, CATCH_ALL))
    model = carry(model)
    part = model["part"]
    pinned = vars(part)["train"]
    model.train()
    assert (type(pinned), part.asked, training(model)) == (freeze.StayInEval, True, {"", "part.child"})
    freezeplan.applied(model).undo()
    assert training(model) == {name for name, _ in model.named_modules()}
    model.eval()

    assert (vars(part)["train"].__func__, vars(part)["train"].__self__) == (Still.stay, part)
    assert (part.asked, training(model)) == (False, {"part", "part.child", "part.drop"})


def test_a_whole_model_is_saved_with_its_plan(toy):
    """A whole-model file keeps freezing after it is loaded."""
    apply_plan(toy, SLOW_BODY | {"rules": [{"match": "body", "frozen": True}, CATCH_ALL]})
    file = io.BytesIO()
    torch.save(toy, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded.train()

    assert training(loaded) == {"", "head"}
    assert freezeplan.applied(loaded).model is loaded
    assert freezeplan.applied(loaded).resolution == freezeplan.applied(toy).resolution


def test_a_state_dict_is_untouched(toy):
    """A model with a plan saves and loads the same state_dict as one without."""
    before = values(toy)
    apply_plan(toy, HEAD_ALONE)

    assert list(toy.state_dict()) == list(before)
    Toy().load_state_dict(toy.state_dict())
    toy.load_state_dict(before)
    assert moved(toy, before) == set()


@pytest.mark.slow
def test_compiling_keeps_working(resnet):
    """A compiled model with a plan is one graph, answers the same, and its frozen part stands still."""
    live = apply_plan(resnet, "linear_probe")
    live.seal()
    compiled = torch.compile(resnet, backend="aot_eager", fullgraph=True)  # traces the backward pass too
    compiled.train()
    answer = compiled(image())
    answer.sum().backward()

    torch.testing.assert_close(answer, resnet(image()))
    assert live.verify()
    assert {name for name, p in resnet.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}


WRAPPED = [
    pytest.param(nn.DataParallel, id="DataParallel"),
    pytest.param(lambda model: torch.compile(model, backend="eager"), id="compile"),
    pytest.param(lambda model: torch.compile(nn.DataParallel(model), backend="eager"), id="both"),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrappers_do_not_count(toy, wrap):
    """A plan names the parts of the model inside DistributedDataParallel's like and torch.compile."""
    wrapped = wrap(toy)
    live = apply_plan(wrapped, HEAD_ALONE)
    wrapped.train()

    assert [row.name for row in live.resolution.trained] == ["head.weight", "head.bias"]
    assert training(toy) == {"", "head"}
    assert freezeplan.applied(wrapped) is freezeplan.applied(toy) is live
    live.undo()
    assert leftovers(toy) == {name: set() for name, _ in toy.named_modules()}


NAMES = [
    pytest.param("module.layer1.0.weight", "layer1.0.weight", id="DistributedDataParallel"),
    pytest.param("_orig_mod.layer1.0.weight", "layer1.0.weight", id="compile"),
    pytest.param("layer1._orig_mod.0.weight", "layer1.0.weight", id="compiled-part"),
    pytest.param("_fsdp_wrapped_module.layer1._fsdp_wrapped_module.0.weight", "layer1.0.weight", id="FSDP"),
    pytest.param("layer1._checkpoint_wrapped_module.0.weight", "layer1.0.weight", id="checkpoint"),
    pytest.param("fc.parametrizations.weight.original", "fc.weight", id="parametrization"),
    pytest.param("module.fc.parametrizations.weight.original1", "fc.weight", id="part-of-a-parametrization"),
    pytest.param("fc.parametrizations.weight.0._u", "fc.parametrizations.weight.0._u", id="its-buffer"),
    pytest.param("modules.module_list.0.weight", "modules.module_list.0.weight", id="only-alike"),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_canonical_names(name, expected):
    """What wrappers put into a name does not count, wherever it stands."""
    assert canonical(name) == expected


class Caching(nn.Module):
    """As timm's levit: a cache of something derived from a parameter, valid while in eval."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))
        self.attention_bias_cache = {}


@pytest.mark.parametrize("switch", ["train", "eval"])
def test_a_pin_empties_caches_of_derived_values(switch):
    """A frozen part's cache is emptied by train() and eval(), so that new values are never answered from old ones."""
    model = nn.ModuleDict({"body": nn.Sequential(Caching()), "head": nn.Linear(1, 1)})
    model["body"][0].attention_bias_cache["cpu"] = model["body"][0].bias
    apply_plan(model, HEAD_ALONE)
    applied = dict(model["body"][0].attention_bias_cache)
    model["body"][0].attention_bias_cache["cpu"] = model["body"][0].bias
    getattr(model, switch)()

    assert (applied, model["body"][0].attention_bias_cache) == ({}, {})


def test_a_checkpointed_part_keeps_its_name(toy):
    """A part inside a checkpoint wrapper is named as before, and stands still when it runs again in backward."""
    toy.body = checkpoint_wrapper(toy.body)
    live = apply_plan(
        toy, plan_of({"match": r"body\.1", "lr_mult": 1, "mode": "eval"}, HEAD_ALONE["rules"][0], REST_FROZEN)
    )
    statistics = toy.body[1].running_mean.clone()
    toy.train()
    toy(torch.randn(3, 4)).sum().backward()

    assert [row.name for row in live.resolution.rows] == [name for name, _ in Toy().named_parameters()]
    assert torch.equal(toy.body[1].running_mean, statistics)


def test_a_parametrized_weight_is_one_tensor():
    """The parts of a parametrized weight are one tensor of a plan: frozen together, trained in one group."""
    model = nn.ModuleDict({"body": weight_norm(nn.Linear(2, 3)), "head": weight_norm(nn.Linear(3, 1))})
    live = apply_plan(model, plan_of({"match": r"head\.weight", "lr_mult": 1}, REST_FROZEN))
    (group,) = live.param_groups
    model.train()

    assert [(row.name, row.shape) for row in live.resolution.rows] == [
        ("body.bias", (3,)),
        ("body.weight", (3, 2)),
        ("head.bias", (1,)),
        ("head.weight", (1, 3)),
    ]
    assert (group["param_names"], len(group["params"])) == (["head.weight", "head.weight"], 2)
    assert {name for name, flag in flags(model).items() if flag} == {
        "head.parametrizations.weight.original0",
        "head.parametrizations.weight.original1",
    }
    assert not any(module.training for module in model["body"].modules())


def test_tied_weights_are_in_one_group_once():
    """A tied weight is in one group, once, and frozen under all of its names."""
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3, bias=False), "decoder": nn.Linear(3, 3)})
    model["decoder"].weight = model["encoder"].weight
    groups = apply_plan(model, plan_of(CATCH_ALL)).param_groups
    assert [group["param_names"] for group in groups] == [["encoder.weight"], ["decoder.bias"]]
    apply_plan(model, plan_of({"match": r"decoder\.weight", "frozen": True}, CATCH_ALL), replace=True)

    assert model["encoder"].weight.requires_grad is False
    assert freezeplan.applied(model).param_groups[0]["param_names"] == ["decoder.bias"]


# New values ----------------------------------------------------------------------------------------------------------

SCRATCH = plan_of({"match": "fc", "lr_mult": 1, "reinit": False}, {**CATCH_ALL, "reinit": True})


def test_reinit_gives_the_values_of_a_fresh_model(resnet):
    """reinit gives timm's own initialisation, seeded by torch.manual_seed; statistics start anew, the rest stays."""
    with torch.no_grad():
        for tensor in resnet.state_dict().values():
            tensor.add_(1)
    before = values(resnet)
    torch.manual_seed(3)
    fresh = timm.create_model("test_resnet", num_classes=5)
    torch.manual_seed(3)
    torch.rand(7)
    state = torch.get_rng_state()
    apply_plan(resnet, SCRATCH)

    assert torch.equal(torch.get_rng_state(), state)
    assert {name for name in before if name.startswith("fc.")} == set(before) - moved(resnet, before)
    assert moved(resnet, values(fresh)) == {"fc.weight", "fc.bias"}
    assert resnet.bn1.num_batches_tracked == 0


def test_reinit_leaves_the_statistics_of_what_stays(resnet):
    """Only what says reinit gets new values, statistics included."""
    resnet.bn1.running_mean.fill_(3)
    resnet.layer1[0].bn1.running_mean.fill_(3)
    before = values(resnet)
    apply_plan(resnet, plan_of({"match": "layer1", "reinit": True}, CATCH_ALL))

    assert resnet.layer1[0].bn1.running_mean.abs().max() == 0
    assert {name for name in moved(resnet, before) if not name.startswith("layer1.")} == set()


def test_statistics_start_anew_only_with_their_whole_module(resnet):
    """A norm of which only a part gets new values keeps its statistics."""
    resnet.bn1.running_mean.fill_(3)
    with torch.no_grad():
        resnet.bn1.weight.fill_(3)
    before = values(resnet)
    apply_plan(resnet, plan_of({"match": r"bn1\.weight", "reinit": True}, CATCH_ALL))

    assert moved(resnet, before) == {"bn1.weight"}


def test_reinit_takes_over_classes_channels_and_image_size():
    """A fresh model has the classes, input channels and image size of the one it replaces."""
    model = timm.create_model("test_vit", num_classes=7, in_chans=1, img_size=96)
    torch.manual_seed(3)
    fresh = timm.create_model("test_vit", num_classes=7, in_chans=1, img_size=96)
    torch.manual_seed(3)
    apply_plan(model, plan_of({**CATCH_ALL, "reinit": True}))

    assert moved(model, values(fresh)) == set()


def test_reinit_follows_the_seed(resnet):
    """The same seed gives the same values, another seed others."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with apply_plan(resnet, SCRATCH):
            found.append(values(resnet))

    assert [torch.equal(one["conv1.0.weight"], found[0]["conv1.0.weight"]) for one in found] == [True, True, False]


def test_reinit_of_other_models_resets_whole_modules(toy):
    """Models that are not timm's are initialised by reset_parameters, module by module."""
    toy.body[1].running_mean.fill_(3)
    before = values(toy)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    apply_plan(toy, plan_of({"match": "body", "reinit": True}, CATCH_ALL))

    assert torch.equal(torch.get_rng_state(), state)
    assert moved(toy, before) == {"body.0.weight", "body.0.bias", "body.1.running_mean"}
    assert toy.body[1].running_mean.abs().max() == 0


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(2, 2)


CANNOT = [
    pytest.param(
        Own,
        {"match": "scale", "reinit": True},
        "cannot reinit 'scale': Own has no reset_parameters\n"
        "  for models that are not timm's, reinit works on whole modules that have reset_parameters",
        id="no-reset_parameters",
    ),
    pytest.param(
        Own,
        {"match": "fc.weight", "reinit": True},
        "cannot reinit 'fc.weight': reset_parameters would also change 'fc.bias'\n"
        "  for models that are not timm's, reinit works on whole modules that have reset_parameters",
        id="part-of-a-module",
    ),
    pytest.param(
        lambda: with_head(timm.create_model("test_resnet", num_classes=5), nn.Linear(256, 7)),
        {"match": ".*", "reinit": True},
        "cannot reinit 'fc.bias': a fresh test_resnet has [(5,)], this model [(7,)]\n"
        "  the model was changed after it was created; say reinit: false for what was changed",
        id="changed-by-hand",
    ),
    pytest.param(
        lambda: with_head(timm.create_model("test_resnet"), nn.Sequential(nn.Linear(256, 7))),
        {"match": "fc", "reinit": True},
        "cannot reinit 'fc.0.bias': a fresh test_resnet has nothing of that name, this model [(7,)]\n"
        "  the model was changed after it was created; say reinit: false for what was changed",
        id="other-names",
    ),
]


def with_head(model, head):
    model.fc = head
    return model


@pytest.mark.parametrize(("build", "rule", "message"), CANNOT)
def test_what_cannot_be_initialised_again_is_refused(build, rule, message):
    """Where no fresh values exist the parameter is named and nothing is changed."""
    model = build()
    before = values(model)
    with pytest.raises(ModelError) as error:
        apply_plan(model, plan_of(rule, CATCH_ALL))

    assert str(error.value) == message
    assert moved(model, before) == set()
    assert freezeplan.applied(model) is None


def test_undo_does_not_take_new_values_back(resnet):
    """undo restores flags and modes, never values."""
    before = values(resnet)
    torch.manual_seed(11)
    apply_plan(resnet, SCRATCH).undo()

    assert "conv1.0.weight" in moved(resnet, before)


def test_the_four_arms_start_from_the_same_head(resnet):
    """In all four arms of the lecture's experiment the head keeps the values it came with."""
    before = values(resnet)
    for arm in ("scratch", "frozen_convs", "low_conv_lr", "same_lr"):
        with apply_plan(resnet, load_plan(f"voc_vgg16/{arm}"), lr=5e-4):
            assert {"fc.weight", "fc.bias"} & moved(resnet, before) == set()
