"""The model that the arms start from, and the loop that trains one of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from freezeplan import FreezePlanWarning, Plan, load_plan
from freezeplan.errors import ModelError, WeightsError
from freezeplan.model.describer import create_model
from freezeplan.training.checkpoint import Checkpoint
from freezeplan.training.measures import measure
from freezeplan.training.optimizers import make_optimizer
from freezeplan.training.pixels import Pixels, draw, moved
from freezeplan.training.settings import Amp, Normalise, OptimizerName, Settings
from freezeplan.training.train import Epoch, Run, batches, train_arm
from freezeplan.training.voc import Split
from freezeplan.training.weights import load_into
from freezeplan.voc_vgg16.arms import load_arms
from freezeplan.voc_vgg16.model import VGG16_SLIM
from freezeplan.voc_vgg16.statistics import saving
from freezeplan.voc_vgg16.weights import build, read_weights

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MODEL = "test_resnet"
SETTINGS = Settings(epochs=2, batch_size=8, image_size=16, lr=1e-3, optimizer="rmsprop")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads take many times as long for models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder:
    def __init__(self) -> None:
        self.images: list[int] = []
        self.losses: list[float] = []
        self.epochs: list[Epoch] = []
        self.features: list[tuple[int, int]] = []

    def batch(self, images: int, loss: Tensor) -> None:
        self.images.append(images)
        self.losses.append(float(loss))

    def kept(self, done: int, images: int) -> None:
        self.features.append((done, images))

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)


def split(count: int = 20, classes: int = 2, size: int = 16) -> Split:
    """Images of one colour a class."""
    labels = torch.arange(count) % classes
    shades = labels[:, None, None, None] * (255 // (classes - 1))
    images = shades.expand(-1, 3, size, size).to(torch.uint8).contiguous()
    return Split(images, {"largest": labels, "first": labels}, nn.functional.one_hot(labels, classes), "largest")


def start(
    classes: int = 2, seed: int = 0, weights: str | Path = "random", model: str = MODEL, size: int = 16
) -> nn.Module:
    return build(model, classes=classes, image_size=size, weights=weights, seed=seed)


def train(
    arm: str = "same_lr",
    model: nn.Module | None = None,
    settings: Settings = SETTINGS,
    seed: int = 0,
    **options: bool,
) -> Run:
    data = split(), split(10)
    return train_arm(model or start(), load_arms([arm])[arm], data, settings, seed=seed, progress=Recorder(), **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file({name: tensor + 1 for name, tensor in create_model(MODEL).state_dict().items()}, path)
    return path


def test_the_head_depends_on_the_seed_alone(weights: Path) -> None:
    heads = [start(seed=seed, weights=given).fc for seed, given in ((0, "random"), (0, weights), (1, weights))]

    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[1].weight, heads[2].weight)


def test_everything_but_the_head_is_from_the_weights(weights: Path) -> None:
    state = read_weights(weights)

    for name, tensor in start(weights=weights).state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, state[name]), name


def test_vgg16_takes_its_features_and_nothing_else(tmp_path: Path) -> None:
    source = create_model("vgg16_slim_fc256", num_classes=7)
    save_file(source.state_dict(), tmp_path / "slim.safetensors")

    model = build("vgg16_slim_fc256", classes=3, image_size=64, weights=tmp_path / "slim.safetensors", seed=0)

    assert torch.equal(model.features[0].weight, source.features[0].weight)
    assert not torch.equal(model.pre_logits.fc.weight, source.pre_logits.fc.weight)


def test_vgg16_takes_torchvisions_checkpoint(tmp_path: Path) -> None:
    """A ``.pth`` of its layout, at an eighth of the width; the full one has the names and shapes of timm's."""
    vgg = pytest.importorskip("torchvision.models.vgg")
    with torch.device("meta"):
        names = {name: tuple(value.shape) for name, value in vgg.vgg16().state_dict().items()}
    mine = create_model("vgg16", meta=True).state_dict()
    source = vgg.make_layers(list(VGG16_SLIM)).state_dict(prefix="features.")
    torch.save({**source, "classifier.0.weight": torch.zeros(3, 7)}, tmp_path / "vgg16.pth")

    model = build("vgg16_slim_fc256", classes=3, image_size=64, weights=tmp_path / "vgg16.pth", seed=0)

    features = {name: shape for name, shape in names.items() if name.startswith("features.")}
    assert features == {name: tuple(value.shape) for name, value in mine.items() if name.startswith("features.")}
    assert source.keys() == features.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.items())


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()

    start()

    assert torch.equal(torch.get_rng_state(), before)


