"""Phases of a training, and rates that hold under every scheduler."""

from __future__ import annotations

import copy
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.scheduler
import torch
from torch import nn
from torch.optim import lr_scheduler

from freezeplan import Plan, applied, apply_plan, resolve_plan
from freezeplan.apply.phases import Progress, advance, phase_at
from freezeplan.errors import ApplyError, FreezePlanWarning, PlanError
from freezeplan.model.describer import create_model

torch.set_num_threads(1)

ALL = {"match": ".*", "lr_mult": 1}
GRADUAL = {
    "version": 1,
    "name": "gradual",
    "phases": [
        {"name": "head", "until": 2, "rules": [{"role": "body", "frozen": True}]},
        {"name": "top", "until": 4, "rules": [{"stage": "..-2", "frozen": True}, {"stage": -1, "lr_mult": 0.1}]},
        {"name": "all"},
    ],
    "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
}
PLATEAU = {
    "version": 1,
    "phases": [
        {"name": "head", "until": {"metric": "loss", "patience": 2}, "rules": [{"role": "body", "frozen": True}]},
        {"name": "all"},
    ],
    "rules": [ALL],
}


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


def train(model: nn.Module, live: Any, optimizer: Any, epochs: range, losses: dict[int, float] | None = None) -> None:
    """Two steps an epoch on images that depend on the epoch alone."""
    for epoch in epochs:
        live.step(epoch=epoch, metrics={"loss": (losses or {}).get(epoch, 1.0)})
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            loss = model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_a_phase_freezes_thaws_and_keeps_the_groups() -> None:
    """Flags and modes follow the phase; the optimizer's groups are made once and hold everything from the start."""
    model = small()
    live = apply_plan(model, GRADUAL, lr=0.1)
    optimizer = torch.optim.SGD(live)
    groups = [(group["name"], len(group["params"])) for group in optimizer.param_groups]
    seen = []
    for epoch in range(6):
        changed = live.step(epoch=epoch)
        model.train()
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        seen.append((changed, live.phase, trained, model.layer4.training, model.layer1.training))

    assert seen == [
        (False, "head", 2, False, False),
        (False, "head", 2, False, False),
        (True, "top", 11, True, False),
        (False, "top", 11, True, False),
        (True, "all", 47, True, True),
        (False, "all", 47, True, True),
    ]
    assert [(group["name"], len(group["params"])) for group in live.param_groups] == groups
    assert sum(count for _, count in groups) == 47


def test_what_is_frozen_in_a_phase_stands_still_and_then_moves() -> None:
    """The same tensors, before and after their phase; gradients of what is frozen again are cleared."""
    model = small()
    live = apply_plan(model, GRADUAL, lr=0.1)
    optimizer = torch.optim.SGD(live, momentum=0.9)
    before = model.layer4[0].conv1.weight.detach().clone()
    mean = model.layer4[0].bn1.running_mean.clone()
    train(model, live, optimizer, range(2))
    still = torch.equal(before, model.layer4[0].conv1.weight) and torch.equal(mean, model.layer4[0].bn1.running_mean)
    train(model, live, optimizer, range(2, 3))

    assert still
    assert not torch.equal(before, model.layer4[0].conv1.weight)
    live.step(epoch=0)
    assert model.layer4[0].conv1.weight.grad is None


def test_a_resumed_run_is_the_run_that_was_never_stopped() -> None:
    """Stopped after epoch 3 of 6 and resumed from state dicts: every weight and buffer is bit-identical."""
    model = small()
    live = apply_plan(model, GRADUAL, lr=0.1)
    optimizer = torch.optim.AdamW(live)
    train(model, live, optimizer, range(3))
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "plan": live.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, live, optimizer, range(3, 6))

    again = small()
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    again.load_state_dict(state["model"])
    resumed = apply_plan(again, GRADUAL, lr=0.1)
    resumed.load_state_dict(state["plan"])
    second = torch.optim.AdamW(resumed)
    second.load_state_dict(state["optimizer"])
    train(again, resumed, second, range(3, 6))

    assert resumed.phase == live.phase == "all"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


