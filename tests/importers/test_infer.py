"""A model frozen by hand becomes a plan that does the same, on architectures that share nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import Adafactor, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from freezeplan import apply_plan, infer_plan, resolve_plan
from freezeplan.errors import ApplyError, FreezePlanWarning
from freezeplan.model.describer import create_model

Hand = Callable[[nn.Module], Any]


def only(*parts: str) -> Hand:
    """Train what has one of these in its name."""
    return lambda m: [p.requires_grad_(any(part in name for part in parts)) for name, p in m.named_parameters()]


def without(*starts: str) -> Hand:
    """Freeze what begins with one of these."""
    return lambda m: [p.requires_grad_(not name.startswith(starts)) for name, p in m.named_parameters()]


def first_children(count: int) -> Hand:
    """Freeze the first modules of the model, as a loop over children() does."""
    return lambda m: [p.requires_grad_(False) for child in list(m.children())[:count] for p in child.parameters()]


def first_tensors(count: int) -> Hand:
    """Freeze the first tensors, as a loop with a counter does."""
    return lambda m: [p.requires_grad_(False) for p in list(m.parameters())[:count]]


def norms(m: nn.Module) -> None:
    """Train normalisation layers alone."""
    m.requires_grad_(False)
    for module in m.modules():
        if "Norm" in type(module).__name__:
            module.requires_grad_(True)


def still_statistics(m: nn.Module) -> None:
    """Train everything, batch norm in eval."""
    m.train()
    for module in m.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def two_rates(m: nn.Module) -> torch.optim.Optimizer:
    head = {id(p) for p in m.get_classifier().parameters()}
    parts = [[p for p in m.parameters() if (id(p) in head) == wanted] for wanted in (True, False)]
    return torch.optim.SGD([{"params": parts[0], "lr": 0.1}, {"params": parts[1], "lr": 0.02}], weight_decay=1e-4)


def three_rates(m: nn.Module) -> torch.optim.Optimizer:
    groups: dict[float, list[nn.Parameter]] = {0.001: [], 0.01: [], 0.1: []}
    for name, p in m.named_parameters():
        late = name.startswith(("layer3", "layer4"))
        groups[0.1 if name.startswith("fc") else 0.01 if late else 0.001].append(p)
    return torch.optim.SGD([{"params": p, "lr": lr} for lr, p in groups.items()])


def head_only(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(m.get_classifier().parameters(), lr=1e-3)


def bare_decay(m: nn.Module) -> torch.optim.Optimizer:
    flat = [p for p in m.parameters() if p.ndim == 1]
    rest = [p for p in m.parameters() if p.ndim != 1]
    return torch.optim.AdamW([{"params": flat, "weight_decay": 0.0}, {"params": rest}], lr=1e-3, weight_decay=0.05)


def layer_decay(m: nn.Module) -> torch.optim.Optimizer:
    listed = m.no_weight_decay() if hasattr(m, "no_weight_decay") else ()
    return torch.optim.AdamW(param_groups_layer_decay(m, 0.05, listed, layer_decay=0.65), lr=1e-3)


VIT_BLOCKS = ("patch", "pos", "cls", "blocks.0.", "blocks.1.")
slow = pytest.mark.slow
CASES = [
    pytest.param("test_resnet", only("fc."), None, 2, id="linear-probe"),
    pytest.param("vgg11", only("pre_logits", "head"), None, 2, id="vgg-frozen-convolutions", marks=slow),
    pytest.param("test_vit", only("bias", "head"), None, 2, id="bitfit"),
    pytest.param("test_vit", norms, None, 2, id="norms"),
    pytest.param("test_efficientnet", only("bn", "classifier"), None, 2, id="norms-and-head"),
    pytest.param("resnet18", without("conv1", "bn1", "layer1", "layer2"), None, 2, id="two-stages"),
    pytest.param(
        "vit_tiny_patch16_224",
        without("patch", "pos", "cls", "blocks.0.", "blocks.1."),
        None,
        2,
        id="blocks",
        marks=pytest.mark.slow,
    ),
    pytest.param("test_convnext", first_children(1), None, 2, id="first-children"),
    pytest.param("resnet18", first_tensors(20), None, 2, id="first-tensors", marks=slow),
    pytest.param("resnet18", without("layer4.1.conv2", "layer2.0"), None, 2, id="two-modules", marks=slow),
    pytest.param("test_resnet", still_statistics, None, 2, id="batch-norm-in-eval"),
    pytest.param("test_resnet", lambda m: m, None, 1, id="nothing-frozen"),
    pytest.param("test_resnet", lambda m: m, two_rates, 2, id="two-rates"),
    pytest.param("resnet18", lambda m: m, three_rates, 3, id="three-rates"),
    pytest.param("test_convnext", lambda m: m, head_only, 2, id="an-optimizer-of-the-head"),
    pytest.param("test_vit", lambda m: m, bare_decay, 2, id="no-decay-of-one-dimension"),
    pytest.param("vit_tiny_patch16_224", lambda m: m, layer_decay, 1, id="layer-decay"),
    pytest.param("test_mambaout", without("stem"), None, 2, id="mambaout", marks=slow),
    pytest.param("deit_tiny_distilled_patch16_224", only("head"), None, 2, id="distilled", marks=slow),
    pytest.param("levit_128s", without("stem", "stages.0"), None, 2, id="levit", marks=slow),
    pytest.param("coat_lite_tiny", without("serial_blocks1", "patch_embed1"), None, 2, id="tied-weights", marks=slow),
    pytest.param("regnetx_002", only("head", "s4"), None, 2, id="regnet", marks=slow),
    pytest.param("mobilenetv3_small_050", first_children(3), None, 2, id="mobilenet", marks=slow),
    pytest.param("densenet121", without("features.conv0", "features.denseblock1"), None, 2, id="densenet", marks=slow),
]


def done_to(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Flag, rate and decay of each parameter, and the modes of what owns a trained one."""
    groups = {id(p): g for g in (optimizer.param_groups if optimizer else ()) for p in g["params"]}
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        group = groups.get(id(p), {})
        trained = p.requires_grad and (optimizer is None or bool(group))
        scale = group.get("lr_scale", 1.0) if trained else 1.0
        owner = model.get_submodule(name.rpartition(".")[0])
        values = (group.get("lr", 1.0) * scale, group.get("weight_decay", 0.0), owner.training)
        found[name] = (True, *(round(v, 12) for v in values[:2]), values[2]) if trained else (False,)
    return found