def test_a_vit_takes_its_weights_at_its_own_size_and_is_resampled(tmp_path: Path) -> None:
    path = tmp_path / "vit.pt"
    torch.save({"state_dict": create_model("test_vit").state_dict()}, path)

    model = build("test_vit", classes=3, image_size=96, weights=path, seed=0)

    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "state_dict_ema"])
def test_checkpoints_are_opened(wrapper: str, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in nn.Linear(2, 3).state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "model.pth")

    assert read_weights(tmp_path / "model.pth").keys() == {"weight", "bias"}


def test_weights_of_another_architecture_name_the_first_difference(weights: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        start(weights=weights, model="test_efficientnet")

    assert str(caught.value) == (
        f"{weights}: these are weights of another architecture than test_efficientnet\n"
        "  the first tensor that differs is conv_stem.weight: expected shape (24, 3, 3, 3), found no such tensor"
    )


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, "weight: expected shape (3, 2), found shape (3, 5)"),
        ({"weight": torch.zeros(3, 2)}, "bias: expected shape (3,), found no such tensor"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "scale": torch.zeros(1)},
            "scale: expected no such tensor, found shape (1,)",
        ),
    ],
)
def test_loading_names_the_first_difference_and_loads_nothing(given: dict[str, Tensor], difference: str) -> None:
    model = nn.Linear(2, 3)
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(WeightsError) as caught:
        load_into(model, given, lambda _: True, origin="w.pt")

    assert str(caught.value) == (
        "w.pt: these are weights of another architecture than Linear\n  the first tensor that differs is " + difference
    )
    assert torch.equal(model.weight, before["weight"])


def test_weights_that_are_missing_or_damaged(tmp_path: Path) -> None:
    missing, damaged, empty = (tmp_path / name for name in ("no.pt", "bad.safetensors", "empty.pt"))
    damaged.write_bytes(b"12345678901234567890")
    torch.save({"epoch": 3}, empty)

    with pytest.raises(WeightsError) as caught:
        read_weights(missing)
    assert str(caught.value) == f"{missing}: no such file\n  expected a safetensors file or a checkpoint"
    with pytest.raises(WeightsError, match=r"bad\.safetensors: cannot be read as safetensors \("):
        read_weights(damaged)
    with pytest.raises(WeightsError, match=r"empty\.pt: holds no tensors"):
        read_weights(empty)


def test_an_unreachable_hub_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> nn.Module:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("freezeplan.training.weights.timm", SimpleNamespace(create_model=unreachable))

    with pytest.raises(WeightsError) as caught:
        build(MODEL, classes=2, image_size=16, weights=None, seed=0)

    assert str(caught.value) == (
        "timm's pretrained weights of test_resnet cannot be had: no route to the hub\n"
        "  --weights FILE takes a safetensors file or a checkpoint from this machine\n"
        "  --weights random goes without: for timing, not for the experiment's figures"
    )


def test_an_unknown_model_is_told_the_nearest_names() -> None:
    with pytest.raises(ModelError, match="did you mean 'resnet50'"):
        start(model="resnet5O")


def test_a_model_without_a_classifier() -> None:
    with pytest.raises(ModelError, match="without a classifier"):
        build("mobilenetv5_300m_enc", classes=2, image_size=256, weights="random", seed=0)


def test_a_model_that_is_not_timms() -> None:
    with pytest.raises(ModelError) as caught:
        start(model="torchvision.models:resnet18")

    assert str(caught.value) == (
        "ResNet is not a timm model and holds none, which the training needs\n"
        "  it takes the size of the images and their normalisation from timm's configuration"
    )


def test_an_arm_learns_and_is_measured() -> None:
    run = train(settings=replace(SETTINGS, epochs=8), precision=True)

    assert (run.learned, run.train_error, run.val.top1_error, run.val.any_error) == (True, 0, 0, 0)
    assert run.val.top5_error is None
    assert run.val.average_precision == (1, 1)
    assert [epoch.epoch for epoch in run.epochs] == [*range(1, 9)]
    assert run.seconds >= sum(epoch.train_seconds + epoch.eval_seconds for epoch in run.epochs)


@pytest.mark.slow
def test_average_precision_is_measured_where_it_is_asked_for() -> None:
    assert train().val.average_precision == ()
    assert len(train(precision=True).val.average_precision) == 2


