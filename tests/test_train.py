"""The model that the arms start from, and the loop that trains one of them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from freezeplan.errors import ModelError, WeightsError
from freezeplan.experiment.arms import load_arms
from freezeplan.experiment.train import Epoch, Run, Settings, batches, make_optimizer, measure, train_arm
from freezeplan.experiment.voc import Split
from freezeplan.experiment.weights import build, load_into, read_state
from freezeplan.zoo import create_model

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
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


def split(count: int = 20, classes: int = 2) -> Split:
    """Images of one colour a class."""
    labels = torch.arange(count) % classes
    images = (labels[:, None, None, None] * (255 // (classes - 1))).expand(-1, 3, 16, 16).to(torch.uint8).contiguous()
    return Split(images, {"largest": labels, "first": labels}, nn.functional.one_hot(labels, classes), "largest")


def start(classes: int = 2, seed: int = 0, weights: str | Path = "random", model: str = MODEL) -> nn.Module:
    return build(model, classes=classes, image_size=16, weights=weights, seed=seed)


def train(arm: str = "same_lr", model: nn.Module | None = None, settings: Settings = SETTINGS, seed: int = 0) -> Run:
    data = split(), split(10)
    return train_arm(model or start(), load_arms([arm])[arm], data, settings, seed=seed, progress=Recorder())


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
    state = read_state(weights)

    for name, tensor in start(weights=weights).state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, state[name]), name


def test_vgg16_takes_its_features_and_nothing_else(tmp_path: Path) -> None:
    source = create_model("vgg16_slim_fc256", num_classes=7)
    save_file(source.state_dict(), tmp_path / "slim.safetensors")

    model = build("vgg16_slim_fc256", classes=3, image_size=64, weights=tmp_path / "slim.safetensors", seed=0)

    assert torch.equal(model.features[0].weight, source.features[0].weight)
    assert not torch.equal(model.pre_logits.fc.weight, source.pre_logits.fc.weight)


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

    assert read_state(tmp_path / "model.pth").keys() == {"weight", "bias"}


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
        read_state(missing)
    assert str(caught.value) == f"{missing}: no such file\n  expected a safetensors file or a checkpoint"
    with pytest.raises(WeightsError, match=r"bad\.safetensors: cannot be read as weights"):
        read_state(damaged)
    with pytest.raises(WeightsError, match=r"empty\.pt: holds no tensors"):
        read_state(empty)


def test_an_unreachable_hub_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> nn.Module:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("freezeplan.experiment.weights.timm", SimpleNamespace(create_model=unreachable))

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
        "torchvision.models:resnet18 is not a timm model, which the experiment needs\n"
        "  it takes the size of the images, their normalisation and the classifier from timm's configuration"
    )


def test_an_arm_learns_and_is_measured() -> None:
    run = train(settings=replace(SETTINGS, epochs=8))

    assert (run.learned, run.train_error, run.val.top1_error, run.val.any_error) == (True, 0, 0, 0)
    assert run.val.top5_error is None
    assert run.val.average_precision == (1, 1)
    assert [epoch.epoch for epoch in run.epochs] == [*range(1, 9)]
    assert run.seconds >= sum(epoch.train_seconds + epoch.eval_seconds for epoch in run.epochs)


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


def test_rmsprop_tf1_starts_its_mean_square_at_one() -> None:
    steps = {}
    for name in ("rmsprop-tf1", "rmsprop"):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = make_optimizer(name, [{"params": [weight]}], lr=1.0)  # type: ignore[arg-type]
        weight.grad = torch.full((1,), 0.1)
        optimizer.step()
        steps[name] = -weight.item()

    assert steps == {"rmsprop-tf1": pytest.approx(0.1 / 0.901**0.5), "rmsprop": pytest.approx(0.1 / 0.001**0.5)}


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

    assert torch.equal(model.conv_stem.weight, read_state(path)["conv_stem.weight"])
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


def test_bfloat16_is_near() -> None:
    """Autocast, with and without kept features; a loss within a few per cent."""
    model, plan, data = start(), load_arms(["frozen_convs"])["frozen_convs"], (split(), split(8))
    settings = [
        replace(SETTINGS, amp=amp, cache=cache) for amp, cache in ((None, False), ("bf16", False), ("bf16", True))
    ]
    runs = [train_arm(copy.deepcopy(model), plan, data, s, seed=0, progress=Recorder()) for s in settings]
    losses = [run.epochs[0].train_loss for run in runs]

    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.05)
    assert losses[0] not in losses[1:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arm", ["frozen_convs", "same_lr"])
def test_compiled_is_near(arm: str) -> None:
    """On features and on images, the optimizer's step included.

    RMSprop's first step is the gradient's sign times a rate, so that a rounding error turns a step around where the
    gradient is nearly zero: at a small rate that stays a small difference.
    """
    model, plan, data = start(), load_arms([arm])[arm], (split(), split(8))
    settings = replace(SETTINGS, epochs=3, lr=2e-5)
    runs = [
        train_arm(copy.deepcopy(model), plan, data, replace(settings, compile=way), seed=0, progress=Recorder())
        for way in (False, True)
    ]
    plain, compiled = ([epoch.train_loss for epoch in run.epochs] for run in runs)

    assert len(set(plain)) == 3
    assert compiled == pytest.approx(plain, rel=0.01)