@pytest.mark.parametrize(("name", "freeze", "optimize", "rules"), CASES)
def test_a_model_frozen_by_hand_becomes_a_plan_that_does_the_same(name, freeze, optimize, rules) -> None:
    """Flags, rates, decays and modes are equal, parameter by parameter, with as few rules as the idiom has parts."""
    model = create_model(name, num_classes=4)
    fresh = copy.deepcopy(model)
    freeze(model)
    optimizer = optimize(model) if optimize else None

    plan = infer_plan(model, optimizer)

    largest = (
        {key: max(g.get(key, 0.0) for g in optimizer.param_groups) for key in ("lr", "weight_decay")}
        if optimizer
        else {}
    )
    live = apply_plan(fresh, plan, lr=largest.get("lr", 1.0), weight_decay=largest.get("weight_decay"))
    again = torch.optim.SGD(live, lr=largest.get("lr", 1.0), weight_decay=largest.get("weight_decay", 0.0))
    assert done_to(fresh, again if optimizer else None) == done_to(model, optimizer)
    assert len(plan.rules) == rules


@pytest.mark.slow
@given(st.lists(st.sampled_from([None, 1.0, 0.1]), min_size=47, max_size=47))
def test_any_freezing_is_reproduced(rates: list[float | None]) -> None:
    """Whatever is frozen or slowed, tensor by tensor, in no order at all."""
    model = TINY
    trained = [(p, rate) for p, rate in zip(model.parameters(), rates, strict=True) if rate]
    if not trained:
        return
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in trained])
    top = max(rate for _, rate in trained)

    rows = resolve_plan(infer_plan(model, optimizer), model).rows

    assert [row.lr_mult for row in rows] == [rate and pytest.approx(rate / top) for rate in rates]


