"""Proof that a freeze held: what moved is found, named, measured, and the likely cause given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import freezeplan
from freezeplan import apply_plan
from freezeplan.errors import ApplyError
from freezeplan.proof import causes

PLAN = {"version": 1, "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}


@pytest.fixture
def live(toy):
    return apply_plan(toy, PLAN, guard=False)  # the guard would refuse these steps; here they are taken


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()


def test_a_freeze_that_held_is_proved(toy, live):
    """After training, verify() says how many frozen tensors and buffers are bit-identical."""
    live.seal()
    head = toy.head.weight.clone()
    train(toy, torch.optim.SGD(live, lr=0.1, momentum=0.9, weight_decay=0.1))

    assert not torch.equal(toy.head.weight, head)
    assert bool(live.verify()) is True
    assert str(live.verify()) == "held: 7 frozen tensors and buffers are bit-identical"
    assert (live.verify().checked, live.verify().moved) == (7, ())


def test_without_a_seal_there_is_nothing_to_compare(live):
    """verify() without a seal says so."""
    with pytest.raises(ApplyError) as error:
        live.verify()

    assert str(error.value) == "nothing to compare with: no seal was taken\n  call seal() before training"


def leave_a_gradient(toy):
    careless = torch.optim.SGD([toy.body[0].weight], lr=0.1)
    toy.body[0].weight.grad = torch.ones(4, 4)
    careless.step()


def flip_a_flag(toy):
    toy.body[0].weight.requires_grad_(True)
    train(toy, torch.optim.SGD([toy.body[0].weight], lr=0.1))


def train_by_hand(toy):
    toy.body[1].training = True
    toy(torch.randn(3, 4))


def write_directly(toy):
    with torch.no_grad():
        toy.body[0].weight.add_(0.1)


def write_a_buffer(toy):
    toy.body[1].running_mean.fill_(2)


def lose_a_part(toy):
    toy.body = nn.Sequential(toy.body[0])


def another_shape(toy):
    toy.body[0].weight = nn.Parameter(torch.zeros(4, 5), requires_grad=False)


def same_values_in_another_shape(toy):
    toy.body[0].weight = nn.Parameter(toy.body[0].weight.detach().reshape(2, 8), requires_grad=False)


def another_dtype(toy):
    toy.body[0].double()


REPLACED = (
    "body.0.weight: the parameter was replaced after the plan was applied: load_state_dict(assign=True), to_empty, "
    "reset_classifier or fully_shard"
)
MOVES = [
    pytest.param(
        leave_a_gradient,
        ["body.0.weight: a gradient was left on it, and an optimizer outside the plan used it"],
        id="stale-gradient",
    ),
    pytest.param(
        flip_a_flag, ["body.0.weight: requires_grad was set back to True by other code"], id="flag-flipped-back"
    ),
    pytest.param(
        train_by_hand,
        [
            "body.1.running_mean: its module is in train: something set .training by hand",
            "body.1.running_var: its module is in train: something set .training by hand",
            "body.1.num_batches_tracked: its module is in train: something set .training by hand",
        ],
        id="training-by-hand",
    ),
    pytest.param(
        write_directly,
        ["body.0.weight: other code wrote it: an optimizer that holds it, an average of weights, or a loader"],
        id="direct-write",
    ),
    pytest.param(
        write_a_buffer,
        [
            "body.1.running_mean: "
            "a buffer was written by other code: a loader, an average of weights, or a reset of statistics"
        ],
        id="buffer-written",
    ),
    pytest.param(
        lose_a_part,
        [
            "body.1.weight: it is no longer in the model",
            "body.1.bias: it is no longer in the model",
            "body.1.running_mean: it is no longer in the model",
            "body.1.running_var: it is no longer in the model",
            "body.1.num_batches_tracked: it is no longer in the model",
        ],
        id="part-lost",
    ),
    pytest.param(
        another_shape,
        [REPLACED],
        id="shape",
    ),
    pytest.param(
        same_values_in_another_shape,
        [REPLACED],
        id="same-values-in-another-shape",
    ),
    pytest.param(
        another_dtype,
        [
            "body.0.weight: it went from float32 (4, 4) to float64 (4, 4): it was cast or replaced",
            "body.0.bias: it went from float32 (4,) to float64 (4,): it was cast or replaced",
        ],
        id="dtype",
    ),
]


@pytest.mark.parametrize(("move", "lines"), MOVES)
def test_what_moved_is_named_with_the_likely_cause(toy, live, move, lines):
    """Everything that can move a frozen tensor is found, named and explained."""
    live.seal()
    move(toy)
    found = live.verify()

    assert bool(found) is False
    assert str(found).splitlines() == [f"{len(lines)} of 7 frozen tensors and buffers moved", *lines]
    assert [moved.max_abs for moved in found.moved] == [None] * len(lines)


AMOUNTS = [
    pytest.param(
        write_directly,
        "body.0.weight: moved by up to 0.1 (0.21 of its largest value); "
        "other code wrote it: an optimizer that holds it, an average of weights, or a loader",
        id="parameter",
    ),
    pytest.param(
        write_a_buffer,
        "body.1.running_mean: moved by up to 2; "
        "a buffer was written by other code: a loader, an average of weights, or a reset of statistics",
        id="buffer",
    ),
    pytest.param(
        leave_a_gradient,
        "body.0.weight: moved by up to 0.1 (0.21 of its largest value); "
        "a gradient was left on it, and an optimizer outside the plan used it",
        id="step",
    ),
    pytest.param(
        another_shape,
        REPLACED,
        id="no-amount-for-another-shape",
    ),
]


@pytest.mark.parametrize(("move", "line"), AMOUNTS)
def test_with_a_copy_the_amount_is_said(toy, live, move, line):
    """seal(copy=True) also says by how much something moved."""
    live.seal(copy=True)
    move(toy)

    assert str(live.verify()) == f"1 of 7 frozen tensors and buffers moved\n{line}"


DECAYS = [
    pytest.param(torch.optim.SGD, {"momentum": 0.9}, "all its values shrank by one factor", id="SGD"),
    pytest.param(torch.optim.AdamW, {}, "all its values shrank by one factor", id="AdamW"),
    pytest.param(torch.optim.Adam, {}, "each of its values moved towards zero, as under Adam or RMSprop", id="Adam"),
    pytest.param(torch.optim.NAdam, {}, "each of its values moved towards zero, as under Adam or RMSprop", id="NAdam"),
    pytest.param(
        torch.optim.RMSprop, {}, "each of its values moved towards zero, as under Adam or RMSprop", id="RMSprop"
    ),
]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("optimizer", "arguments", "looks"), DECAYS)
def test_weight_decay_on_a_gradient_of_zeros_is_named(optimizer, arguments, looks, steps):
    """Whatever the optimizer makes of the decay, also where values that are smaller than its step cross zero."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(20, 20), "head": nn.Linear(20, 2)})
    with torch.no_grad():
        model["body"].weight[0] = 0
    live = apply_plan(model, PLAN, guard=False)
    live.seal(copy=True)
    careless = optimizer([model["body"].weight], lr=1e-3, weight_decay=0.05, **arguments)
    for _ in range(steps):
        model["body"].weight.grad = torch.zeros(20, 20)
        careless.step()
    (moved,) = live.verify().moved

    assert moved.cause == f"weight decay on a zero gradient: {looks}; an optimizer holds it"


