"""Optimizers that choose their own rates, and groups that were edited by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from freezeplan import apply_plan
from freezeplan.errors import ApplyError

ONE = {"version": 1, "rules": [{"match": "1", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
TWO = {"version": 1, "rules": [{"match": "1", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}]}


def step(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Train one step; the rates of the groups while it steps, by the names of their parameters."""
    rates: dict[str, float] = {}

    def note(stepping: Any, *_: Any) -> None:
        rates.update({name: group["lr"] for group in stepping.param_groups for name in group["param_names"]})

    hook = optimizer.register_step_pre_hook(note)
    model.train()(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    hook.remove()
    return rates


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


class Fixed(torch.optim.Optimizer):
    """An optimizer without any ``lr``."""

    def __init__(self, params: Any):
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= 0.01 * parameter.grad


MADE = {"Adafactor": timm.optim.Adafactor, "Fixed": Fixed}


@pytest.mark.parametrize("scheduler", ["torch", "timm", "any"])
@pytest.mark.parametrize("made", MADE)
def test_one_rate_for_all_needs_no_rate(made: str, scheduler: Any) -> None:
    """timm's Adafactor has ``lr=None`` by default and chooses."""
    model = net()
    live = apply_plan(model, ONE, scheduler=scheduler)
    optimizer = MADE[made](live.param_groups)
    if scheduler == "any":
        live.attach(optimizer)
    before = model[1].weight.detach().clone()
    for _ in range(2):
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    live.check(optimizer)

    assert not torch.equal(model[1].weight, before)


@pytest.mark.parametrize("scheduler", ["timm", "any"])
@pytest.mark.parametrize("made", MADE)
def test_several_rates_need_one(made: str, scheduler: Any) -> None:
    model = net()
    live = apply_plan(model, TWO, scheduler=scheduler)
    optimizer = MADE[made](live.param_groups)
    with pytest.raises(ApplyError) as error:
        live.attach(optimizer) if scheduler == "any" else live.check(optimizer)

    assert str(error.value) == (
        f"{made} chooses its own rate, as its groups have no lr: the plan's multipliers cannot act\n"
        "  give it a learning rate, or a plan that trains all at one rate"
    )


def reverse(optimizer: Any) -> None:
    optimizer.param_groups.reverse()


def move_to_the_end(optimizer: Any) -> None:
    group = optimizer.param_groups.pop(0)
    optimizer.add_param_group({key: group[key] for key in ("params", "param_names", "name")})


def replace(optimizer: Any) -> None:
    optimizer.param_groups[:] = [dict(group) for group in reversed(optimizer.param_groups)]


@pytest.mark.parametrize("edit", [reverse, move_to_the_end, replace])
def test_multipliers_follow_their_groups(edit: Any) -> None:
    """Groups in another order, as many as before: each keeps the multiplier of its parameters."""
    model = net()
    live = apply_plan(model, TWO, scheduler="any")
    optimizer = torch.optim.SGD(live, lr=1.0)
    live.attach(optimizer)
    first = step(model, optimizer)
    edit(optimizer)

    assert first == {"0.weight": 0.1, "0.bias": 0.1, "1.weight": 1.0, "1.bias": 1.0}
    assert step(model, optimizer) == first


def test_groups_in_another_order_are_looked_at_anew() -> None:
    """The guard compares each group with its own factor: nothing is wrong with another order."""
    model = net()
    live = apply_plan(model, {**TWO, "weight_decay": "all"}, lr=0.1)
    optimizer = torch.optim.SGD(live)
    first = step(model, optimizer)
    reverse(optimizer)
    assert step(model, optimizer) == first

    low, high = optimizer.param_groups[1], optimizer.param_groups[0]
    low["lr"], high["lr"] = high["lr"], low["lr"]
    with pytest.raises(ApplyError, match="no longer have the plan's ratios"):
        step(model, optimizer)
