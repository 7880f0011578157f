"""The guard inside ``optimizer.step()``: on unless it is refused, silent in clean loops, gone with the plan."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

from freezeplan import apply_plan
from freezeplan.errors import ApplyError
from freezeplan.guard.optimizer_hook import _live

PLAN = {
    "version": 1,
    "weight_decay": "all",
    "rules": [{"match": "2", "lr_mult": 1}, {"match": "1", "lr_mult": 0.1}, {"match": ".*", "frozen": True}],
}
EXACT = "or apply_plan(..., scheduler='any') and applied.attach(optimizer): exact under every scheduler"


@pytest.fixture
def model():
    gc.collect()  # plans of other tests
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def train(model, optimizer, after=lambda: None, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        after()


def test_rates_that_a_scheduler_flattened_are_refused_at_the_first_step(model):
    """No call of check or step is needed, and nothing has moved."""
    live = apply_plan(model, PLAN, lr=0.1)
    optimizer = torch.optim.SGD(live)
    before = copy.deepcopy(model.state_dict())
    kept = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    with pytest.raises(ApplyError) as error:
        train(model, optimizer, kept.step)

    assert str(error.value) == (
        "OneCycleLR flattened the rates: group 'lr_mult=0.1' has lr 0.004, group 'lr_mult=1' has lr 0.004\n"
        "  OneCycleLR(optimizer, **applied.scheduler_kwargs(OneCycleLR, max_lr=0.1, ...)) gives max_lr=[0.01, 0.1]\n"
        f"  {EXACT}\n  seen at the first step of SGD"
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_an_optimizer_of_all_parameters_is_refused_at_the_first_step(model):
    """It holds what is frozen, and gives one rate to what has several."""
    apply_plan(model, PLAN, lr=0.1)
    with pytest.raises(ApplyError) as error:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert str(error.value) == (
        "2 frozen parameters, such as '0.weight', are in an optimizer\n"
        "  it would move them by momentum or weight decay as soon as they have a gradient, also one of zeros\n"
        "  make it from applied.param_groups, not from model.parameters()\n"
        "  seen at the first step of SGD\n\n"
        "group 0 of SGD holds parameters that the plan trains at 0.1, 1 times the rate, and gives them one\n"
        "  make the optimizer from applied.param_groups, not from model.parameters()\n"
        "  seen at the first step of SGD"
    )


def test_without_the_guard_nothing_is_said(model):
    """And no hook is registered."""
    before = list(_live)
    apply_plan(model, PLAN, lr=0.1, guard=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10).step)

    assert list(_live) == before


def test_a_flag_is_said_at_the_step_at_which_it_was_first_seen(model):
    """The step says who: what ran between it and the one before."""
    optimizer = torch.optim.SGD(apply_plan(model, PLAN, lr=0.1))
    train(model, optimizer, steps=2)
    model[0].bias.requires_grad_(True)
    with pytest.raises(ApplyError) as error:
        optimizer.step()

    assert str(error.value) == (
        "1 frozen parameter, '0.bias', was set to requires_grad=True by other code\n"
        "  nothing but the plan should set it: a phase thaws what it names\n"
        "  first seen at step 3 of SGD"
    )


def test_rates_that_part_later_are_said_at_that_step(model):
    """A floor is reached at the second step."""
    optimizer = torch.optim.SGD(apply_plan(model, PLAN, lr=0.1))
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=1, eta_min=0.01)
    with pytest.raises(ApplyError, match="first seen at step 2 of SGD"):
        train(model, optimizer, scheduler.step)


def test_a_model_replaced_after_the_optimizer_was_made_is_said(model):
    """The optimizer holds none of its parameters any more, and still is its optimizer."""
    optimizer = torch.optim.SGD(apply_plan(model, PLAN, lr=0.1))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ApplyError, match=r"^4 trained parameters, .*, were replaced after the optimizer"):
        train(model, optimizer)


def test_optimizers_that_take_turns_say_nothing(model):
    """Each switches off what the other trains for the length of its turn."""
    live = apply_plan(model, PLAN, lr=0.1)
    first, second = (torch.optim.SGD([group]) for group in live.param_groups)
    for optimizer, other in [(first, second), (second, first)] * 2:
        held = [p for group in other.param_groups for p in group["params"]]
        for parameter in held:
            parameter.requires_grad_(False)
        train(model, optimizer, steps=1)
        for parameter in held:
            parameter.requires_grad_(True)
    live.step(epoch=1)

    assert {*live._guard.optimizers} == {first, second}


def test_other_models_optimizers_and_copies_are_left_alone(model):
    """An average is a copy; a second model has a plan of its own or none."""
    live = apply_plan(model, PLAN, lr=0.1)
    watching = list(_live)
    average, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    other = nn.Linear(4, 2)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))

    assert list(_live) == watching
    assert [twin._freezeplan._guard._watcher for twin in (average, restored)] == [None, None]
    assert not live._guard.optimizers


def test_a_copy_that_is_trained_is_watched(model):
    """From when its groups are asked for."""
    apply_plan(model, PLAN, lr=0.1)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin._freezeplan)
    twin[0].weight.requires_grad_(True)
    with pytest.raises(ApplyError, match="seen at the first step of SGD"):
        train(twin, optimizer)


def test_the_hook_goes_with_the_plan(model):
    """By undo; one hook serves all plans, and what nothing holds any more is not watched."""
    gc.collect()
    before = len(_live), dict(hooks)  # plans of other tests may be alive in this process
    live = apply_plan(model, PLAN, lr=0.1)
    live = apply_plan(model, PLAN, lr=0.1, replace=True)
    assert len(_live) == before[0] + 1
    twin = copy.deepcopy(model)
    apply_plan(twin, PLAN, lr=0.1, replace=True)
    assert (len(_live), len(hooks)) == (before[0] + 2, 1)
    del twin
    gc.collect()
    assert len(_live) == before[0] + 1
    live.undo()
    live.undo()
    assert (len(_live), len(hooks)) == (before[0], before[0] > 0)


def test_a_plan_collected_during_a_step_does_no_harm(model):
    """Torch walks over its hooks while a step begins."""
    gc.collect()
    before = len(_live)
    optimizer = torch.optim.SGD(apply_plan(model, PLAN, lr=0.1))
    other = copy.deepcopy(model)
    apply_plan(other, PLAN, lr=0.1, replace=True)
    left = [other]
    del other
    optimizer.register_step_pre_hook(lambda *_: (left.clear(), gc.collect(), None)[-1])
    train(model, optimizer)

    assert len(_live) == before + 1


@pytest.mark.slow
def test_scaled_and_compiled_steps_say_nothing(model):
    """A GradScaler skips steps; a compiled step passes the guard by."""
    optimizer = torch.optim.SGD(apply_plan(model, PLAN, lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        scaler.scale(model(torch.randn(3, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    step = torch.compile(optimizer.step, backend="eager")
    step()
    model[0].bias.requires_grad_(True)
    step()
    model[0].bias.requires_grad_(False)
    optimizer.step()