def noise(weight):
    return 1e-3 * torch.randn_like(weight)


def a_shift(weight):
    return torch.full_like(weight, -1e-3)


def most(weight):
    return -1e-3 * weight.sign() * (weight != weight.max())


@pytest.mark.parametrize("change", [noise, a_shift, most])
def test_other_changes_do_not_look_like_weight_decay(change):
    """Noise, a constant and a change of all values but one have no cause that their looks give."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight = torch.randn(20)
        assert causes.pattern([weight], [weight + change(weight)]) == ""


@pytest.fixture
def empty_is_nan():
    """What is empty holds NaN and the largest integer, not whatever the memory held."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


EXCHANGED = "its data was exchanged: to_empty emptied it, or averaged weights (EMA) or others were swapped in"


@pytest.mark.parametrize("copied", [False, True])
def test_to_empty_on_the_same_device_is_named(toy, live, empty_is_nan, copied):
    """The parameters stay the same objects; what became of buffers is no statistics of batches, nor is the counter."""
    live.seal(copy=copied)
    toy.to_empty(device="cpu")

    assert [str(moved).rpartition("; ")[2] for moved in live.verify().moved[:6]] == [EXCHANGED] * 6
    assert live.verify().moved[6].cause == EXCHANGED


def test_a_move_and_live_statistics_are_no_to_empty(toy, live):
    """A cast to and fro replaces buffers too, but its parameters hold."""
    live.seal(copy=True)
    toy.double().float()
    toy.body[1].training = True
    toy(torch.randn(3, 4))
    toy.body[1].training = False

    assert {moved.cause for moved in live.verify().moved} == {
        "live BatchNorm statistics: its module ran in train for 1 batch"
    }


def test_what_was_emptied_to_nearly_nothing_is_no_decay():
    """A thousandth that is left is no weight decay."""
    weight = torch.ones(32)
    assert (causes.pattern([weight], [weight * 0.01]), causes.pattern([weight], [weight * 1e-5])) == ("shrunk", "")


LOADED = "load_state_dict wrote it: a loader, or averaged weights (EMA) swapped in"


def loaded(toy, change):
    state = copy.deepcopy(toy.state_dict())
    for name in ("body.0.weight", "body.1.running_mean"):
        state[name] += change
    toy.load_state_dict(state)


def test_a_load_is_the_cause_of_what_nothing_wrote_since(toy, live):
    """Loading the weights that are there already is not the cause of what other code writes later."""
    live.seal()
    loaded(toy, 0)
    held = live.verify()
    write_directly(toy)
    write_a_buffer(toy)
    written = [moved.cause for moved in live.verify().moved]
    loaded(toy, 1)
    again = [moved.cause for moved in live.verify().moved]

    assert held
    assert written == [
        "other code wrote it: an optimizer that holds it, an average of weights, or a loader",
        "a buffer was written by other code: a loader, an average of weights, or a reset of statistics",
    ]
    assert again == [LOADED, LOADED]