PROCESS = """
import hashlib, json, os, pathlib, signal, sys
import timm, torch
from freezeplan import apply_plan

plan, file, killed_in = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.2)
live = apply_plan(model, plan, lr=0.01)
optimizer = torch.optim.AdamW(live)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
holders = {"model": model, "plan": live, "optimizer": optimizer, "scheduler": scheduler}
first = 0
if file.exists():
    state = torch.load(file, weights_only=True)
    first = state["epoch"]
    torch.set_rng_state(state["random"])
    for name, holder in holders.items():
        holder.load_state_dict(state[name])
phases = []
for epoch in range(first, 6):
    live.step(epoch=epoch, metrics={"loss": [1.0, 1.0, 0.9, 0.95, 0.95, 0.8][epoch]})
    phases.append(live.phase)
    model.train()
    for batch in range(2):
        loss = model(torch.randn(4, 3, 32, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
    scheduler.step()
    state = {name: holder.state_dict() for name, holder in holders.items()}
    torch.save({**state, "epoch": epoch + 1, "random": torch.get_rng_state()}, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
digests = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}
print(json.dumps({"phases": phases, "digests": digests}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("plan", "phases"),
    [
        pytest.param(GRADUAL, ["head", "head", "top", "top", "all", "all"], id="epochs"),
        pytest.param(PLATEAU, ["head", "head", "head", "head", "all", "all"], id="plateau"),
    ],
)
def test_a_killed_process_resumes_to_the_same_weights(plan: dict[str, Any], phases: list[str], tmp_path: Path) -> None:
    """SIGKILL in the epoch behind the third; another process ends with the weights of a run that was never stopped.

    The plateau ends one epoch after the kill, so how long it was waited for has to survive.
    """

    def run(file: str, killed_in: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", PROCESS, json.dumps(plan), str(tmp_path / file), str(killed_in)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    whole = run("whole.pt", -1)
    killed = run("killed.pt", 3)
    resumed = run("killed.pt", -1)

    assert (whole.returncode, killed.returncode, resumed.returncode) == (0, -signal.SIGKILL, 0), resumed.stderr
    expected, found = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert (expected["phases"], found["phases"]) == (phases, phases[3:])
    assert len(set(expected["digests"].values())) > 20
    assert found["digests"] == expected["digests"]


def test_a_plateau_ends_a_phase_and_is_remembered() -> None:
    """Two epochs without a better loss; a resumed run knows, and is not asked again."""
    model = small()
    live = apply_plan(model, PLATEAU)
    phases = []
    for epoch, loss in enumerate([1.0, 0.9, 0.9, 0.95, 0.8]):
        live.step(epoch=epoch, metrics={"loss": loss})
        phases.append(live.phase)
    again = apply_plan(small(), PLATEAU)
    again.load_state_dict(live.state_dict())

    assert phases == ["head", "head", "head", "all", "all"]
    assert again.phase == "all"
    assert again.state_dict() == live.state_dict()


def test_progress_is_a_pure_function() -> None:
    """Asked twice for an epoch nothing changes; asked for an earlier one, what came later is forgotten."""
    plan = Plan.model_validate(PLATEAU)
    progress = Progress()
    for epoch in range(1, 4):
        progress = advance(plan.phases, progress, None, epoch, {"loss": 1.0})

    assert progress.ended == ((0, 3),)
    assert advance(plan.phases, progress, None, 3, {}) == progress
    assert phase_at(plan.phases, advance(plan.phases, progress, None, 1, {}), None) == 0


def test_a_percentage_counts_from_the_number_of_epochs() -> None:
    """lp_ft probes for half of the epochs, rounded up; without their number it is refused before anything changes."""
    model = small()
    with pytest.raises(ApplyError) as error:
        apply_plan(model, "lp_ft")
    live = apply_plan(model, "lp_ft", epochs=5)
    phases = [live.step(epoch=epoch) or live.phase for epoch in range(5)]

    assert str(error.value) == (
        "phase 'linear probing' ends after 50% of the epochs, and their number is not known\n"
        "  apply_plan(model, plan, epochs=30)"
    )
    assert phases == ["linear probing", "linear probing", "linear probing", True, "fine-tuning"]


TWO_RATES = {
    "version": 1,
    "phases": [{"name": "slow", "until": 1, "rules": [{"role": "body", "lr_mult": 0.01}]}, {"name": "fast"}],
    "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
}


def test_a_rate_that_differs_between_phases_needs_any_scheduler() -> None:
    """A scheduler owns lr, so nothing else may write it: such a plan needs attach."""
    with pytest.raises(ApplyError) as error:
        apply_plan(small(), TWO_RATES, lr=0.1)

    assert str(error.value) == (
        "'conv1.0.weight' trains at different rates in different phases (lr_mult=0.01/0.1)\n"
        "  this needs apply_plan(..., scheduler='any') and applied.attach(optimizer)"
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine with a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-3),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, eta_min=1e-4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=1e-4),
    "timm": lambda o: timm.scheduler.CosineLRScheduler(o, 6, lr_min=1e-3, warmup_t=2, warmup_lr_init=1e-4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("fused", [False, True], ids=["sgd", "fused-adamw"])
def test_attached_rates_keep_their_ratio_under_every_scheduler(name: str, fused: bool) -> None:
    """Inside each step the rates are the plan's multiples; outside, lr is what the scheduler wrote, untouched."""
    model = small()
    live = apply_plan(model, TWO_RATES, scheduler="any")
    optimizer = torch.optim.AdamW(live, lr=0.01, fused=True) if fused else torch.optim.SGD(live, lr=0.01)
    live.attach(optimizer)
    scheduler = SCHEDULERS[name](optimizer)
    inside: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append([group["lr"] for group in o.param_groups]))
    for epoch in range(5):
        live.step(epoch=epoch)
        outside = [group["lr"] for group in optimizer.param_groups]
        loss = model(torch.randn(2, 3, 32, 32)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        factor = 0.01 if epoch == 0 else 0.1
        factors = [1.0 if "/" not in group["name"] else factor for group in optimizer.param_groups]

        assert inside[-1] == [lr * f for lr, f in zip(outside, factors, strict=True)]
        assert [group["lr"] for group in optimizer.param_groups] == outside
        assert len(set(outside)) == 1
        scheduler.step(*([1.0] if name == "plateau" else [epoch + 1] if name == "timm" else []))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda live: torch.optim.SGD(live, lr=0.01),
    "adamw": lambda live: torch.optim.AdamW(live, lr=0.01),
    "fused-adamw": lambda live: torch.optim.AdamW(live, lr=0.01, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_attach_works_with_a_grad_scaler_and_a_step_that_fails(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """A GradScaler steps the optimizer as usual, one that is fused takes the scale itself; rates are the plan's inside.

    An overflow is no step that changes a weight; after a step that raised, the next one starts from the right rates.
    """
    model, plain = small(), small()
    live = apply_plan(model, TWO_RATES, scheduler="any")
    optimizer = make(live)
    live.attach(optimizer)
    inside: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(lambda o, *_: inside.append({g["name"]: g["lr"] for g in o.param_groups}))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    images = torch.randn(2, 3, 32, 32)
    scaler.scale(model(images).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)

    reference = apply_plan(plain, TWO_RATES, scheduler="any")
    other = make(reference)
    reference.attach(other)
    plain(images).mean().backward()
    other.step()
    assert set(inside[0].values()) == {0.01, 0.01 * 0.01}
    assert inside[1:] == inside[:1]
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(images).mean() * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    optimizer.step()

    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


ATTACH = [
    pytest.param(
        lambda live: live.attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
        "the optimizer does not hold 47 of 47 trained parameters, such as 'conv1.0.weight'\n"
        "  make it from applied.param_groups, after wrapping or moving the model",
        id="other-optimizer",
    ),
    pytest.param(
        lambda live: live.step(epoch=0),
        "scheduler='any' multiplies inside optimizer.step()\n  applied.attach(optimizer)",
        id="forgotten",
    ),
    pytest.param(
        lambda live: live.attach(
            torch.optim.SGD([{"params": live.trainable_parameters(), "lr_scale": 0.1}], lr=0.1),
        ),
        "the optimizer's groups carry lr_scale: timm's schedulers would multiply a second time",
        id="twice",
    ),
    pytest.param(
        lambda live: live.attach(torch.optim.SGD(live.trainable_parameters(), lr=0.1)),
        "the optimizer's group '' holds parameters with different multipliers: 0.01, 1\n"
        "  make the optimizer from applied.param_groups",
        id="one-group",
    ),
]


@pytest.mark.parametrize(("use", "message"), ATTACH)
def test_attach_refuses_what_it_cannot_keep(use: Callable[[Any], Any], message: str) -> None:
    """An optimizer of something else, none at all, one that is multiplied already, one group for all."""
    live = apply_plan(small(), TWO_RATES, scheduler="any")
    with pytest.raises(ApplyError) as error:
        use(live)

    assert str(error.value) == message


def test_attach_is_for_any_scheduler_only_and_undo_detaches() -> None:
    """Where lr is baked in, attach would multiply twice; after undo the optimizer is an ordinary one."""
    model = small()
    baked = apply_plan(model, "full", lr=0.1)
    with pytest.raises(ApplyError) as error:
        baked.attach(torch.optim.SGD(baked))
    live = apply_plan(model, TWO_RATES, scheduler="any", replace=True)
    optimizer = torch.optim.SGD(live, lr=1.0)
    live.attach(optimizer)
    copied = copy.deepcopy(model)
    live.undo()
    weight = model.conv1[0].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()

    assert str(error.value) == (
        "this plan was applied with scheduler='torch', so its groups are multiplied already\n"
        "  apply_plan(model, plan, scheduler='any'), then attach"
    )
    assert torch.equal(weight, before - 1)
    assert applied(model) is None
    assert applied(copied) is not None


def test_a_state_of_another_plan_is_refused() -> None:
    """A checkpoint's phase means nothing under another plan."""
    live = apply_plan(small(), PLATEAU)
    with pytest.raises(ApplyError) as error:
        apply_plan(small(), GRADUAL, lr=0.1).load_state_dict(live.state_dict())

    assert str(error.value) == "this state belongs to another plan than 'gradual': they differ in rules, phases"


def test_a_missing_metric_is_named() -> None:
    """A phase that waits for a plateau needs its metric, and offers the nearest name."""
    live = apply_plan(small(), PLATEAU)
    with pytest.raises(ApplyError) as error:
        live.step(epoch=1, metrics={"los": 1.0})

    assert str(error.value) == (
        "phase 'head' waits for the metric 'loss', found 'los'\n"
        "  did you mean 'los'?\n"
        "  applied.step(epoch=e, metrics={'loss': value}), from the second epoch on"
    )


def test_the_seal_covers_what_no_phase_trains() -> None:
    """What a later phase trains is not sealed."""
    plan = {
        "version": 1,
        "phases": [{"name": "head", "until": 1, "rules": [{"stage": "2..", "frozen": True}]}, {"name": "top"}],
        "rules": [{"stage": "..1", "frozen": True}, ALL],
    }
    model = small()
    live = apply_plan(model, plan)
    live.seal()
    optimizer = torch.optim.SGD(live, lr=0.1)
    train(model, live, optimizer, range(3))

    assert str(live.verify()) == "held: 30 frozen tensors and buffers are bit-identical"


BAD = [
    pytest.param(
        [{"name": "a", "until": 0.25}, {"name": "b"}],
        "phases[0].until: until is an epoch (3), a percentage ('25%') or a plateau {metric: val_loss, patience: 2}",
        id="bare-float",
    ),
    pytest.param([{"name": "a"}, {"name": "b"}], "phase 'a' says no until, and only the last may", id="endless"),
    pytest.param(
        [{"name": "a", "until": 3}], "the last phase, 'a', has no until: it goes on to the end", id="last-ends"
    ),
    pytest.param([{"name": "a", "until": 3}, {"name": "a"}], "two phases are called 'a'", id="twice"),
    pytest.param(
        [{"name": "a", "until": 3}, {"name": "b", "until": 2}, {"name": "c"}],
        "phases end one after the other; until must grow",
        id="order",
    ),
]


@pytest.mark.parametrize(("phases", "message"), BAD)
def test_phases_that_make_no_sense_are_refused(phases: list[dict[str, Any]], message: str) -> None:
    """A bare fraction, an end that is missing or too many, two of a name, ends that do not follow each other."""
    with pytest.raises(PlanError) as error:
        resolve_plan({"version": 1, "phases": phases, "rules": [ALL]}, small())

    assert str(error.value) == message


def test_nothing_trainable_is_an_error_in_each_phase_and_lines_are_those_of_the_file(tmp_path: Any) -> None:
    """A phase's own dead rule is named with its place; a rule of the plan is dead only if it is so in every phase."""
    text = (
        "version: 1\n"
        "phases:\n"
        "  - name: a\n"
        "    until: 1\n"
        "    rules:\n"
        "      - {match: layr1, frozen: true}\n"
        "      - {role: body, frozen: true}\n"
        "  - name: b\n"
        "rules:\n"
        "  - {match: layer4, lr_mult: 0.1}\n"
        "  - {match: .*, lr_mult: 1}\n"
    )
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError) as error:
        resolve_plan(tmp_path / "plan.yaml", small())

    assert str(error.value) == (
        f"{tmp_path}/plan.yaml:6:17: rule 1 (match: layr1) matches no parameter of test_resnet\n"
        "  did you mean 'layer1', 'layer4', 'layer3'?\n"
        "  a rule that need not match on every model says optional: true"
    )


@pytest.mark.parametrize("setting", [{"wd_mult": 0.5}, {"reinit": True}], ids=["wd_mult", "reinit"])
def test_what_is_settled_once_cannot_differ_between_phases(setting: dict[str, Any]) -> None:
    """Weight decay stands in the optimizer's groups, and values are drawn at the start."""
    phases = [{"name": "a", "until": 1, "rules": [{"match": "conv1.0", **setting}]}, {"name": "b"}]
    (key,) = setting
    with pytest.raises(PlanError) as error:
        resolve_plan({"version": 1, "phases": phases, "rules": [ALL]}, small())

    assert str(error.value) == (
        f"{key} of 'conv1.0.weight' differs between phases: {'0.5, 1.0' if key == 'wd_mult' else 'False, True'}\n"
        f"  {key} is settled once, for all phases: say it in the plan's own rules"
    )


def test_a_role_that_is_not_known_is_named_in_a_phase_too() -> None:
    """The rules of phases are checked like the plan's."""
    phases = [{"name": "a", "until": 1, "rules": [{"role": "stem", "frozen": True}]}, {"name": "b"}]
    with pytest.raises(PlanError) as error:
        resolve_plan({"version": 1, "phases": phases, "rules": [ALL]}, nn.Sequential(nn.Linear(2, 2)))

    assert str(error.value) == (
        "role stem is not known: Sequential is no timm model and holds none, so its stem is not known; select with "
        "match or type"
    )


def test_a_rule_of_all_phases_is_weak_only_if_it_is_in_each(recwarn):
    """The head trains first, so the plan's own rules decide little then and everything later."""
    rules = [{"match": "layer1", "frozen": True}, {"role": "bias", "lr_mult": 2}, {"match": ".*", "lr_mult": 1}]
    phases = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "rest"}]
    model = create_model("test_resnet", num_classes=3)
    live = apply_plan(model, {"version": 1, "phases": phases, "rules": rules}, lr=0.1)

    assert [str(warning.message) for warning in recwarn] == []
    assert [part.hints for part in live.resolution.parts] == [(), ()]
    live.undo()

    always = [{"match": "layer[12]", "frozen": True}, {"match": "layer2|fc", "lr_mult": 2}, rules[2]]
    with pytest.warns(FreezePlanWarning, match=r"matched \d+ tensors and decided 2"):
        apply_plan(model, {"version": 1, "phases": phases, "rules": always}, lr=0.1)


def test_rates_of_what_a_phase_freezes_keep_the_ratio_of_their_group():
    """A group that is frozen at first has the rate that its later phase gives it, and the guard knows."""
    rules = [{"role": "bias", "lr_mult": 2}, {"match": ".*", "lr_mult": 1}]
    phases = [{"name": "head", "until": 1, "rules": [{"role": "body", "frozen": True}]}, {"name": "rest"}]
    model = create_model("test_resnet", num_classes=3)
    live = apply_plan(model, {"version": 1, "phases": phases, "rules": rules}, lr=0.1)
    optimizer = torch.optim.SGD(live)
    live.check(optimizer)

    assert [live.step(epoch=epoch) for epoch in range(2)] == [False, True]
    assert {group["lr_mult"]: group["lr"] for group in optimizer.param_groups} == {1.0: 0.1, 2.0: 0.2}
