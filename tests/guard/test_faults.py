"""The guards' whole messages, the schedulers' arguments that keep a plan's ratios, and that a guard can be off."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import lr_scheduler
from torch.testing._internal.distributed.fake_pg import FakeStore

from freezeplan import apply_plan
from freezeplan.errors import ApplyError

PLAN = {
    "version": 1,
    "weight_decay": "all",
    "rules": [{"match": "head", "lr_mult": 1}, {"match": "mid", "lr_mult": 0.1}, {"match": ".*", "frozen": True}],
}
EXACT = "or apply_plan(..., scheduler='any') and applied.attach(optimizer): exact under every scheduler"
REPLACED = "load_state_dict(assign=True), to_empty, reset_classifier and fully_shard replace parameters"
AGAIN = "apply_plan(..., replace=True) takes the model as it is now"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.mid = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mid(self.body(x)))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


def start(toy, **arguments):
    live = apply_plan(toy, PLAN, lr=0.1, **arguments)
    optimizer = torch.optim.SGD(live, lr=0.1, momentum=0.9)
    live.check(optimizer)
    return live, optimizer


def thaw(toy, optimizer):
    toy.body[0].weight.requires_grad_(True)
    toy.body[0].bias.requires_grad_(True)


def stop(toy, optimizer):
    toy.mid.bias.requires_grad_(False)


def stale(toy, optimizer):
    toy.body[1].bias.grad = torch.zeros(4)


def by_hand(toy, optimizer):
    toy.body[1].training = True


def loosen(toy, optimizer):
    toy.body = nn.Sequential(*toy.body)


def lose(toy, optimizer):
    toy.mid = nn.Identity()


def add(toy, optimizer):
    toy.adapter = nn.Linear(2, 2, bias=False)


def reshape(toy, optimizer):
    toy.head = nn.Linear(4, 5)


def renew(toy, optimizer):
    toy.head = nn.Linear(4, 2)


FAULTS = [
    pytest.param(
        thaw,
        [
            "2 frozen parameters, such as 'body.0.weight', were set to requires_grad=True by other code",
            "  nothing but the plan should set it: a phase thaws what it names",
        ],
        id="thawed",
    ),
    pytest.param(
        stop,
        [
            "1 trained parameter, 'mid.bias', was set to requires_grad=False by other code",
            "  they learn nothing; freeze them in the plan if that is meant",
        ],
        id="stopped",
    ),
    pytest.param(
        stale,
        [
            "1 frozen parameter, 'body.1.bias', was left with a gradient by other code",
            "  an optimizer that holds them would move them, also with a gradient of zeros; set .grad = None",
        ],
        id="gradient",
    ),
    pytest.param(
        by_hand,
        [
            "1 frozen module, 'body.1', was put in train by hand",
            "  model.train() leaves them in eval; .training = True does not: statistics and dropout come alive",
        ],
        id="train",
    ),
    pytest.param(
        loosen,
        [
            "3 modules, such as 'body', are no longer held in eval",
            "  replaced after the plan was applied, by convert_sync_batchnorm for one; apply the plan after that",
        ],
        id="pin",
    ),
    pytest.param(
        lose,
        [
            "2 parameters, such as 'mid.weight', are no longer in the model",
            f"  {REPLACED}",
            f"  {AGAIN}",
        ],
        id="lost",
    ),
    pytest.param(
        add,
        [
            "1 parameter, 'adapter.weight', was added to the model after the plan was applied",
            f"  {REPLACED}",
            f"  {AGAIN}",
        ],
        id="added",
    ),
    pytest.param(
        reshape,
        [
            "2 parameters, such as 'head.weight', are of another shape than when the plan was applied",
            f"  {REPLACED}",
            f"  {AGAIN}",
        ],
        id="reshaped",
    ),
    pytest.param(
        renew,
        [
            "2 trained parameters, such as 'head.weight', were replaced after the optimizer was made: it trains others",
            f"  {REPLACED}",
            "  make the optimizer from applied.param_groups after that",
        ],
        id="replaced",
    ),
]


@pytest.mark.parametrize(("fault", "lines"), FAULTS)
def test_what_other_code_did_is_said_before_the_next_epoch(toy, fault, lines):
    """check() and step() say it with one voice; step() also says since when."""
    live, optimizer = start(toy)
    live.step(epoch=0)
    fault(toy, optimizer)
    with pytest.raises(ApplyError) as checked:
        live.check()
    with pytest.raises(ApplyError) as stepped:
        live.step(epoch=1)

    assert str(checked.value).splitlines() == lines
    assert str(stepped.value).splitlines() == [*lines, "  seen before epoch 1"]


def test_several_faults_are_said_at_once(toy):
    """Every problem is in one error."""
    live, _ = start(toy)
    thaw(toy, None)
    by_hand(toy, None)
    with pytest.raises(ApplyError) as error:
        live.check()

    assert len(error.value.problems) == 2


def test_the_guard_can_be_off(toy):
    """With guard=False step() says nothing; check() still does."""
    live, _ = start(toy, guard=False)
    thaw(toy, None)
    live.step(epoch=1)

    with pytest.raises(ApplyError, match="requires_grad=True by other code"):
        live.check()


def test_an_undone_plan_is_not_checked(toy):
    """check() of a plan that is no longer live says so."""
    live, _ = start(toy)
    live.undo()
    with pytest.raises(ApplyError) as error:
        live.check()

    assert str(error.value) == "the plan 'plan' is no longer live on this model: it was undone or replaced"


def everything(toy, live):
    return [torch.optim.SGD(toy.parameters(), lr=0.1)]


def a_part(toy, live):
    return [torch.optim.SGD(toy.head.parameters(), lr=0.1)]


def idle(toy, live):
    return [torch.optim.SGD(live, lr=0.1), torch.optim.Adam([nn.Parameter(torch.zeros(1), requires_grad=False)])]


OPTIMIZERS = [
    pytest.param(
        everything,
        [
            "4 frozen parameters, such as 'body.0.weight', are in an optimizer",
            "  it would move them by momentum or weight decay as soon as they have a gradient, also one of zeros",
            "  make it from applied.param_groups, not from model.parameters()",
            "",
            "group 0 of SGD holds parameters that the plan trains at 0.1, 1 times the rate, and gives them one",
            "  make the optimizer from applied.param_groups, not from model.parameters()",
        ],
        id="frozen-ones",
    ),
    pytest.param(
        a_part,
        [
            "2 trained parameters, such as 'mid.weight', are in no optimizer",
            "  make it from applied.param_groups; of several, check all: applied.check(first, second)",
        ],
        id="some",
    ),
    pytest.param(
        idle,
        [
            "Adam holds no parameter that any phase trains: it does nothing, and under a GradScaler its step would "
            "stop with 'No inf checks were recorded'",
            "  make it from applied.param_groups",
        ],
        id="nothing",
    ),
]


@pytest.mark.parametrize(("make", "lines"), OPTIMIZERS)
def test_an_optimizer_that_does_not_fit_the_plan(toy, make, lines):
    """What it holds too much, or misses, or that it has nothing to do."""
    live = apply_plan(toy, PLAN, lr=0.1)
    with pytest.raises(ApplyError) as error:
        live.check(*make(toy, live))

    assert str(error.value).splitlines() == lines


def test_a_gradscaler_would_stop_there():
    """The message that the guard foresees is torch's own."""
    parameter = nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer, scaler = torch.optim.SGD([parameter], lr=0.1), torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(torch.zeros(1, requires_grad=True).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


TWO_PHASES = {
    "version": 1,
    "phases": [{"name": "head", "until": 1, "rules": [{"match": "body|mid", "frozen": True}]}, {"name": "all"}],
    "rules": [{"match": ".*", "lr_mult": 1}],
}


def test_an_optimizer_that_waits_for_its_phase_is_right_without_a_gradscaler(toy):
    """Only a scaler stops at it, and only an enabled one."""
    live = apply_plan(toy, TWO_PHASES)
    head = torch.optim.SGD(toy.head.parameters(), lr=0.1)
    body = torch.optim.SGD([*toy.body.parameters(), *toy.mid.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    live.check(head, body)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.raises(ApplyError) as error:
        live.check(head, body)
    del scaler
    live.check(head, body)

    assert str(error.value) == (
        "SGD holds no parameter that is trained now: GradScaler.step(optimizer) would stop with "
        "'No inf checks were recorded'\n  leave it out of the loop until a phase trains what it holds"
    )


def test_two_optimizers_are_checked_together(toy):
    """Trained parameters may be shared out among several optimizers."""
    live = apply_plan(toy, PLAN, lr=0.1)
    first, second = ([group] for group in live.param_groups)

    live.check(torch.optim.SGD(first, momentum=0.9), torch.optim.Adam(second))


FLATTENED = [
    pytest.param(
        lr_scheduler.OneCycleLR,
        {"max_lr": 0.5, "total_steps": 10},
        [
            "OneCycleLR flattened the rates: group 'lr_mult=0.1' has lr 0.02, group 'lr_mult=1' has lr 0.02",
            "  OneCycleLR(optimizer, **applied.scheduler_kwargs(OneCycleLR, max_lr=0.5, ...)) gives max_lr=[0.05, 0.5]",
            f"  {EXACT}",
        ],
        id="OneCycleLR",
    ),
    pytest.param(
        lr_scheduler.CyclicLR,
        {"base_lr": 0.01, "max_lr": 0.5},
        [
            "CyclicLR flattened the rates: group 'lr_mult=0.1' has lr 0.01, group 'lr_mult=1' has lr 0.01",
            "  CyclicLR(optimizer, **applied.scheduler_kwargs(CyclicLR, base_lr=0.01, max_lr=0.5, ...)) gives "
            "base_lr=[0.001, 0.01], max_lr=[0.05, 0.5]",
            f"  {EXACT}",
        ],
        id="CyclicLR",
    ),
    pytest.param(
        lr_scheduler.CosineAnnealingLR,
        {"T_max": 1, "eta_min": 0.01},
        [
            "CosineAnnealingLR flattened the rates: group 'lr_mult=0.1' has lr 0.01, group 'lr_mult=1' has lr 0.01",
            "  CosineAnnealingLR(optimizer, ..., eta_min=0) keeps the ratios",
            f"  {EXACT}",
        ],
        id="CosineAnnealingLR",
    ),
]


@pytest.mark.parametrize(("scheduler", "arguments", "lines"), FLATTENED)
def test_a_scheduler_that_flattened_the_rates_is_named(toy, scheduler, arguments, lines):
    """With the arguments that would be right."""
    live, optimizer = start(toy)
    kept = scheduler(optimizer, **arguments)
    if scheduler is lr_scheduler.CosineAnnealingLR:
        optimizer.step()
        kept.step()
    with pytest.raises(ApplyError) as error:
        live.check()

    assert str(error.value).splitlines() == lines


def test_rates_written_by_hand_have_nobody_to_name(toy):
    """Without a scheduler the rates alone are said."""
    live, optimizer = start(toy)
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ApplyError) as error:
        live.check()

    assert str(error.value).splitlines() == [
        "the rates no longer have the plan's ratios: group 'lr_mult=0.1' has lr 0.05, group 'lr_mult=1' has lr 0.1",
        f"  {EXACT}",
    ]


DOUBLED = {
    "torch": (
        [0.001, 0.1],
        "with scheduler='torch' the groups' lr is multiplied already: take them as applied.param_groups gives them",
    ),
    "timm": (
        [0.001, 0.1],
        "with scheduler='timm' every group's lr is the base rate, and timm's scheduler multiplies",
    ),
    "any": (
        [0.01, 0.1],
        "attach multiplies inside optimizer.step(), so every group's lr is the base rate",
    ),
}


@pytest.mark.parametrize("kind", DOUBLED)
def test_multipliers_that_act_twice_are_named(toy, kind):
    """In each of the three ways to multiply."""
    live = apply_plan(toy, PLAN, lr=0.1, scheduler=kind)
    optimizer = torch.optim.SGD(live)
    lrs, note = DOUBLED[kind]
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    with pytest.raises(ApplyError) as error:
        live.check(optimizer)

    assert str(error.value).splitlines() == [
        f"the plan's multipliers act twice: group 'lr_mult=0.1' has lr {lrs[0]:g}, group 'lr_mult=1' has lr {lrs[1]:g}",
        f"  {note}",
    ]


def test_lr_scale_where_it_does_not_belong(toy):
    """Beside multiplied rates it would act a second time; under torch's schedulers not at all."""
    live, optimizer = start(toy)
    optimizer.param_groups[0]["lr_scale"] = 0.1
    with pytest.raises(ApplyError) as beside:
        live.check()
    live = apply_plan(toy, PLAN, lr=0.1, scheduler="timm", replace=True)
    optimizer = torch.optim.SGD(live)
    live.check(optimizer)
    kept = lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ApplyError) as unread:
        live.check()

    assert kept.optimizer is optimizer
    assert str(beside.value).splitlines() == [
        "the optimizer's groups carry lr_scale, and their rates are multiplied already: "
        "a scheduler of timm would multiply a second time",
        "  apply_plan(..., scheduler='timm') for a scheduler of timm",
    ]
    assert str(unread.value).splitlines() == [
        "the rates do not have the plan's ratios; StepLR does not read it: "
        "group 'lr_mult=0.1' has lr 0.1, group 'lr_mult=1' has lr 0.1",
        "  lr_scale is applied by timm's schedulers alone: apply_plan(..., scheduler='torch', lr=...) for torch's",
    ]


KEPT = [
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 12}),
    ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 3}),
    ("CosineAnnealingLR", {"T_max": 8}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3}),
    ("LinearLR", {"total_iters": 4}),
    ("ConstantLR", {}),
    ("PolynomialLR", {"total_iters": 8}),
    ("StepLR", {"step_size": 2}),
    ("MultiStepLR", {"milestones": [2, 5]}),
    ("ExponentialLR", {"gamma": 0.8}),
    ("LambdaLR", {"lr_lambda": lambda step: 1 / (1 + step)}),
    ("MultiplicativeLR", {"lr_lambda": lambda step: 0.9}),
    ("ReduceLROnPlateau", {"min_lr": 0.02, "patience": 0}),
]