def test_a_seed_gives_the_same_run_again() -> None:
    first, second = ([epoch.train_loss for epoch in train(seed=3).epochs] for _ in range(2))

    assert first == second


def test_what_is_frozen_stands_still() -> None:
    model = start()
    before = copy.deepcopy(model.state_dict())

    train("frozen_convs", model)

    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"fc.weight", "fc.bias"}


def test_scratch_forgets_all_but_the_head(weights: Path) -> None:
    model = start(weights=weights)
    still = Settings(epochs=1, batch_size=8, image_size=16, lr=1e-12)
    head, stem = model.fc.weight.clone(), model.conv1[0].weight.clone()

    train("scratch", model, still)

    assert torch.allclose(model.fc.weight, head, atol=1e-9)
    assert not torch.allclose(model.conv1[0].weight, stem, atol=1e-1)


def test_training_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()

    train()

    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_blows_up_did_not_learn_and_does_not_stop() -> None:
    model = start()
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))

    run = train("frozen_convs", model)

    assert not run.learned
    assert len(run.epochs) == 2
    assert run.epochs[-1].train_loss != run.epochs[-1].train_loss
    assert 0 < run.train_error < 1


def test_warm_up_starts_below_the_rate_and_ends_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.RMSprop.step

    def record(self: torch.optim.RMSprop, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.RMSprop, "step", record)
    train(settings=Settings(epochs=2, batch_size=8, image_size=16, lr=1.0, optimizer="rmsprop", warmup=4))

    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_clipping_bounds_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.RMSprop.step

    def record(self: torch.optim.RMSprop, *args: object) -> object:
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.RMSprop, "step", record)
    train(settings=Settings(epochs=1, batch_size=8, image_size=16, optimizer="rmsprop", clip=0.01))

    assert max(norms) <= 0.0101


def test_batches_cover_every_image_once_in_nearly_equal_parts() -> None:
    parts = batches(33, 8, torch.Generator().manual_seed(0))

    assert sorted(len(rows) for rows in parts) == [6, 6, 7, 7, 7]
    assert sorted(torch.cat(parts).tolist()) == list(range(33))


@pytest.mark.parametrize(
    ("name", "step"),
    [("rmsprop-tf1", 0.1 / 0.901**0.5), ("rmsprop", 0.1 / 0.001**0.5), ("adamw", 1.0), ("sgd", 0.1)],
)
def test_the_first_step_of_each_optimizer(name: OptimizerName, step: float) -> None:
    """TensorFlow 1's mean square starts at one; the decay of AdamW does nothing to a weight of zero."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(name, [{"params": [weight]}], lr=1.0)
    weight.grad = torch.full((1,), 0.1)
    optimizer.step()

    assert -weight.item() == pytest.approx(step)
    assert optimizer.defaults.get("fused", False) == (name in ("adamw", "sgd"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_computes_the_bits_of_the_loop(dtype: torch.dtype) -> None:
    """On CUDA timm's RMSpropTF takes its foreach form by itself; its state can be resumed in the other form."""
    loop, foreach = (_after_steps(form, dtype) for form in (False, True))

    assert loop.keys() == foreach.keys()
    assert all(torch.equal(loop[name], foreach[name]) for name in loop)
    assert not any(bool(tensor.isnan().any()) for tensor in loop.values())
    earlier = _after_steps(False, dtype, steps=95)
    assert all(torch.equal(loop[name], earlier[name]) == (not loop[name].numel()) for name in loop)


def _after_steps(foreach: bool, dtype: torch.dtype, steps: int = 100) -> dict[str, Tensor]:
    """Values and state of parameters of many shapes, at two rates that change, one parameter without a gradient."""
    random = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (7,), (0,), (33, 17), (8, 4, 3, 3)]
    weights = [nn.Parameter(torch.randn(shape, generator=random, dtype=dtype)) for shape in shapes]
    weights[-1] = nn.Parameter(weights[-1].detach().to(memory_format=torch.channels_last))
    groups = [{"params": weights[:3]}, {"params": [*weights[3:], nn.Parameter(torch.ones(3, dtype=dtype))]}]
    optimizer = make_optimizer("rmsprop-tf1", groups, lr=5e-4)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random, dtype=dtype) * 10.0 ** (step % 9 - 6)
        optimizer.param_groups[1]["lr"] = 5e-4 * (0.2 if step % 2 else 1.0)
        optimizer.step()
    values = {f"{index} value": weight.detach() for index, weight in enumerate(weights)}
    state = optimizer.state_dict()["state"]
    return values | {f"{index} {name}": tensor for index, held in state.items() for name, tensor in held.items()}


