"""Plans in timm's own tools: optimizer factory, schedulers, checkpoints. Nothing of freezeplan is needed for it."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import CosineLRScheduler, create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver

from freezeplan import apply_plan

torch.set_num_threads(1)

PARTLY = {
    "version": 1,
    "rules": [
        {"role": "head", "lr_mult": 1},
        {"stage": -1, "lr_mult": 0.1},
        {"match": ".*", "frozen": True},
    ],
}
PHASES = {
    "version": 1,
    "phases": [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "all"}],
    "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
}
ARGS = Namespace(
    opt="sgd", lr=0.1, weight_decay=0.05, momentum=0.9, opt_kwargs={}, model="test_resnet",
    sched="cosine", epochs=4, warmup_epochs=1, warmup_lr=1e-3, min_lr=1e-2, sched_on_updates=False,
)  # fmt: skip
"""What timm's train.py parses."""


@pytest.fixture(params=["test_resnet", "test_vit"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    size = {"img_size": 32} if request.param == "test_vit" else {}
    return timm.create_model(request.param, num_classes=3, **size)


def by_hand(applied: Any) -> torch.optim.Optimizer:
    """SGD with each group's rates written out."""
    return torch.optim.SGD(applied, lr=ARGS.lr, momentum=0.9, weight_decay=0.05, nesterov=True)


WAYS = {
    "groups": lambda model, applied: create_optimizer_v2(applied, **optimizer_kwargs(ARGS)),
    "param_group_fn": lambda model, applied: create_optimizer_v2(
        model, **optimizer_kwargs(ARGS), param_group_fn=lambda model: applied.param_groups
    ),
}


@pytest.mark.parametrize("per_update", [False, True], ids=["per-epoch", "per-update"])
@pytest.mark.parametrize("way", WAYS)
def test_timms_optimizer_and_cosine_train_as_a_loop_with_the_rates_by_hand(
    model: Any, plain: Any, way: str, per_update: bool
) -> None:
    """Warm-up, floor and all: each group has the scheduler's value times its multiplier, and the weights are those."""
    other = copy.deepcopy(model)
    live = apply_plan(model, PARTLY, scheduler="timm")
    live.seal()
    optimizer = WAYS[way](model, live)
    settings = {**scheduler_kwargs(ARGS), "step_on_epochs": not per_update}
    scheduler, _ = create_scheduler_v2(optimizer, **settings, updates_per_epoch=3)
    live.check(optimizer)
    seen, done = [], [0, 0]

    def updated() -> None:
        seen.append([group["lr"] for group in optimizer.param_groups])
        done[0] += 1
        scheduler.step_update(done[0])

    def ended() -> None:
        done[1] += 1
        scheduler.step(done[1])

    plain.train(model, live, optimizer, range(2), after_step=updated, after_epoch=ended)

    length = 3 if per_update else 1
    value = CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=ARGS.lr),
        t_initial=4 * length, lr_min=1e-2, warmup_t=length, warmup_lr_init=1e-3,
    )._get_lr  # fmt: skip
    hand = apply_plan(other, PARTLY, scheduler="timm")
    again = by_hand(hand)
    steps = [0]

    def write() -> None:
        for group in again.param_groups:
            group["lr"] = value(steps[0] if per_update else steps[0] // 3)[0] * group["lr_mult"]
        steps[0] += 1

    write()
    plain.train(other, hand, again, range(2), after_step=write)

    assert [group["lr_mult"] for group in optimizer.param_groups] == [0.1, 0.1, 1, 1]
    assert all(rates[0] == pytest.approx(0.1 * rates[-1]) for rates in seen)
    assert len({rates[-1] for rates in seen}) == (6 if per_update else 2)
    assert plain.difference(model.state_dict(), other.state_dict()) <= 1e-6
    assert live.verify()
    assert live.verify().checked > 5


PLATEAU = {
    "version": 1,
    "phases": [
        {
            "name": "head",
            "until": {"metric": "score", "patience": 1, "goal": "max"},
            "rules": [{"role": "body", "frozen": True}],
        },
        {"name": "all"},
    ],
    "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
}


def run(plan: Any, plain: Any, epochs: int, folder: Path, *, resume: bool = False) -> tuple[Any, Any]:
    """What train.py does around its loop, with the lines of docs/trainers/timm.md."""
    torch.manual_seed(0)
    model = timm.create_model(ARGS.model, num_classes=3)
    applied = apply_plan(model, plan, scheduler="timm", weight_decay=ARGS.weight_decay, epochs=ARGS.epochs)
    optimizer = create_optimizer_v2(applied, **optimizer_kwargs(cfg=ARGS), **ARGS.opt_kwargs)
    start = 0
    if resume:
        start = resume_checkpoint(model, str(folder / "last.pth.tar"), optimizer=optimizer) or 0
        if plan is PLATEAU:
            applied.load_state_dict(torch.load(folder / "plan.pt"))
    folder.mkdir(exist_ok=True)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(ARGS), updates_per_epoch=3)
    if start:
        scheduler.step(start)
    saver = CheckpointSaver(model=model, optimizer=optimizer, checkpoint_dir=str(folder))
    for epoch in range(start, epochs):
        plain.train(model, applied, optimizer, range(epoch, epoch + 1))  # calls applied.step(epoch=epoch) first
        scheduler.step(epoch + 1)
        applied.step(epoch=epoch + 1, metrics={"score": plain.scores[epoch]})
        torch.save(applied.state_dict(), folder / "plan.pt")
        saver.save_checkpoint(epoch, metric=float(epoch))
    return model, applied


@pytest.mark.parametrize(
    ("plan", "stop"),
    [pytest.param(PHASES, 2, id="epoch", marks=pytest.mark.slow), pytest.param(PLATEAU, 3, id="plateau")],
)
def test_a_run_resumed_by_timm_in_phase_two_is_the_run_that_was_not_stopped(
    plan: Any, stop: int, plain: Any, tmp_path: Path
) -> None:
    """Phases that end at an epoch need nothing in the checkpoint but the epoch; a plateau is kept beside it."""
    whole, live = run(plan, plain, 5, tmp_path / "whole")
    _, cut = run(plan, plain, stop, tmp_path / "cut")
    again, applied = run(plan, plain, 5, tmp_path / "cut", resume=True)

    assert cut.phase == live.phase == applied.phase == "all"
    assert plain.difference(whole.state_dict(), again.state_dict()) == 0