@pytest.mark.parametrize(("name", "arguments"), KEPT, ids=[name for name, _ in KEPT])
def test_scheduler_kwargs_keep_the_ratios_at_every_step(toy, name, arguments):
    """The guard says nothing for ten steps under each of torch's schedulers with these arguments."""
    live, optimizer = start(toy)
    scheduler = getattr(lr_scheduler, name)(optimizer, **live.scheduler_kwargs(name, **arguments))
    seen = set()
    for _ in range(10):
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        live.check()
        seen.add(optimizer.param_groups[0]["lr"])

    assert len(seen) > 1


def test_the_average_rate_of_swalr_keeps_the_ratios(toy):
    """SWALR anneals to one rate a group."""
    live, optimizer = start(toy)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, **live.scheduler_kwargs("SWALR", swa_lr=0.03, anneal_epochs=2))
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        live.check()

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.003)


REFUSED = [
    pytest.param(
        "torch",
        lr_scheduler.CosineAnnealingLR,
        {"T_max": 5, "eta_min": 0.01},
        f"CosineAnnealingLR has one eta_min for all groups, which ends the plan's ratios: found eta_min=0.01\n"
        f"  eta_min=0 keeps the ratios\n  {EXACT}",
        id="floor",
    ),
    pytest.param(
        "torch",
        "OneCyleLR",
        {},
        f"OneCyleLR is not known to keep the plan's ratios\n  did you mean 'OneCycleLR'?\n  {EXACT}",
        id="unknown",
    ),
    pytest.param(
        "any",
        "OneCycleLR",
        {"max_lr": 0.1},
        "this plan was applied with scheduler='any', so schedulers take base rates",
        id="any",
    ),
]