def test_one_image_a_batch_says_what_to_do() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.get_classifier = lambda: model[3]
    plan = {"version": 1, "rules": [{"match": ".*", "lr_mult": 1}]}

    with pytest.raises(ModelError) as caught:
        train_arm(
            model,
            plan,  # type: ignore[arg-type]
            (split(), split()),
            Settings(epochs=1, batch_size=1, image_size=16),
            seed=0,
            progress=Recorder(),
        )

    assert str(caught.value) == "a norm layer needs more than one image a batch\n  --batch-size 2 or more"


def test_errors_of_six_classes() -> None:
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    present = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, 1]])
    images = torch.zeros(3, 3, 1, 1)

    by_rule = {"largest": torch.tensor([0, 1, 5]), "first": torch.tensor([0, 5, 0])}
    measured = measure(logits, Split(images, by_rule, present, "largest"))  # type: ignore[arg-type]

    assert measured.top1_error == pytest.approx(2 / 3)
    assert measured.top5_error == pytest.approx(1 / 3)
    assert measured.largest_error == measured.top1_error
    assert measured.first_error == 0
    assert measured.any_error == 0
    assert measured.average_precision[0] == 1
    assert measured.average_precision[2:5] == (None, None, None)
    assert measured.average_precision[5] == pytest.approx(0.5)


@pytest.mark.data
def test_real_weights_load() -> None:
    path = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
    if not path.exists():
        pytest.skip("needs tf_efficientnet_lite0.safetensors in ../shared/weights")

    model = build("tf_efficientnet_lite0", classes=5, image_size=128, weights=path, seed=0)

    assert torch.equal(model.conv_stem.weight, read_weights(path)["conv_stem.weight"])
    with pytest.raises(WeightsError, match=r"than vgg16_fc256\n  the first tensor that differs is features\.0\.weight"):
        build("vgg16", classes=5, image_size=224, weights=path, seed=0)


def test_kept_features_give_the_same_run() -> None:
    """As on images, up to rounding; a second arm that freezes the same finds its features."""
    model, data = start(), (split(), split(8))
    settings = replace(SETTINGS, lr=1e-3)
    runs = [
        train_arm(
            copy.deepcopy(model), load_arms(["frozen_convs"])["frozen_convs"], data, s, seed=0, progress=Recorder()
        )
        for s in (replace(settings, cache=False), settings, settings)
    ]

    assert [run.features for run in runs] == [0, 28, 28]
    assert runs[2].features_computed == 0
    for plain, kept in zip(runs[0].epochs, runs[1].epochs, strict=True):
        assert kept.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
        assert kept.val_top1_error == plain.val_top1_error


@pytest.mark.slow
def test_without_a_cuda_device_no_graph_is_used_and_the_run_says_so() -> None:
    model, plan, data = start(), load_arms(["frozen_convs"])["frozen_convs"], (split(), split(8))
    plain, graphed = (
        train_arm(copy.deepcopy(model), plan, data, replace(SETTINGS, cuda_graph=on), seed=0, progress=Recorder())
        for on in (False, True)
    )

    assert _figures(plain) == _figures(graphed)
    assert (plain.graph_reason, graphed.graph_reason) == ("", "there is no CUDA device")
    assert saving([asdict(graphed)]).endswith("; no CUDA graph: there is no CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_is_near(amp: Amp) -> None:
    """Autocast, with and without kept features; a loss within a few per cent."""
    model, plan, data = start(), load_arms(["frozen_convs"])["frozen_convs"], (split(), split(8))
    settings = [replace(SETTINGS, amp=one, cache=cache) for one, cache in ((None, False), (amp, False), (amp, True))]
    runs = [train_arm(copy.deepcopy(model), plan, data, s, seed=0, progress=Recorder()) for s in settings]
    losses = [run.epochs[0].train_loss for run in runs]

    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.05)
    assert losses[0] not in losses[1:]