TINY = create_model("test_resnet", num_classes=3)


def test_a_model_that_is_not_timms() -> None:
    """Names and classes are enough."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)

    assert [(rule.text, rule.frozen) for rule in infer_plan(model).rules] == [("match: 0", True), ("match: .*", None)]


def test_names_that_are_no_patterns() -> None:
    """A name may have any character but a dot."""
    model = nn.ModuleDict({"a(b": nn.Linear(2, 2), "a+b": nn.Linear(2, 2), "[0]": nn.ParameterDict()})
    model["[0]"]["w*"] = nn.Parameter(torch.ones(1))
    model["a+b"].weight.requires_grad_(False)
    model["[0]"].requires_grad_(False)

    rows = resolve_plan(infer_plan(model), model).rows

    assert {row.name for row in rows if row.frozen} == {"a+b.weight", "[0].w*"}


def test_what_has_no_plan_is_refused() -> None:
    """Nothing trained, or an optimizer of another model."""
    model = create_model("test_resnet")
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ApplyError) as stranger:
        infer_plan(model, other)
    with pytest.raises(ApplyError) as idle:
        infer_plan(model.requires_grad_(False))

    assert str(stranger.value) == "the optimizer holds no parameter of this model"
    assert str(idle.value) == "nothing of this model is trained, so there is no plan for it"


def test_a_bare_module_that_owns_a_parameter():
    """``nn.Module()`` itself has no class that a rule could select by."""
    net = nn.Module()
    net.inner = nn.Module()
    net.inner.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    net.fc = nn.Linear(2, 2)

    rows = resolve_plan(infer_plan(net), net).rows

    assert {row.name: row.frozen for row in rows} == {"inner.scale": True, "fc.weight": False, "fc.bias": False}


def in_parts(rates: tuple[float | None, float | None], optimizer: Callable[..., Any] = torch.optim.SGD) -> Any:
    """A model of a body and a head, and an optimizer with a group for each."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(model, rates, strict=True)]
    return model, optimizer(groups)


def rates_of(model: nn.Module, optimizer: Any) -> list[float | None]:
    """The factor of the body and of the head in the plan."""
    rows = {row.name: row for row in resolve_plan(infer_plan(model, optimizer), model).rows}
    return [rows[name].lr_mult for name in ("0.weight", "1.weight")]


SCHEDULERS = [
    pytest.param(lambda o: CosineLRScheduler(o, 10, warmup_t=3, warmup_lr_init=1e-5), id="timm-warm-up"),
    pytest.param(lambda o: LambdaLR(o, lambda step: step / 10), id="from-0"),
    pytest.param(lambda o: LambdaLR(o, [lambda step: step, lambda step: 1.0]), id="one-after-the-other"),
    pytest.param(lambda o: LinearLR(o, 1e-3, total_iters=5), id="linear"),
    pytest.param(lambda o: OneCycleLR(o, [0.02, 0.2], total_steps=10), id="one-cycle"),
    pytest.param(lambda o: SequentialLR(o, [ConstantLR(o, 0.0, 2), ExponentialLR(o, 0.9)], [2]), id="two"),
]


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_rates_are_those_that_the_groups_began_with(schedule) -> None:
    """Whatever a warm-up has made of them."""
    model, optimizer = in_parts((0.01, 0.1))
    schedule(optimizer)

    assert rates_of(model, optimizer) == pytest.approx([0.1, 1.0])


def test_a_group_with_the_rate_0_is_frozen() -> None:
    """A common way to freeze; its weight decay counts as little as its rate, and a scheduler changes nothing of it."""
    model, optimizer = in_parts((0.0, 0.1))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[1]["weight_decay"] = 0.05
    plain = infer_plan(model, optimizer)
    LambdaLR(optimizer, lambda step: 1.0)
    scaled = in_parts((0.0, 0.1))
    for group, scale in zip(scaled[1].param_groups, (0.5, 0.25), strict=True):
        group["lr_scale"] = scale

    assert [rule.model_dump(exclude_defaults=True) for rule in plain.rules] == [
        {"match": ("1",), "lr_mult": 1.0},
        {"match": (".*",), "frozen": True},
    ]
    assert infer_plan(model, optimizer) == plain
    assert rates_of(*scaled) == [None, 0.25]