@pytest.mark.parametrize(("kind", "scheduler", "arguments", "said"), REFUSED)
def test_arguments_that_cannot_keep_the_ratios_are_refused(toy, kind, scheduler, arguments, said):
    """An absolute floor, an unknown scheduler, a plan for other schedulers."""
    live = apply_plan(toy, PLAN, lr=0.1, scheduler=kind)
    with pytest.raises(ApplyError) as error:
        live.scheduler_kwargs(scheduler, **arguments)

    assert str(error.value) == said


@pytest.fixture
def reentrant():
    """timm's models checkpoint reentrantly while this holds."""
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


def test_reentrant_checkpointing_behind_a_frozen_prefix_is_named(reentrant):
    """It gives trained blocks no gradient; a trained stem or a linear probe loses nothing, and nothing is said."""
    model = timm.create_model("test_vit", num_classes=3)
    model.set_grad_checkpointing(True)
    for plan in ("full", "linear_probe"):
        with apply_plan(model, plan) as live:
            live.check()
    live = apply_plan(model, "frozen_stem")
    with pytest.warns(UserWarning, match="Gradients will be None"):
        model(torch.randn(2, 3, 160, 160)).sum().backward()
    with pytest.raises(ApplyError) as error:
        live.check()

    assert model.blocks[0].attn.qkv.weight.grad is None
    assert str(error.value) == (
        "test_vit checkpoints with use_reentrant=True behind a frozen prefix: 'blocks.0.norm1.weight' and what else is "
        "in its segment get no gradient, without an error\n"
        "  use_reentrant=False, timm's default: timm.layers.set_reentrant_ckpt(False)"
    )


