"""Plans under Lightning's Trainer, compared with the plain loop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import apply_plan
from freezeplan.errors import ApplyError, MissingExtraError
from freezeplan.integrations.lightning import FreezePlanCallback, configure_optimizers
from freezeplan.integrations.plans import Plans

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

PARTLY = {
    "version": 1,
    "rules": [{"role": "head", "lr_mult": 1}, {"stage": -1, "lr_mult": 0.1}, {"match": ".*", "frozen": True}],
}
BODY = [{"role": "body", "frozen": True}]
RATES = [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}]
BY_EPOCH = {"version": 1, "phases": [{"name": "head", "until": 1, "rules": BODY}, {"name": "all"}], "rules": RATES}
BY_PLATEAU = {
    "version": 1,
    "phases": [
        {"name": "head", "until": {"metric": "score", "patience": 1, "goal": "max"}, "rules": BODY},
        {"name": "all"},
    ],
    "rules": RATES,
}


def small(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **({"img_size": 32} if name == "test_vit" else {}))


class Classifier(L.LightningModule):
    """As in docs/trainers/lightning.md, with the scripted score of the plain loop."""

    def __init__(self, plan: Any, plain: Any, name: str = "test_resnet", scheduler: Any = "torch") -> None:
        super().__init__()
        self.plain = plain
        self.model = small(name)
        self.applied = apply_plan(self.model, plan, lr=0.05, scheduler=scheduler)
        self.phases: list[tuple[str, bool]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == 0:
            self.phases.append((self.applied.phase, next(self.model.children()).training))
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("score", torch.tensor(self.plain.scores[self.current_epoch]))

    def configure_optimizers(self) -> dict[str, Any]:
        return configure_optimizers(self.applied, torch.optim.SGD(self.applied, momentum=0.9))


def fit(module: Classifier, epochs: int, folder: Path, resume: Path | None = None, **settings: Any) -> None:
    loader = DataLoader(TensorDataset(*module.plain.data), batch_size=8)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **settings), FreezePlanCallback()],
    )
    trainer.fit(module, loader, loader, ckpt_path=resume)


def by_hand(plan: Any, plain: Any, epochs: int, name: str = "test_resnet", scheduler: Any = "torch") -> nn.Module:
    model = small(name)
    live = apply_plan(model, plan, lr=0.05, scheduler=scheduler)
    optimizer = torch.optim.SGD(live, momentum=0.9)
    if scheduler == "any":
        live.attach(optimizer)
    plain.train(model, live, optimizer, range(epochs))
    return model


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("test_resnet", "torch"),
        ("test_resnet", "any"),
        ("test_vit", "torch"),
        ("test_vit", "any"),
    ],
)
def test_an_epoch_gives_the_weights_of_the_plain_loop(name: str, scheduler: str, plain: Any, tmp_path: Path) -> None:
    """The same plan, data and seed; what is frozen, statistics of BatchNorm too, is bit-identical afterwards."""
    module = Classifier(PARTLY, plain, name, scheduler)
    module.applied.seal()
    fit(module, 1, tmp_path)
    other = by_hand(PARTLY, plain, 1, name, scheduler)

    assert plain.difference(module.model.state_dict(), other.state_dict()) <= 1e-6
    assert str(module.applied.verify()).startswith("held: ")
    before = small(name).state_dict()
    moved = [key for key, value in before.items() if not torch.equal(value, other.state_dict()[key])]
    assert moved
    assert len(moved) < len(before)


@pytest.mark.parametrize(
    ("plan", "second"),
    [pytest.param(BY_EPOCH, 1, id="epoch"), pytest.param(BY_PLATEAU, 3, id="plateau")],
)
@pytest.mark.parametrize("where", [pytest.param(True, id="train-end"), pytest.param(False, id="validation-end")])
def test_phases_are_those_of_the_plain_loop_and_a_run_resumes_in_the_second(
    plan: Any, second: int, where: bool, plain: Any, tmp_path: Path
) -> None:
    """Thawed layers are in train although Lightning calls no train(); stopped at any epoch it goes on to the same."""
    whole = Classifier(plan, plain)
    fit(whole, 5, tmp_path, save_on_train_epoch_end=where)
    other = by_hand(plan, plain, 5)
    assert whole.phases == [("head", False)] * second + [("all", True)] * (5 - second)
    assert plain.difference(whole.model.state_dict(), other.state_dict()) <= 1e-6

    for stopped in (second - 1, second):  # on the way into phase two, and within it
        again = Classifier(plan, plain)
        fit(again, 5, tmp_path / f"after-{stopped}", resume=tmp_path / f"epoch={stopped}.ckpt")
        assert again.phases == whole.phases[stopped + 1 :]
        assert plain.difference(whole.model.state_dict(), again.model.state_dict()) <= 1e-6


def test_a_scheduler_is_passed_on_and_one_that_flattens_is_refused(plain: Any) -> None:
    """configure_optimizers returns Lightning's dict, and checks the rates ahead of the training."""
    module = Classifier(PARTLY, plain)
    optimizer = torch.optim.SGD(module.applied)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    found = configure_optimizers(module.applied, optimizer, scheduler, interval="step")
    assert found == {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    flat = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    with pytest.raises(
        ApplyError, match=r"^(CosineAnnealingLR, )?OneCycleLR(, CosineAnnealingLR)? flattened the rates"
    ):
        configure_optimizers(module.applied, optimizer, flat)


def test_a_trainer_that_only_validates_needs_no_plan(plain: Any) -> None:
    """The callback may stay in the list; it has no phase to keep and none to go on in."""
    callback = FreezePlanCallback()
    callback.setup(SimpleNamespace(world_size=1), L.LightningModule(), "validate")
    callback.load_state_dict({"plans": {"model": {}}, "metrics": {}})
    callback.on_train_epoch_start(SimpleNamespace(current_epoch=0), L.LightningModule())

    assert callback.state_dict() == {}


class ByTimm(Classifier):
    """With a scheduler of timm, as docs/trainers/lightning.md says."""

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.applied, momentum=0.9)
        return configure_optimizers(self.applied, optimizer, cosine(optimizer))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(self.current_epoch + 1)