@pytest.mark.slow
def test_a_step_whose_scaled_gradient_overflows_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale then falls, warm-up does not go on, and training does."""
    model, rates = start(), []
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **given: scaler(*args, **given, init_scale=2.0**127))
    step = torch.optim.RMSprop.step

    def record(self: torch.optim.RMSprop, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.RMSprop, "step", record)
    run = train(model=model, settings=replace(SETTINGS, epochs=50, amp="fp16", warmup=4, lr=1e-4))

    assert 0 < len(rates) < 150
    assert rates[:4] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4])
    assert run.epochs[-1].train_loss < run.epochs[0].train_loss
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.slow
def test_the_order_in_memory_changes_rounding_alone() -> None:
    losses = [
        [epoch.train_loss for epoch in train(settings=replace(SETTINGS, lr=1e-6, channels_last=way)).epochs]
        for way in (False, True)
    ]

    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def _gone_on(settings: Settings, plan: Plan, after: int, folder: Path, model: str = MODEL) -> tuple[Run, Run, Recorder]:
    """A run, and one like it that was stopped after some epochs and went on from its checkpoint."""
    size = settings.image_size
    data = split(size=size), split(8, size=size)
    whole = train_arm(start(model=model, size=size), plan, data, settings, seed=0, progress=Recorder())
    checkpoint = Checkpoint(folder / "one.checkpoint", print)

    class Stop(Recorder):
        def epoch(self, epoch: Epoch) -> None:
            if epoch.epoch == after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_arm(start(model=model, size=size), plan, data, settings, seed=0, progress=Stop(), checkpoint=checkpoint)
    again = Recorder()
    gone_on = train_arm(
        start(model=model, size=size), plan, data, settings, seed=0, progress=again, checkpoint=checkpoint
    )
    return whole, gone_on, again


def _figures(run: Run) -> tuple[object, ...]:
    return [(epoch.train_loss, epoch.val_top1_error) for epoch in run.epochs], run.val, run.train_error, run.predicted


HALF = 32
"""Pixels. With 16 the last convolution gets one pixel, and on some CPUs torch then leaves parts of its bfloat16
gradient as they were in memory."""


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "crop-flip"},
        pytest.param({"amp": "bf16", "image_size": HALF}, marks=pytest.mark.slow),
        pytest.param({"amp": "fp16", "image_size": HALF}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_stopped_and_goes_on_gives_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=4, **changes)
    whole, gone_on, _ = _gone_on(settings, load_arms(["same_lr"])["same_lr"], 2, tmp_path)

    assert _figures(gone_on) == _figures(whole)


PHASES = {
    "version": 1,
    "phases": [{"name": "head", "until": 2, "rules": [{"role": "body", "frozen": True}]}, {"name": "all"}],
    "rules": [{"role": "head", "lr_mult": 1}, {"match": ".*", "lr_mult": 0.5}],
}
PLATEAU = {
    **PHASES,
    "phases": [
        {
            "name": "head",
            "until": {"metric": "val_loss", "patience": 1, "goal": "max"},
            "rules": [{"role": "body", "frozen": True}],
        },
        {"name": "all"},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("plan", [PHASES, PLATEAU], ids=["epochs", "plateau"])
def test_a_plan_with_phases_goes_on_in_the_phase_it_was_in(plan: dict[str, Any], after: int, tmp_path: Path) -> None:
    """Stopped in the first phase, at its end and in the second; the first is trained on features."""
    whole, gone_on, again = _gone_on(replace(SETTINGS, epochs=4), load_plan(plan), after, tmp_path)

    assert _figures(gone_on) == _figures(whole)
    assert whole.features == 28
    assert 1 <= whole.features_epochs <= 3
    assert (gone_on.features_epochs, len(again.epochs)) == (max(0, whole.features_epochs - after), 4)


def test_phases_freeze_and_thaw() -> None:
    model = start()
    before = copy.deepcopy(model.state_dict())
    moved = []

    class Look(Recorder):
        def epoch(self, epoch: Epoch) -> None:
            state = model.state_dict()
            moved.append(not torch.equal(state["conv1.0.weight"], before["conv1.0.weight"]))

    settings = replace(SETTINGS, epochs=4)
    train_arm(model, load_plan(PHASES), (split(), split(8)), settings, seed=0, progress=Look())

    assert moved == [False, False, True, True]


def test_augmentation_keeps_no_features_and_says_so() -> None:
    plan, data = load_arms(["frozen_convs"])["frozen_convs"], (split(), split(8))
    settings = replace(SETTINGS, augment="flip")

    with pytest.warns(FreezePlanWarning) as caught:
        run = train_arm(start(), plan, data, settings, seed=0, progress=Recorder())

    assert run.features == 0
    assert [str(warning.message) for warning in caught] == [
        "voc_vgg16/frozen_convs: --augment flip changes images ahead of what is frozen, so no features are kept and "
        "the frozen layers run in every epoch"
    ]


def test_training_images_are_augmented_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training image is given once an epoch, moved; validation and the training error are on the images."""
    given: list[bool] = []
    call = Pixels.__call__

    def record(self: Pixels, rows: Tensor, moves: Tensor | None = None) -> Tensor:
        given.extend([moves is not None] * len(rows))
        return call(self, rows, moves)

    monkeypatch.setattr(Pixels, "__call__", record)
    train(settings=replace(SETTINGS, epochs=2, cache=False, augment="crop-flip"))

    assert given == ([True] * 20 + [False] * 10) * 2 + [False] * 20


