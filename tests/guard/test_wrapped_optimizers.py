"""Optimizers that hold others or are held: how far each parameter moves, against the plan's ratio."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim import lr_scheduler

from freezeplan import apply_plan
from freezeplan.errors import ApplyError

RULES = [{"match": "0", "lr_mult": 1}, {"match": "1", "lr_mult": 0.1}]
PLAN = {"version": 1, "weight_decay": "all", "rules": RULES}


class Sam(torch.optim.Optimizer):
    """davda54/sam, as it is published."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """pytorch_optimizer's: hooks of its own, no ``super().__init__``."""

    def __init__(self, optimizer):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.defaults, self.state = {}, {}

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Plain:
    """A wrapper that is no Optimizer."""

    def __init__(self, optimizer):
        self.inner = [optimizer]

    @property
    def param_groups(self):
        return self.inner[0].param_groups

    def step(self):
        self.inner[0].step()


class Copying(torch.optim.Optimizer):
    """Groups of its own, which it copies into those of the optimizer that it holds, as ZeroRedundancyOptimizer does."""

    def __init__(self, optimizer):
        super().__init__([{**group, "params": [*group["params"]]} for group in optimizer.param_groups], {})
        self.optim = optimizer

    def step(self, closure=None):
        for group, inner in zip(self.param_groups, self.optim.param_groups, strict=True):
            inner["lr"] = group["lr"]
        return self.optim.step(closure)


class Super(torch.optim.SGD):
    """Calls the step that it inherits, whose hooks run a second time."""

    def step(self, closure=None):
        return super().step(closure)


def sgd(live):
    return torch.optim.SGD(live, lr=0.1)


def accelerated(live):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(sgd(live))


def lightning(live):
    wrapped = pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(sgd(live))
    wrapped._strategy = SimpleNamespace(optimizer_step=lambda optimizer, closure, **_: optimizer.step(closure))
    return wrapped


def plainly(optimizer):
    optimizer.step()


def in_two(optimizer):
    optimizer.first_step()
    optimizer.second_step()


def closed(optimizer):
    optimizer.step(lambda: torch.ones(()))


def scaled(optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


WRAPPED = {
    "sgd": (sgd, plainly),
    "gradscaler": (sgd, scaled),
    "super": (lambda live: Super(live, lr=0.1), plainly),
    "lookahead-sgd": (lambda live: timm.optim.Lookahead(sgd(live), k=100), plainly),
    "lookahead-adam": (lambda live: timm.optim.Lookahead(torch.optim.Adam(live, lr=0.1), k=100), plainly),
    "lookahead-adamw": (
        lambda live: timm.optim.Lookahead(torch.optim.AdamW(live, lr=0.1, weight_decay=0), k=100),
        plainly,
    ),
    "lookahead-rmsprop": (lambda live: timm.optim.Lookahead(torch.optim.RMSprop(live, lr=0.1), k=100), plainly),
    "lookahead-own-hooks": (lambda live: Lookahead(sgd(live)), plainly),
    "lookahead-gradscaler": (lambda live: timm.optim.Lookahead(sgd(live), k=100), scaled),
    "sam-two-steps": (lambda live: Sam(live, torch.optim.SGD, lr=0.1), in_two),
    "sam-closure": (lambda live: Sam(live, torch.optim.SGD, lr=0.1), closed),
    "copying": (lambda live: Copying(sgd(live)), plainly),
    "plain": (lambda live: Plain(sgd(live)), plainly),
    "accelerate": (accelerated, plainly),
    "lightning": (lightning, plainly),
    "lookahead-in-plain": (lambda live: Plain(timm.optim.Lookahead(sgd(live), k=100)), plainly),
}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "lightning" else ()) for name in WRAPPED]
"""Lightning takes seconds to import."""


def toy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no-guard"])
@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_moves_as_far_as_the_plan_says(name, guard):
    """Constant gradient, a falling rate: in every step the second layer moves a tenth of what the first moves."""
    make, step = WRAPPED[name]
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any", guard=guard)
    optimizer = make(live)
    live.attach(optimizer)
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 - 0.02 * epoch
        shown = [group["lr"] for group in optimizer.param_groups]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(optimizer)
        moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]
        assert moved[2] / moved[0] == pytest.approx(0.1, rel=1e-3), epoch
        assert moved[3] / moved[1] == pytest.approx(0.1, rel=1e-3), epoch
        assert [group["lr"] for group in optimizer.param_groups] == shown


SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.01),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10, cycle_momentum=False),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # Lookahead and SAM wrap what torch counts
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", NAMES)
def test_schedulers_keep_the_ratio(name, scheduler):
    """One floor and one peak for all groups: without the plan's multiplier inside the step all would move alike."""
    make, step = WRAPPED[name]
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = make(live)
    live.attach(optimizer)
    owner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.inner[0]
    schedule = SCHEDULERS[scheduler](owner)
    rates = []
    for epoch in range(5):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(optimizer)
        moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]
        rates.append(owner.param_groups[0]["lr"])
        assert moved[2] / moved[0] == pytest.approx(0.1, rel=1e-3), epoch
        assert moved[3] / moved[1] == pytest.approx(0.1, rel=1e-3), epoch
        schedule.step()
    assert len(set(rates)) == 5
    live.check(optimizer)


@pytest.mark.slow
def test_a_compiled_step_keeps_the_ratio():
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = sgd(live)
    live.attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step()
        moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]
        assert moved[2] / moved[0] == pytest.approx(0.1, rel=1e-3)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_accelerate_prepares_what_is_attached_already():
    accelerate = pytest.importorskip("accelerate")
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = sgd(live)
    live.attach(optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerate.Accelerator(cpu=True).prepare(optimizer).step()
    moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]

    assert moved[2] / moved[0] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no-guard"])
def test_an_optimizer_that_was_not_attached_moves_nothing(guard):
    """Nor does one beside an attached one."""
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any", guard=guard)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ApplyError) as error:
        sgd(live).step()
    live.attach(sgd(live))
    with pytest.raises(ApplyError) as beside:
        torch.optim.Adam(live).step()

    said = (
        " is about to step 4 trained parameters, such as '0.weight', and is not attached: with scheduler='any' the "
        "rates are multiplied inside the steps of attached optimizers alone\n  "
    )
    assert str(error.value) == f"SGD{said}applied.attach(this SGD)"
    assert str(beside.value) == f"Adam{said}attach all in one call: applied.attach(..., this Adam)"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_wrapper_whose_step_torch_does_not_hook_is_refused_in_words():
    """It moves the parameters itself, so nothing can multiply."""

    class Own:
        def __init__(self, groups):
            self.param_groups = list(groups)

        def step(self):
            raise NotImplementedError

    live = apply_plan(toy(), PLAN, scheduler="any")
    with pytest.raises(ApplyError) as error:
        live.attach(Own(live))

    assert str(error.value) == (
        "Own.step is not called through torch.optim.Optimizer, and Own holds no optimizer that steps 4 of its "
        "parameters: nothing can multiply their rates\n"
        "  attach the torch.optim.Optimizer that moves them: applied.attach(optimizer)"
    )


def test_a_failed_step_leaves_the_rates_of_the_scheduler():
    """A closure raised inside SAM's step; the next step and the check see the scheduler's rates."""
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = Sam(live, torch.optim.SGD, lr=0.1)
    live.attach(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    live.check()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_several_optimizers_are_attached_together():
    """Phases included; one of them alone is refused, and the message says to attach all."""
    model = toy()
    phases = [{"name": "slow", "until": 1, "rules": [{"match": "1", "lr_mult": 0.5}]}, {"name": "fast"}]
    live = apply_plan(model, {**PLAN, "phases": phases}, scheduler="any")
    first, second = (torch.optim.SGD([group], lr=0.1) for group in live.param_groups)
    with pytest.raises(ApplyError) as error:
        live.attach(first)
    live.attach(first, second)
    ratios = []
    for epoch in range(2):
        live.step(epoch=epoch)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        first.step()
        second.step()
        moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]
        ratios.append(moved[2] / moved[0])

    assert ratios == pytest.approx([0.5, 0.1], rel=1e-3)
    assert str(error.value) == (
        f"the optimizer does not hold 2 of 4 trained parameters, such as {second.param_groups[0]['param_names'][0]!r}\n"
        "  make it from applied.param_groups, after wrapping or moving the model\n"
        "  of several optimizers attach all in one call: applied.attach(first, second)"
    )


def test_attach_needs_all_that_is_trained():
    model = toy()
    live = apply_plan(model, PLAN, scheduler="any")
    with pytest.raises(ApplyError) as nothing:
        live.attach()
    with pytest.raises(ApplyError) as missing:
        live.attach(torch.optim.SGD([model[0].weight], lr=0.1), torch.optim.SGD([model[0].bias], lr=0.1))

    assert str(nothing.value) == "attach was called without an optimizer\n  applied.attach(optimizer)"
    assert str(missing.value) == (
        "the 2 optimizers do not hold 2 of 4 trained parameters, such as '1.weight'\n"
        "  make them from applied.param_groups, after wrapping or moving the model"
    )