def cosine(optimizer: Any) -> CosineLRScheduler:
    return CosineLRScheduler(optimizer, t_initial=4, lr_min=1e-3, warmup_t=1, warmup_lr_init=1e-2)


def test_schedulers_of_timm_work_by_one_hook(plain: Any, tmp_path: Path) -> None:
    """Three epochs of warm-up and cosine with a floor: the weights of the plain loop."""
    module = ByTimm(PARTLY, plain, scheduler="timm")
    fit(module, 3, tmp_path)
    model = small()
    live = apply_plan(model, PARTLY, lr=0.05, scheduler="timm")
    optimizer = torch.optim.SGD(live, momentum=0.9)
    scheduler = cosine(optimizer)
    ended = iter(range(1, 4))
    plain.train(model, live, optimizer, range(3), after_epoch=lambda: scheduler.step(next(ended)))

    assert plain.difference(module.model.state_dict(), model.state_dict()) <= 1e-6
    assert {group["lr"] for group in optimizer.param_groups} != {0.05, 0.005}


def test_what_a_trainer_cannot_do_is_said_before_it_starts(plain: Any, tmp_path: Path) -> None:
    """No plan; phases in several processes; a checkpoint of other models."""
    bare = L.LightningModule()
    with pytest.raises(ApplyError) as error:
        FreezePlanCallback().setup(SimpleNamespace(world_size=1), bare, "fit")
    assert str(error.value) == (
        "no plan is live in LightningModule\n"
        "  apply_plan(model, plan, ...) where the model is made, before the trainer starts"
    )
    phased = Classifier(BY_EPOCH, plain)
    with pytest.raises(ApplyError) as error:
        FreezePlanCallback().setup(SimpleNamespace(world_size=2), phased, "fit")
    assert str(error.value) == (
        "the plan 'plan' has phases, and 2 processes train: this trainer wraps the model once, so gradients of what "
        "a later phase thaws would not be synchronised\n"
        "  train in one process, or in a loop of your own: applied.step(epoch=e, rewrap=True)"
    )
    with pytest.raises(ApplyError) as error:
        Plans(phased).load_state_dict({"net": {}})
    assert str(error.value) == "this state has plans on ['net'], and they are live on ['model']"


@pytest.mark.parametrize(("module", "extra"), [("lightning", "lightning")])
def test_a_missing_package_is_named_with_its_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the import says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"freezeplan.integrations.{module}", raising=False)
    with pytest.raises(MissingExtraError) as error:
        importlib.import_module(f"freezeplan.integrations.{module}")

    assert str(error.value) == f"this needs {module}, which is not installed\n  pip install 'freezeplan[{extra}]'"


def test_a_package_that_is_too_old_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installed one lacks, and what to install."""
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delattr(L, "pytorch")
    monkeypatch.delitem(sys.modules, "freezeplan.integrations.lightning", raising=False)
    with pytest.raises(MissingExtraError) as error:
        importlib.import_module("freezeplan.integrations.lightning")

    assert str(error.value) == (
        "this needs a newer lightning, the installed one is too old: "
        "import of lightning.pytorch halted; None in sys.modules\n"
        "  pip install 'freezeplan[lightning]'"
    )