def test_a_reentrant_wrapper_around_a_part_is_named():
    """torch's checkpoint wrapper says of itself which of the two it is."""
    model = timm.create_model("test_vit", num_classes=3)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    live = apply_plan(model, "frozen_stem")
    live.check()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1], checkpoint_impl=CheckpointImpl.REENTRANT)

    with pytest.raises(ApplyError, match=r"^'blocks\.1' checkpoints with use_reentrant=True behind a frozen prefix"):
        live.check()


def test_a_phase_does_not_change_in_several_processes_without_a_promise(toy):
    """The message shows both ways; with either promise the phase changes."""
    phases = [{"name": "head", "until": 1, "rules": [{"match": "body", "frozen": True}]}, {"name": "all"}]
    plan = {"version": 1, "phases": phases, "rules": [{"match": ".*", "lr_mult": 1}]}
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        live = apply_plan(toy, plan)
        with pytest.raises(ApplyError) as error:
            live.step(epoch=1)
        kept = live.phase
        rewrapped = live.step(epoch=1, rewrap=True)
        live = apply_plan(toy, plan, replace=True)
        found = live.step(epoch=1, find_unused=True)
    finally:
        distributed.destroy_process_group()

    assert (kept, rewrapped, found) == ("head", True, True)
    assert str(error.value) == (
        "phase 'all' would begin in 2 processes: "
        "gradients of what it thaws would not be synchronised, without an error\n"
        "  either: if applied.step(epoch=e, rewrap=True): model = DistributedDataParallel(module)\n"
        "  or: wrap once with find_unused_parameters=True, and applied.step(epoch=e, find_unused=True)"
    )


