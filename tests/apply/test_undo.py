"""undo() takes away all that a plan put onto a model: on one model of each architecture module, three presets each."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from families import ZOO
from torch import nn

from freezeplan import apply_plan
from freezeplan.model.describer import create_model

QUICK = {"resnet", "levit"}
CASES = [pytest.param(f, e, id=f, marks=() if f in QUICK else pytest.mark.slow) for f, e in ZOO.items()]
PRESETS = ("linear_probe", "bitfit", "gradual_unfreeze")


def stay(self: nn.Module, mode: bool = True) -> nn.Module:
    """A common stand-in for ``train`` that holds a part in eval."""
    return self


def partly_frozen(entry: dict[str, Any]) -> nn.Module:
    """A model on the meta device, partly frozen and partly in eval already, some of it by a ``train`` of its own."""
    model = create_model(entry["model"], num_classes=10, meta=True, **entry["arguments"])
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    for module in list(model.modules())[::4]:
        module.training = False
    for module in list(model.modules())[4::8]:
        module.train = types.MethodType(stay, module)  # type: ignore[method-assign]
    model.register_forward_hook(lambda *_: None)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.03
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Flags, values (where they lie and how often they were written), identities, types, attributes, hooks, modes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[str, Any] = {
        name: (id(tensor), tensor.requires_grad, tensor._version, tuple(tensor.shape)) for name, tensor in tensors
    }
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {key: list(value) if isinstance(value, dict) else id(value) for key, value in vars(module).items()}
        found[f"{name}:"] = (id(module), type(module), module.training, getattr(module, "momentum", None), attributes)
    return found


@pytest.mark.filterwarnings("ignore:.*had requires_grad=False before:freezeplan.errors.FreezePlanWarning")
@pytest.mark.parametrize(("family", "entry"), CASES)
def test_undo_leaves_a_partly_frozen_model_as_it_was(family: str, entry: dict[str, Any]) -> None:
    """The snapshot is equal before and after, with training calls, an attached optimizer and phases in between."""
    model = partly_frozen(entry)
    before = snapshot(model)
    for preset in PRESETS:
        live = apply_plan(model, preset, scheduler="any", epochs=6)
        optimizer = torch.optim.SGD(live, lr=0.1)
        live.attach(optimizer)
        assert snapshot(model) != before
        for epoch in range(0, 6, 2):
            live.step(epoch=epoch)
            model.train()
            model.eval()
        for parameter in live.trainable_parameters():
            parameter.grad = torch.zeros_like(parameter)
        live.undo()

        after = snapshot(model)
        assert {name: (entry, after[name]) for name, entry in before.items() if after[name] != entry} == {}, preset
        assert after.keys() == before.keys()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [
            hooks for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks) if hooks
        ] == []


def test_a_seal_leaves_nothing_behind() -> None:
    """The hook by which a seal notices loaded weights goes with undo, and a new seal does not leave the first's."""
    model = create_model("test_resnet", num_classes=3)
    before = snapshot(model)
    live = apply_plan(model, "linear_probe")
    live.seal()
    live.seal(copy=True)

    assert len(model._load_state_dict_post_hooks) == 1
    live.undo()
    live.undo()
    assert snapshot(model) == before


def test_the_snapshot_sees_each_kind_of_change() -> None:
    """The comparison above can fail."""
    model = create_model("test_resnet", num_classes=3)

    def changed(change: Any) -> bool:
        before = snapshot(model)
        change()
        return snapshot(model) != before

    assert not changed(lambda: model.state_dict())
    assert changed(lambda: model.conv1[0].weight.requires_grad_(False))
    assert changed(lambda: model.conv1[0].weight.detach().add_(0))
    assert changed(lambda: setattr(model.bn1, "momentum", 0.5))
    assert changed(lambda: setattr(model.bn1, "training", False))
    assert changed(lambda: setattr(model.bn1, "note", "here"))
    assert changed(lambda: model.bn1.register_forward_hook(print))
    assert changed(lambda: setattr(model, "bn1", nn.BatchNorm2d(32)))