def test_a_schedule_of_weight_decay_that_ignores_wd_mult_is_refused():
    """DINO's writes one value into every decaying group; multiplied by the group's wd_mult it is right."""
    plan = {"version": 1, "weight_decay": "all", "rules": [{"match": "0", "wd_mult": 0.5, "lr_mult": 1}, RULES[1]]}
    model = toy()
    live = apply_plan(model, plan, lr=0.1, weight_decay=0.04)
    optimizer = torch.optim.AdamW(live)
    optimizer.step()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.4 * group["wd_mult"]
    optimizer.step()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.4
    with pytest.raises(ApplyError) as error:
        optimizer.step()

    names = [group["name"] for group in optimizer.param_groups]
    table = ", ".join(
        f"group {name!r} has weight_decay 0.4 and wd_mult {group['wd_mult']:g}"
        for name, group in zip(names, optimizer.param_groups, strict=True)
    )
    assert sorted(group["wd_mult"] for group in optimizer.param_groups) == [0.5, 1.0]
    assert str(error.value) == (
        f"the weight decays no longer have the plan's ratios: {table}\n"
        '  a schedule of weight decay multiplies: group["weight_decay"] = wd * group["wd_mult"]\n'
        "  first seen at step 3 of AdamW"
    )


def test_a_scheduler_over_lookahead_is_named():
    """The scheduler refers to the outer optimizer and the inner one steps."""
    live = apply_plan(toy(), PLAN, lr=0.1)
    optimizer = timm.optim.Lookahead(torch.optim.SGD(live))
    kept = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    with pytest.raises(ApplyError) as error:
        optimizer.step()
    assert str(error.value) == (
        "OneCycleLR flattened the rates: group 'lr_mult=1' has lr 0.004, group 'lr_mult=0.1' has lr 0.004\n"
        "  OneCycleLR(optimizer, **applied.scheduler_kwargs(OneCycleLR, max_lr=0.1, ...)) gives max_lr=[0.1, 0.01]\n"
        "  or apply_plan(..., scheduler='any') and applied.attach(optimizer): exact under every scheduler\n"
        "  seen at the first step of SGD"
    )
    assert kept.optimizer is optimizer


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no-guard"])
def test_a_swapped_batch_norm_is_called_replaced(guard):
    """It was never set to requires_grad=True by anybody: it came so."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    plan = {"version": 1, "rules": [{"match": "2", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
    live = apply_plan(model, plan, lr=0.1, guard=guard)
    model[1] = nn.BatchNorm1d(2)
    with pytest.raises(ApplyError) as error:
        live.check()

    assert "\n".join(str(error.value).splitlines()[:3]) == (
        "2 frozen parameters, such as '1.weight', were replaced after the plan was applied, and what replaced it is "
        "trained\n"
        "  a module that is swapped in brings parameters of its own: swap it, then apply the plan\n"
        "  apply_plan(..., replace=True) takes the model as it is now"
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_for_matrices_and_adamw_for_the_rest_follow_the_plan_through_its_phases():
    """Muon's update has a size of its own, so a matrix moves in proportion to its rate."""
    model = toy()
    phases = [{"name": "slow", "until": 1, "rules": [{"match": "1", "lr_mult": 0.5}]}, {"name": "fast"}]
    live = apply_plan(model, {**PLAN, "phases": phases}, scheduler="any")

    def groups(wanted):
        for group in live.param_groups:
            found = [p for p in group["params"] if wanted(p)]
            if found:
                yield {**group, "params": found, "param_names": [str(at) for at in range(len(found))]}

    muon = torch.optim.Muon(groups(lambda p: p.ndim == 2), lr=0.1, weight_decay=0.0)
    adamw = torch.optim.AdamW(groups(lambda p: p.ndim != 2), lr=0.1, weight_decay=0.0)
    live.attach(muon, adamw)
    ratios = []
    for epoch in range(2):
        live.step(epoch=epoch)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        muon.step()
        adamw.step()
        moved = [(b - a).mean().item() for a, b in zip(model.parameters(), before, strict=True)]
        ratios.append([moved[2] / moved[0], moved[3] / moved[1]])

    assert ratios == [pytest.approx([0.5, 0.5], rel=1e-3), pytest.approx([0.1, 0.1], rel=1e-3)]


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no-guard"])
def test_the_closure_of_lbfgs_runs_at_the_plans_rate(guard):
    """It has one group, and calls its closure many times in a step: the rate is multiplied once."""
    plan = {"version": 1, "rules": [{"match": ".*", "lr_mult": 0.1}], "weight_decay": "all"}
    models = [toy(), toy()]
    live = apply_plan(models[0], plan, scheduler="any", guard=guard)
    optimizers = [torch.optim.LBFGS(live, lr=0.1), torch.optim.LBFGS(models[1].parameters(), lr=0.01)]
    live.attach(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model(torch.ones(3, 2)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
