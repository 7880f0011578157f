"""What ``apply_plan`` refuses or warns of, it says before it changes anything."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import nn

from freezeplan import applied, apply_plan, resolve_plan
from freezeplan.errors import ApplyError, FreezePlanError, FreezePlanWarning, ModelError

ALL = {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}
WEAK = {
    "version": 1,
    "rules": [{"match": "0", "frozen": True}, {"match": ["0", "1.bias"], "lr_mult": 1}, {"match": ".*", "lr_mult": 1}],
}
SKIPPED = {
    **ALL,
    "phases": [{"name": "a", "until": 5}, {"name": "b", "until": "10%"}, {"name": "c"}],
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def with_integers() -> nn.Module:
    model = net()
    model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    return model


def of_inference() -> nn.Module:
    with torch.inference_mode():
        return net()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            with_integers(),
            "'table' holds int64 numbers, which have no gradient, and the plan trains it\n"
            "  freeze it: put {match: table, frozen: true} above",
        ),
        (
            of_inference(),
            "'0.weight' was made under torch.inference_mode() and cannot be trained\n  create the model outside of it",
        ),
    ],
    ids=["integers", "inference"],
)
def test_what_cannot_be_trained_is_refused(model: nn.Module, message: str) -> None:
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ApplyError) as error:
        apply_plan(model, ALL)

    assert str(error.value) == message
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert applied(model) is None


def test_what_cannot_be_trained_may_be_frozen() -> None:
    rules = [{"match": "table", "frozen": True}, *ALL["rules"]]
    apply_plan(with_integers(), {"version": 1, "rules": rules})


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    """As ``docs/errors.md`` says how to make it one; the next plan goes on."""
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FreezePlanWarning)
        with pytest.raises(FreezePlanWarning, match="first matching rule wins"):
            apply_plan(model, WEAK)

    assert all(p.requires_grad for p in model.parameters())
    assert applied(model) is None
    apply_plan(model, ALL)


class TestFlagsThatWereOff:
    def test_a_catch_all_that_trains_them_says_so(self) -> None:
        """As for a model whose author fixed its position embeddings."""
        model = net()
        model[0].bias.requires_grad_(False)
        with pytest.warns(FreezePlanWarning) as found:
            apply_plan(model, ALL)

        assert str(found[0].message) == (
            "rule 1 (match: .*) trains 1 tensor that had requires_grad=False before, such as '0.bias': if the model "
            "fixes it, put {match: 0.bias, frozen: true} above"
        )

    def test_so_does_the_default_in_any_phase(self) -> None:
        model = net()
        model[0].requires_grad_(False)
        phases = [{"name": "head", "until": 1, "rules": [{"match": "0", "frozen": True}]}, {"name": "all"}]
        plan: dict[str, Any] = {"version": 1, "phases": phases, "rules": [{"match": "1", "lr_mult": 1}]}
        with pytest.warns(FreezePlanWarning, match="the plan's default trains 2 tensors .* fixes them"):
            apply_plan(model, {**plan, "default": {"lr_mult": 0.1}}, lr=0.1)

    def test_a_rule_that_names_them_is_meant(self) -> None:
        model = net()
        model[0].requires_grad_(False)
        apply_plan(model, {"version": 1, "rules": [{"match": "0", "lr_mult": 1}, *ALL["rules"]]})

    def test_what_a_plan_switched_off_does_not_count(self) -> None:
        model = timm.create_model("test_resnet", num_classes=3)
        apply_plan(model, "linear_probe")
        apply_plan(model, "full", replace=True)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        (30, "phase 'b' ends after 10% of 30 epochs, that is 3, and the one ahead ends after 5"),
        (0, "epochs is a whole number >= 1, found 0"),
        (True, "epochs is a whole number >= 1, found True"),
        ("30", "epochs is a whole number >= 1, found '30'"),
        (1.5, "epochs is a whole number >= 1, found 1.5"),
    ],
)
def test_epochs_with_which_a_phase_cannot_hold_are_refused(epochs: Any, message: str) -> None:
    with pytest.raises(ApplyError) as error:
        apply_plan(net(), SKIPPED, epochs=epochs)

    assert str(error.value) == message


@pytest.mark.parametrize("epochs", [60, 3])
def test_phases_in_their_order_are_taken(epochs: int) -> None:
    """Where the training ends ahead of it, a later phase may say what it likes: a run of three epochs is a try."""
    apply_plan(net(), SKIPPED, epochs=epochs)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_plan("resnet18", ALL), "a model is a torch.nn.Module, found a str"),
        (lambda: resolve_plan(ALL, ALL), "a model is a torch.nn.Module, found a dict"),
        (lambda: applied([]), "a model is a torch.nn.Module, found a list"),
        (lambda: apply_plan(lazy(), ALL), "'0.weight' has no shape yet, as its module is lazy"),
        (lambda: apply_plan(net().to("meta"), WEAK_HEAD).seal(), "a model on the meta device has no values"),
    ],
    ids=["name", "plan", "list", "lazy", "meta"],
)
def test_what_is_no_model_with_values_is_named(call: Any, message: str) -> None:
    with pytest.raises(ModelError) as error:
        call()

    assert str(error.value).splitlines()[0] == message


WEAK_HEAD = {"version": 1, "rules": [{"match": "1", "lr_mult": 1}, {"match": ".*", "frozen": True}]}


class TestStates:
    def test_another_name_or_description_is_the_same_plan(self) -> None:
        old = apply_plan(net(), {**SKIPPED, "name": "old", "description": "as it was"}, epochs=60)
        old.step(epoch=5)
        new = apply_plan(net(), {**SKIPPED, "name": "new"}, epochs=60)
        new.load_state_dict(old.state_dict())

        assert new.phase == "b"

    def test_what_differs_is_named(self) -> None:
        state = apply_plan(net(), {**ALL, "weight_decay": "all"}).state_dict()
        with pytest.raises(ApplyError) as error:
            apply_plan(net(), {**WEAK_HEAD, "name": "mine"}).load_state_dict(state)

        assert str(error.value) == (
            "this state belongs to another plan than 'mine': they differ in rules, weight_decay"
        )

    @pytest.mark.parametrize("state", [{}, {"state": {}, "param_groups": []}, None, {"plan": {}, "progress": None}])
    def test_what_is_no_state_is_refused(self, state: Any) -> None:
        with pytest.raises(FreezePlanError):
            apply_plan(net(), ALL).load_state_dict(state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": "1"}, "epoch is a whole number >= 0, found '1'"),
        ({"epoch": None}, "epoch is a whole number >= 0, found None"),
        ({"epoch": -1}, "epoch is a whole number >= 0, found -1"),
        ({"epoch": 1, "metrics": [0.3]}, "metrics is a mapping such as {'acc': 0.5}, found [0.3]"),
        ({"epoch": 1, "metrics": {"acc": None}}, "the metric 'acc' is a number, found None"),
    ],
)
def test_steps_that_say_nothing_are_refused(given: Any, message: str) -> None:
    """The phase stays as it was."""
    phases = [{"name": "head", "until": {"metric": "acc", "patience": 1}, "rules": []}, {"name": "all"}]
    live = apply_plan(net(), {**ALL, "phases": phases})
    before = live.state_dict()
    with pytest.raises(ApplyError) as error:
        live.step(**given)

    assert str(error.value) == message
    assert live.state_dict() == before