def test_moves_are_drawn_from_the_seed_and_within_an_eighth() -> None:
    drawn = [draw("crop-flip", 500, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    only = draw("flip", 500, 64, torch.Generator())

    assert drawn[0] is not None
    assert only is not None
    assert torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    assert not torch.equal(drawn[0], drawn[2])  # type: ignore[arg-type]
    assert drawn[0][:, :2].unique().tolist() == [*range(-8, 9)]
    assert only[:, :2].unique().tolist() == [0]
    assert only[:, 2].unique().tolist() == [0, 1]
    assert draw("none", 500, 64, torch.Generator()) is None


@pytest.mark.parametrize("move", [[0, 0, 0], [3, -2, 0], [-1, 4, 1]])
def test_an_image_is_shifted_as_numpy_would_pad_and_cut_it(move: list[int]) -> None:
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    down, right, mirrored = move
    padded = np.pad(image[0].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")

    found = moved(image, torch.tensor([move]))

    cut = padded[:, 4 + down : 36 + down, 4 + right : 36 + right]
    assert np.array_equal(found[0].numpy(), cut[:, :, ::-1] if mirrored else cut)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("weights", [(1 - 0.5) / 0.25, -2.0, -2.0]),
        ("half", [1.0, -1.0, -1.0]),
        ("imagenet", [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]),
        ("bgr-mean", [-103.939, -116.779, 255 - 123.68]),
    ],
)
def test_a_red_pixel_under_each_normalisation(how: Normalise, expected: list[float]) -> None:
    model = create_model("vgg16_slim_fc256")
    red = replace(split(1), images=torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1))

    found = Pixels(model, red, normalise=how, channels_last=True)[0].flatten().tolist()

    assert found == pytest.approx(expected, rel=1e-4)


def test_pool5_pixel_by_pixel_is_another_order_of_the_same_inputs() -> None:
    chw, hwc = (
        build("vgg16_slim_fc256", classes=3, image_size=64, weights="random", seed=0, flatten=order)
        for order in ("chw", "hwc")
    )
    weight = chw.pre_logits.fc.weight
    with torch.no_grad():
        hwc.pre_logits.fc.weight.copy_(weight.view(-1, 64, 2, 2).permute(0, 2, 3, 1).flatten(1))
    images = torch.randn(2, 3, 64, 64)

    assert torch.allclose(chw(images), hwc(images), atol=1e-5)
    with torch.no_grad():
        hwc.pre_logits.fc.weight.copy_(weight)
    assert not torch.allclose(chw(images), hwc(images), atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arm", "name", "size"), [("frozen_convs", MODEL, 16), ("same_lr", "test_resnet", 32)])
def test_compiled_is_near(arm: str, name: str, size: int) -> None:
    """On features and, of a model that compiles soon, on images, the optimizer's step included.

    RMSprop's first step is the gradient's sign times a rate, so that a rounding error turns a step around where the
    gradient is nearly zero: at a small rate that stays a small difference.
    """
    model, plan, data = start(model=name, size=size), load_arms([arm])[arm], (split(size=size), split(8, size=size))
    settings = replace(SETTINGS, epochs=3, lr=2e-5, image_size=size)
    runs = [
        train_arm(copy.deepcopy(model), plan, data, replace(settings, compile=way), seed=0, progress=Recorder())
        for way in (False, True)
    ]
    plain, compiled = ([epoch.train_loss for epoch in run.epochs] for run in runs)

    assert len(set(plain)) == 3
    assert compiled == pytest.approx(plain, rel=0.01)