@pytest.mark.parametrize("schedule", [lambda _: None, lambda o: [g.update(initial_lr=None) for g in o.param_groups]])
def test_rates_that_the_optimizer_finds_are_equal(schedule) -> None:
    """Adafactor without a rate; a scheduler would keep that too."""
    model, optimizer = in_parts((None, None), Adafactor)
    schedule(optimizer)

    assert rates_of(model, optimizer) == [1.0, 1.0]


def test_an_optimizer_without_weight_decay() -> None:
    """It gives none to anything, so the plan says nothing of it."""
    assert infer_plan(*in_parts((0.1, 0.1), torch.optim.Rprop)).weight_decay == "timm"


def test_what_is_not_trained_needs_no_rate_like_the_others() -> None:
    """A group at 0 beside groups without a rate."""
    assert rates_of(*in_parts((0.0, None), Adafactor)) == [None, 1.0]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("given", [False, True])
def test_a_parametrized_tensor_is_trained_where_a_part_of_it_is(part: int, given: bool) -> None:
    """Magnitude or direction of a weight under weight_norm; a plan trains both, which a warning says."""
    model = nn.Sequential(nn.Linear(2, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    wanted = getattr(model[1].parametrizations.weight, f"original{part}")
    if not given:
        model.requires_grad_(False)
        wanted.requires_grad_(True)
    with pytest.warns(FreezePlanWarning) as caught:
        plan = infer_plan(model, torch.optim.SGD([wanted], lr=0.1) if given else None)

    assert [row.name for row in resolve_plan(plan, model).trained] == ["1.weight"]
    assert [str(found.message) for found in caught] == [
        "a plan trains parametrized tensors whole; this model trains a part of 1.weight"
    ]
    assert caught[0].filename == __file__


def test_a_parametrized_tensor_that_is_trained_whole() -> None:
    """Nothing to warn of."""
    model = nn.Sequential(nn.Linear(2, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    model[0].requires_grad_(False)

    assert [row.name for row in resolve_plan(infer_plan(model), model).trained] == ["1.bias", "1.weight"]


def two_rates_in_one_tensor() -> Any:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    first, second = model[0].parametrizations.weight.parameters()
    return model, torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])


def with_group(**values: Any) -> Any:
    model, optimizer = in_parts((0.1, 0.1))
    optimizer.param_groups[1].update(values)
    return model, optimizer


NO_PLAN = [
    pytest.param(
        lambda: in_parts((None, 0.1), Adafactor),
        "'0.weight' has lr=None, a rate that the optimizer finds by itself, and '1.weight' has lr=0.1\n"
        "  their ratio is not known: give every group of the optimizer an lr, or none",
        id="some-rates",
    ),
    pytest.param(
        lambda: in_parts((0.0, 0.0)),
        "nothing of this model is trained, so there is no plan for it\n"
        "  the optimizer has the rate 0: infer the plan before a warm-up of your own sets it",
        id="all-rates-0",
    ),
    *(
        pytest.param(
            functools.partial(with_group, **{key: value}),
            f"optimizer.param_groups[1]: {key} is a number of 0 or more, found {value!r}",
            id=name,
        )
        for name, key, value in (
            ("no-number", "lr", float("nan")),
            ("text", "lr_scale", "a tenth"),
            ("endless", "weight_decay", float("inf")),
        )
    ),
    pytest.param(
        two_rates_in_one_tensor,
        "the parameters that '0.weight' is made of have different rates or weight decays\n"
        "  a plan gives a tensor one of each: put them into one group of the optimizer",
        id="two-rates-in-one-tensor",
    ),
]


@pytest.mark.parametrize(("made", "message"), NO_PLAN)
def test_what_a_plan_cannot_give_is_refused(made, message) -> None:
    """By one error, never by one of pydantic's."""
    with pytest.raises(ApplyError) as error:
        infer_plan(*made())

    assert str(error.value) == message