def test_a_load_before_the_model_was_copied_counts_in_the_copy(toy, live):
    """The copy's tensors lie elsewhere, so what was written to them since is not known."""
    live.seal()
    loaded(toy, 1)
    twin = copy.deepcopy(toy)

    assert [moved.cause for moved in freezeplan.applied(twin).verify().moved] == [LOADED, LOADED]


@pytest.mark.parametrize("copied", [False, True])
def test_values_that_are_no_numbers_are_named_before_the_cause(toy, live, copied):
    """A value that is NaN is said as such, of parameters and buffers, and no amount is."""
    live.seal(copy=copied)
    with torch.no_grad():
        toy.body[0].weight[0, 0] = torch.nan
    toy.body[1].running_mean[1] = torch.nan
    found = live.verify()

    assert str(found).splitlines()[1:] == [
        "body.0.weight: it holds values that are not numbers (NaN); "
        "other code wrote it: an optimizer that holds it, an average of weights, or a loader",
        "body.1.running_mean: it holds values that are not numbers (NaN); "
        "a buffer was written by other code: a loader, an average of weights, or a reset of statistics",
    ]
    assert [(moved.max_abs, moved.relative) for moved in found.moved] == [(None, None)] * 2


def test_values_that_were_no_numbers_before_are_no_cause(toy, live):
    """What was NaN already moved for another reason; by how much is not known."""
    with torch.no_grad():
        toy.body[0].weight[0, 0] = torch.nan
    live.seal(copy=True)
    write_directly(toy)

    assert str(live.verify()).splitlines()[1:] == [
        "body.0.weight: other code wrote it: an optimizer that holds it, an average of weights, or a loader"
    ]


def test_a_plan_that_freezes_nothing_has_nothing_to_hold(toy):
    """It is said plainly, and is no failure."""
    live = apply_plan(toy, {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]})
    live.seal()
    train(toy, torch.optim.SGD(live, lr=0.1))

    assert bool(live.verify()) is True
    assert str(live.verify()) == (
        "nothing to hold: the plan freezes no tensor and no buffer from its first epoch to its last"
    )


def test_a_new_seal_starts_anew(toy, live):
    """seal() again takes what is there now as the start."""
    live.seal()
    write_directly(toy)
    live.seal()

    assert live.verify()


def test_a_seal_covers_buffers_of_whatever_is_in_eval(toy):
    """The statistics of a layer that learns in eval are sealed too."""
    rules = [{"role": "norm", "mode": "eval"}, {"match": ".*", "lr_mult": 1}]
    live = apply_plan(toy, {"version": 1, "rules": rules})
    live.seal()
    train(toy, torch.optim.SGD(live, lr=0.1))

    assert str(live.verify()) == "held: 3 frozen tensors and buffers are bit-identical"


def test_a_frozen_module_kept_in_train_is_not_promised(toy):
    """Where a rule keeps a frozen module in train, its statistics are not sealed, as they move."""
    rules = [{"role": "norm", "frozen": True, "mode": "train"}, {"match": ".*", "lr_mult": 1}]
    live = apply_plan(toy, {"version": 1, "rules": rules})
    live.seal()
    train(toy, torch.optim.SGD(live, lr=0.1))

    assert str(live.verify()) == "held: 2 frozen tensors and buffers are bit-identical"
    assert toy.body[1].num_batches_tracked == 3


def test_buffers_that_are_not_saved_are_not_sealed(toy):
    """A buffer that is in no state_dict is derived from the rest and may be rebuilt, so it is not sealed."""
    toy.body[0].register_buffer("grid", torch.zeros(3), persistent=False)
    toy.body[0].register_buffer("table", torch.zeros(3))
    live = apply_plan(toy, PLAN)
    live.seal()
    toy.body[0].grid.add_(1)
    held = str(live.verify())
    toy.body[0].table.add_(1)

    assert held == "held: 8 frozen tensors and buffers are bit-identical"
    assert [moved.name for moved in live.verify().moved] == ["body.0.table"]


def test_a_parametrizations_buffers_stand_still():
    """Spectral norm's power iteration of a frozen layer stands still."""
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    live = apply_plan(model, {"version": 1, "rules": [{"match": "1", "lr_mult": 1}, {"match": ".*", "frozen": True}]})
    live.seal()
    train(model, torch.optim.SGD(live, lr=0.1))

    assert str(live.verify()) == "held: 4 frozen tensors and buffers are bit-identical"
    assert "0.parametrizations.weight.0._u" in dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_can_be_sealed(toy, dtype):
    """A seal takes whatever values a model has, half precision included."""
    toy.body[0].to(dtype)
    live = apply_plan(toy, PLAN)
    live.seal(copy=True)
    held = str(live.verify())
    write_directly(toy)

    assert held == "held: 7 frozen tensors and buffers are bit-identical"
    assert [moved.name for moved in live.verify().moved] == ["body.0.weight"]