@pytest.fixture
def process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard(module):
    return FullyShardedDataParallel(
        module, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
    )


def test_a_sharded_unit_of_frozen_and_trained_parameters_is_named(toy, process):
    """One flat parameter of both is named; units of one kind each are not."""
    live = apply_plan(toy, PLAN, lr=0.1)
    toy.body, toy.mid, toy.head = shard(toy.body), shard(toy.mid), shard(toy.head)
    live.check()
    whole = nn.ModuleDict({"whole": Toy()})
    live = apply_plan(
        whole, {"version": 1, "rules": [{"match": ".*head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
    )
    whole["whole"] = shard(whole["whole"])
    with pytest.raises(ApplyError) as error:
        live.check()

    assert str(error.value) == (
        "1 FullyShardedDataParallel unit, 'whole', is of frozen and trained parameters\n"
        "  wrap what is frozen and what is trained as units of their own, or use fully_shard"
    )


def test_a_copy_of_the_model_is_watched_for_itself(toy):
    """An average of weights or any deep copy has no optimizer, and its tensors lie elsewhere without being replaced."""
    live, _ = start(toy)
    live.seal(copy=True)
    twin = copy.deepcopy(toy)
    held = twin._freezeplan
    assert held.verify()
    held.check()
    with torch.no_grad():
        twin.body[0].weight.mul_(0.9)
    (moved,) = held.verify().moved

    assert moved.cause.startswith("weight decay on a zero gradient")
    assert live.verify()


def test_an_optimizer_that_is_known_is_named_by_verify(toy):
    """verify() looks into the optimizers that were checked or attached."""
    live, optimizer = start(toy, guard=False)
    live.seal()
    optimizer.add_param_group({"params": [("x", toy.body[0].weight)], "name": "mine"})
    toy.body[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    toy.body[0].weight.grad = None
    (moved,) = live.verify().moved

    assert str(moved) == "body.0.weight: an optimizer holds it (SGD, group mine)"
