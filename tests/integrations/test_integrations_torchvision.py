"""torchvision's models and detectors: a plan selects by name and type, and needs nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from freezeplan import apply_plan

torch.set_num_threads(1)

RATES = {
    "version": 1,
    "rules": [
        {"match": "classifier", "lr_mult": 1},
        {"match": r"features\.1[0-2]", "lr_mult": 0.1},
        {"match": "features", "frozen": True},
    ],
}


def mobilenet() -> Any:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v3_small(num_classes=3, dropout=0.0)


def test_a_classifier_of_torchvision_trains_as_if_frozen_by_hand(plain: Any) -> None:
    """One epoch with a plan, and one with flags, modes and rates written out: the same weights; what is frozen held."""
    model, other = mobilenet(), mobilenet()
    applied = apply_plan(model, RATES, lr=0.05)
    applied.seal()
    plain.train(model, applied, torch.optim.SGD(applied, momentum=0.9), range(1))

    other.train()
    for layer in other.features[:10]:
        layer.eval().requires_grad_(False)
    groups = [{"params": other.features[10:].parameters(), "lr": 0.005}, {"params": other.classifier.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    images, labels = plain.data
    for batch in torch.arange(24).split(8):
        loss = nn.functional.cross_entropy(other(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert plain.difference(model.state_dict(), other.state_dict()) <= 1e-6
    assert applied.verify()
    assert "features.9.block.0.1.running_mean" in model.state_dict()
    assert torch.equal(mobilenet().features[9].block[0][1].running_mean, model.features[9].block[0][1].running_mean)


PHASED = {
    "version": 1,
    "phases": [{"name": "head", "until": 1, "rules": [{"match": "features", "frozen": True}]}, {"name": "top"}],
    "rules": RATES["rules"],
}


def phased() -> tuple[Any, Any, torch.optim.Optimizer]:
    model = mobilenet()
    applied = apply_plan(model, PHASED, lr=0.05)
    return model, applied, torch.optim.SGD(applied, momentum=0.9)


@pytest.mark.parametrize(
    "stopped", [pytest.param(1, id="on-the-way", marks=pytest.mark.slow), pytest.param(2, id="within")]
)
def test_a_run_that_resumes_in_phase_two_gives_the_weights_of_one_never_stopped(stopped: int, plain: Any) -> None:
    """From the state dicts of model, optimizer and plan, as in docs/trainers/plain.md; to the same bits."""
    whole, live, optimizer = phased()
    plain.train(whole, live, optimizer, range(stopped))
    saved = copy.deepcopy((whole.state_dict(), live.state_dict(), optimizer.state_dict()))
    plain.train(whole, live, optimizer, range(stopped, 3))

    again, resumed, second = phased()
    for part, state in zip((again, resumed, second), saved, strict=True):
        part.load_state_dict(state)
    plain.train(again, resumed, second, range(stopped, 3))

    assert resumed.phase == live.phase == "top"
    weight = "features.11.block.0.0.weight"
    assert not torch.equal(whole.state_dict()[weight], saved[0][weight])
    assert plain.difference(whole.state_dict(), again.state_dict()) == 0


class Tiny(nn.Sequential):
    """A backbone of one map."""

    out_channels = 8

    def __init__(self) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        super().__init__(stem, nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()))


def detector() -> Any:
    torch.manual_seed(0)
    return FasterRCNN(
        Tiny(),
        num_classes=2,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(featmap_names=["0"], output_size=3, sampling_ratio=1),
        rpn_pre_nms_top_n_train=20,
        rpn_post_nms_top_n_train=10,
        box_batch_size_per_image=8,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_detector_keeps_its_frozen_stem_and_trains_the_rest(momentum: float) -> None:
    """Losses of RPN and boxes reach the thawed part; the frozen one, its statistics too, stands still; phases work."""
    model = detector()
    heads = [{"match": "backbone", "frozen": True}]
    top = [{"match": r"backbone\.0", "frozen": True}]
    plan = {
        "version": 1,
        "phases": [{"name": "heads", "until": 1, "rules": heads}, {"name": "top", "rules": top}],
        "rules": [{"match": ["rpn", "roi_heads"], "lr_mult": 1}, {"match": ".*", "lr_mult": 0.1}],
    }
    applied = apply_plan(model, plan, lr=0.01)
    applied.seal()
    optimizer = torch.optim.SGD(applied, momentum=momentum)
    applied.check(optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    moved = []
    for epoch in range(2):
        applied.step(epoch=epoch)
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        losses = model([torch.rand(3, 64, 64, generator=generator)], targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        now = model.state_dict()
        moved.append(
            {name.split(".")[0] + name.split(".")[1] for name in now if not torch.equal(now[name], before[name])}
        )

    assert not {"backbone0", "backbone1"} & moved[0]
    assert {"rpnhead", "roi_headsbox_head"} <= moved[0]
    assert moved[1] - moved[0] == {"backbone1"}
    assert str(applied.verify()) == "held: 7 frozen tensors and buffers are bit-identical"
