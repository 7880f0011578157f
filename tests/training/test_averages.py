"""What stands beside a live plan: averages of weights, synchronised batch norm, checkpointing, whole models saved."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from freezeplan import applied, apply_plan
from freezeplan.applied_plan import AppliedPlan
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

RULES = [{"match": "conv1|bn1|layer[12]", "frozen": True}, {"match": ".*", "lr_mult": 1}]
PLAN = {"version": 1, "rules": RULES}


def build() -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=3)


def fit(model: nn.Module, live: AppliedPlan, after: Callable[[int], object] = lambda step: None) -> None:
    """Three careless steps: all parameters in one optimizer with momentum and decay."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        model.train()
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(4, 3, 32, 32, generator=random)).square().mean().backward()
        optimizer.step()
        after(step)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def frozen(name: str) -> bool:
    return name.startswith(("conv1", "bn1", "layer1", "layer2"))


def torchs(model: nn.Module) -> tuple[nn.Module, Callable[[int], object]]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    return average, lambda step: average.update_parameters(model)


def timms(model: nn.Module) -> tuple[nn.Module, Callable[[int], object]]:
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    return average, lambda step: average.update(model, step=step)


@pytest.mark.parametrize("average", [torchs, timms])
def test_an_average_of_weights_keeps_what_is_frozen(average: Callable[..., Any]) -> None:
    """Bit by bit; and the plan that was copied with the model can be undone on its own."""
    model = build()
    before = state(model)
    live = apply_plan(model, PLAN, guard=False)
    live.seal()
    averaged, update = average(model)
    fit(model, live, update)

    assert live.verify()
    inner = averaged.module
    for name, tensor in inner.state_dict().items():
        if frozen(name):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(inner.fc.weight, before["fc.weight"])
    assert not torch.equal(inner.fc.weight, model.fc.weight)
    copied = applied(averaged)
    assert copied is not None
    assert copied is not live
    copied.undo()
    assert all(parameter.requires_grad for parameter in inner.parameters())
    assert applied(model) is live
    assert not model.conv1[0].weight.requires_grad


def test_batch_norm_that_was_synchronised_before() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    plain = apply_plan(build(), PLAN, guard=False)
    live = apply_plan(model, PLAN, guard=False)
    live.seal()
    fit(model, live)

    assert [(r.name, r.frozen, r.mode) for r in live.resolution.rows] == [
        (r.name, r.frozen, r.mode) for r in plain.resolution.rows
    ]
    assert live.verify()


def test_batch_norm_that_is_synchronised_later_is_reported() -> None:
    """A pin on the replaced module itself is lost, and the next epoch does not begin."""
    model = build()
    live = apply_plan(model, PLAN)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    with pytest.raises(ApplyError, match="1 module, 'bn1', is no longer held in eval"):
        live.step(epoch=0)


def test_pins_above_survive_a_later_synchronisation() -> None:
    model = build()
    live = apply_plan(model, PLAN, guard=False)
    live.seal()
    for layer in ("layer1", "layer2"):
        setattr(model, layer, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(model, layer)))
    fit(model, live)

    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.layer1.modules())
    live.check()
    assert live.verify()


def checkpointed(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model


def checkpointed_parts(model: nn.Module) -> nn.Module:
    model.layer1, model.layer3 = checkpoint_wrapper(model.layer1), checkpoint_wrapper(model.layer3)
    return model


def compiled(model: nn.Module) -> nn.Module:
    """Compiled with a backend that traces the backward pass too, where flags are baked in."""
    return torch.compile(model, backend="aot_eager")


def parametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model.layer2[0].conv1)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        checkpointed, checkpointed_parts, pytest.param(compiled, marks=pytest.mark.slow), copy.deepcopy,
        nn.DataParallel,
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.filterwarnings("ignore:.*")
def test_a_wrapper_changes_nothing_of_the_result(wrap: Callable[[nn.Module], nn.Module], first: bool) -> None:
    """Whether it comes before the plan or after it; checkpointing counts a batch twice in trained statistics."""
    bare = build()
    fit(bare, apply_plan(bare, PLAN, guard=False))
    model = build()
    if first:
        model = wrap(model)
    live = apply_plan(model, PLAN, guard=False)
    if not first:
        model = wrap(model)
        live = applied(model) or live
    live.seal()
    fit(model, live)

    assert live.verify()
    for (name, one), (_, two) in zip(bare.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)


def phased(wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, list[list[str]]]:
    """Train the head, then all behind a frozen part, then the head again; the names that moved in each epoch."""
    model = build()
    head = {"match": "(?!fc).*", "frozen": True}
    phases = [
        {"name": "head", "until": 1, "rules": [head]},
        {"name": "most", "until": 2},
        {"name": "last", "rules": [head]},
    ]
    live = apply_plan(model, {**PLAN, "phases": phases}, lr=0.01, weight_decay=0.1)
    live.seal()
    run = wrap(model)
    optimizer = torch.optim.SGD(live, momentum=0.9)
    random = torch.Generator().manual_seed(1)
    moved = []
    for epoch in range(3):
        live.step(epoch=epoch)
        before = state(model)
        run.train()
        for _ in range(2):
            optimizer.zero_grad()
            run(torch.randn(4, 3, 32, 32, generator=random)).square().mean().backward()
            optimizer.step()
        moved.append([name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])])
    assert live.verify()
    return model, moved


@pytest.mark.slow
def test_a_compiled_model_follows_the_phases() -> None:
    """What a phase thaws gets its gradients although the model was compiled before, and what it freezes gets none."""
    (plain, expected), (model, moved) = phased(lambda model: model), phased(compiled)

    assert moved == expected
    assert set(moved[0] + moved[2]) == {"fc.weight", "fc.bias"}
    assert {name.partition(".")[0] for name in moved[1]} == {"layer3", "layer4", "fc"}
    for (name, one), two in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5, msg=name)


def test_a_frozen_parametrized_weight_stands_still() -> None:
    model = parametrized(build())
    live = apply_plan(model, PLAN, guard=False)
    live.seal()
    fit(model, live)

    assert live.verify()


@pytest.mark.slow
def test_an_undone_model_needs_no_freezeplan_to_be_loaded(tmp_path: Path) -> None:
    """Sealed, stepped, attached; then undone and saved whole."""
    model = build()
    live = apply_plan(model, PLAN, scheduler="any")
    optimizer = torch.optim.SGD(live, lr=0.01)
    live.attach(optimizer)
    live.seal()
    live.step(epoch=0)
    model.train()
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    live.undo()
    torch.save(model.eval(), tmp_path / "model.pt")
    expected = model(torch.ones(1, 3, 32, 32)).sum().item()

    code = (
        "import sys; sys.modules['freezeplan'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model(torch.ones(1, 3, 32, 32)).sum().item(), all(p.requires_grad for p in model.parameters()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    assert found.returncode == 0, found.stderr
    logits, flags = found.stdout.split()
    assert float(logits) == pytest.approx(expected, rel=1e-5)
    assert flags == "True"
