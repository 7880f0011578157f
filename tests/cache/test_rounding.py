"""A device whose kernels round by the number of images, as a GPU's do: features are cached, dependence is found.

``conv2d`` and ``linear`` are patched: each output gets a relative change that the shape alone decides. So the same
batch twice is equal bit by bit, and so is an image at the same place of a batch of the same size. Batches of other
sizes are not.
"""

from __future__ import annotations

import hashlib
import json
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import ZOO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from freezeplan import apply_plan
from freezeplan.cache.replay import Rest
from freezeplan.cache.replay_proof import prove
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model
from freezeplan.voc_vgg16.command import voc_vgg16

QUICK = ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_byobnet"]
LARGE = {"deepseek_vit", "gemma4_vit", "mobilenetv5", "naflexvit", "nasnet", "pnasnet", "qwen3_vit"}
ROUNDING = {"tf32": 1e-3, "bf16": 1e-2}
HEAD = {"version": 1, "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}


def rounded(function, relative: float):
    noises: dict[tuple[int, ...], torch.Tensor] = {}

    def patched(*args, **kwargs):
        answer = function(*args, **kwargs)
        if (
            answer.device.type != "cpu"
            or not answer.is_floating_point()
            or isinstance(answer, torch._subclasses.FakeTensor)
        ):
            return answer
        shape = tuple(answer.shape)
        if shape not in noises:
            seed = int.from_bytes(hashlib.sha256(repr(shape).encode()).digest()[:6], "big")
            noises[shape] = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return answer * (1 + relative * noises[shape]).to(answer.dtype)

    return patched


@pytest.fixture(params=["tf32", pytest.param("bf16", marks=pytest.mark.slow)])
def device_that_rounds(request, monkeypatch):
    """The relative change of every product."""
    relative = ROUNDING[request.param]
    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, rounded(getattr(F, name), relative))
    return relative


def test_the_patch_is_such_a_device(device_that_rounds):
    layer, images = nn.Conv2d(3, 4, 1), torch.randn(5, 3, 8, 8)
    whole = layer(images)

    assert torch.equal(whole, layer(images))
    assert not torch.equal(whole[:2], layer(images[:2]))
    other = images.clone()
    other[[0, 1, 3, 4]] = torch.randn(4, 3, 8, 8)
    assert torch.equal(whole[2], layer(other)[2])
    assert (whole[:2] - layer(images[:2])).abs().max() <= 3 * device_that_rounds * whole.abs().max()


def keeps_trains_and_reads_back(
    name: str, folder: Path, plan: str = "linear_probe", *, size: int = 0, **arguments: int
) -> None:
    """Features of five images in batches of two, so that the last batch is smaller; a step on them; found again."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **arguments)
    size = size or model.pretrained_cfg["input_size"][-1]
    images = TensorDataset(torch.randn(5, 3, size, size), torch.arange(5) % 3)
    live = apply_plan(model, plan, lr=0.1)
    optimizer = torch.optim.SGD(live)

    features, rest = live.cached(images, folder, batch_size=2)
    rest.train()
    given = features.batch([0, 3, 4])
    loss = F.cross_entropy(rest(given), images.tensors[1][[0, 3, 4]])
    loss.backward()
    optimizer.step()
    again, _ = live.cached(images, folder, batch_size=2)

    assert torch.isfinite(loss)
    assert (features.computed, again.computed) == (5, 0)
    assert torch.equal(again.batch(range(5)), features.batch(range(5)))


@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
@pytest.mark.parametrize("plan", ["linear_probe", pytest.param("surgical_last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*QUICK[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in QUICK[1:])])
def test_models_keep_their_features(name, plan, device_that_rounds, tmp_path):
    keeps_trains_and_reads_back(name, tmp_path, plan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
@pytest.mark.parametrize(("family", "relative"), list(zip(ZOO, cycle(ROUNDING.values()), strict=False)), ids=ZOO)
def test_one_model_of_each_module_keeps_its_features(family, relative, monkeypatch, tmp_path):
    """Every other one rounds as TF32 does, the others as bf16."""
    if family in LARGE:
        pytest.skip("takes more memory than a test should")
    for name in ("conv2d", "linear"):
        monkeypatch.setattr(F, name, rounded(getattr(F, name), relative))
    entry = ZOO[family]
    keeps_trains_and_reads_back(entry["model"], tmp_path, size=entry["size"], **entry["arguments"])


@pytest.mark.slow
def test_the_experiment_ends_with_four_arms(device_that_rounds, tmp_path):
    """The embedded sample, on features where convolutions are frozen."""
    out = voc_vgg16(out=tmp_path / "out", cache_dir=tmp_path / "cache", epochs=2, threads=1, workers=1)
    arms = json.loads((out / "results.json").read_text())["arms"]

    assert list(arms) == ["scratch", "frozen_convs", "low_conv_lr", "same_lr"]
    assert [arm["runs"][0]["features"] > 0 for arm in arms.values()] == [False, True, False, False]


def test_the_difference_is_measured_and_said(device_that_rounds):
    live = apply_plan(create_model("test_resnet", num_classes=3), "linear_probe")
    prefix = live.prefix(torch.randn(3, 3, 64, 64))

    assert device_that_rounds / 10 < prefix.size_difference < 100 * device_that_rounds
    assert f"features of this device differ by {prefix.size_difference:.1e} of the largest with the batch size" in str(
        prefix
    )


class Net(nn.Module):
    """A frozen part, what its own code does to its output, and a head."""

    def __init__(self, code):
        super().__init__()
        self.part, self.head = Part(code), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.part(x).mean((2, 3)))


class Part(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.conv, self.code = nn.Conv2d(3, 4, 1), code

    def forward(self, x):
        return self.code(self.conv(x))


CODES = {
    "the batch's mean": (lambda y: y - y.mean(0), "its output for an image depends on the other images of the batch"),
    "a trace of the batch": (
        lambda y: y - 1e-5 * y.mean(0),
        "its output for an image depends on the other images of the batch",
    ),
    "chance in eval": (
        lambda y: F.dropout(y, 0.1, training=True),
        "its output is not the same for the same batch twice",
    ),
}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("relative", [0.0, *ROUNDING.values()])
def test_what_depends_on_the_batch_or_on_chance_is_found(code, relative, monkeypatch):
    """As surely where rounding is larger than the dependence."""
    if relative:
        for name in ("conv2d", "linear"):
            monkeypatch.setattr(F, name, rounded(getattr(F, name), relative))
    does, reason = CODES[code]

    prefix = apply_plan(Net(does), HEAD).prefix(torch.randn(3, 3, 16, 16))

    assert [call.module for call in prefix.stored] == ["part.conv"]
    assert prefix.reasons["part"].startswith(reason)


@pytest.mark.parametrize("relative", [0.0, *ROUNDING.values()])
def test_batch_norm_in_train_in_the_frozen_part_is_found(relative, monkeypatch):
    if relative:
        for name in ("conv2d", "linear"):
            monkeypatch.setattr(F, name, rounded(getattr(F, name), relative))
    rules = [{"role": "norm", "mode": "train"}, {"role": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]

    prefix = apply_plan(create_model("test_resnet", num_classes=3), {"version": 1, "rules": rules}).prefix(
        torch.randn(3, 3, 64, 64)
    )

    assert "batch norm in train, whose answer depends on the batch" in prefix.reasons.values()


@pytest.mark.parametrize(
    "relative", [0.0, *(pytest.param(value, marks=pytest.mark.slow) for value in ROUNDING.values())]
)
@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
def test_one_changed_bit_of_what_is_stored_is_found(relative, monkeypatch, tmp_path):
    """In the first batch, whose rows are computed once more: the last digit of one feature."""
    if relative:
        for name in ("conv2d", "linear"):
            monkeypatch.setattr(F, name, rounded(getattr(F, name), relative))
    images = TensorDataset(torch.randn(6, 3, 64, 64), torch.zeros(6))
    live = apply_plan(create_model("test_resnet", num_classes=3), "linear_probe")
    live.cached(images, tmp_path, batch_size=4)
    (shard,) = tmp_path.rglob("*.safetensors")
    stored = safe_open(shard, "pt").__enter__().get_tensor("features").clone()
    stored[3, 7] = torch.nextafter(stored[3, 7], torch.tensor(torch.inf))
    save_file({"features": stored}, shard)

    with pytest.raises(ApplyError) as caught:
        live.cached(images, tmp_path, batch_size=4)

    assert str(caught.value) == (
        "the features on disk are not those that the model gives now\n"
        "  freezeplan cache rm, then again; if it stays so, the frozen part is not deterministic"
    )


class Wrong(Rest):
    """A pass over features that gives its last digit otherwise."""

    def forward(self, features):
        return super().forward(features) * (1 + torch.finfo(torch.float32).eps)


def test_a_replay_that_is_wrong_by_the_last_digit_is_found(device_that_rounds):
    model = Net(lambda y: y)
    prefix = apply_plan(model, HEAD).prefix(torch.randn(3, 3, 16, 16))

    with pytest.raises(ApplyError, match=r"^cached features give different results, first at"):
        prove(model, Wrong(model, prefix), prefix, torch.randn(3, 3, 16, 16))


@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
def test_kernels_that_gradients_decide_are_measured(monkeypatch, tmp_path):
    """As a CPU with AVX2 has other ones for an LSTM while autograd records."""
    right = F.conv2d

    def conv2d(*args, **kwargs):
        answer = right(*args, **kwargs)
        return answer * (1 + 2**-10) if torch.is_grad_enabled() else answer

    monkeypatch.setattr(F, "conv2d", conv2d)
    torch.manual_seed(0)
    live = apply_plan(Net(lambda y: y), HEAD)

    features, _ = live.cached(TensorDataset(torch.randn(5, 3, 16, 16)), tmp_path, batch_size=5)

    assert features.difference == pytest.approx(2**-10, rel=0.1)
    assert features.repeat_difference == 0


@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
def test_gradients_without_a_fixed_order_of_sums_are_measured(monkeypatch, tmp_path):
    """Each pass of the head gives other last digits, as sums by atomic additions do on a GPU."""
    right, passes = F.linear, []

    def linear(*args, **kwargs):
        passes.append(1)
        return right(*args, **kwargs) * (1 + 2**-10 * (len(passes) % 3))

    monkeypatch.setattr(F, "linear", linear)
    torch.manual_seed(0)
    live = apply_plan(Net(lambda y: y), HEAD)

    features, _ = live.cached(TensorDataset(torch.randn(5, 3, 16, 16)), tmp_path, batch_size=5)

    assert 2**-11 < features.repeat_difference < 2**-7


def freezes_more_in_its_second_phase() -> dict:
    phases = [
        {"name": "stage 1", "until": 1, "rules": [{"stage": "..1", "frozen": True}]},
        {"name": "all but the head", "rules": [{"role": "body", "frozen": True}]},
    ]
    return {"version": 1, "phases": phases, "rules": [{"match": ".*", "lr_mult": 1.0}]}


def rounded_by_format(function, relative: float):
    """Rounds channels-last outputs in another way than others: a device has other kernels for them."""
    plain, last = rounded(function, relative), rounded(function, relative / 2)

    def patched(*args, **kwargs):
        answer = function(*args, **kwargs)
        return (last if answer.ndim == 4 and answer.stride(1) == 1 else plain)(*args, **kwargs)

    return patched


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::freezeplan.FreezePlanWarning")
@pytest.mark.parametrize("relative", [0.0, *ROUNDING.values()])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_features_of_a_phase_that_freezes_more_are_those_of_its_images(name, relative, monkeypatch, tmp_path):
    """Old features are continued where that is the same to the bit; else all are computed from images, with no error.

    Pooling sums channels-last numbers in another order, so MobileNetV3's continued features differ without any patch.
    """
    if relative:
        for function in ("conv2d", "linear"):
            monkeypatch.setattr(F, function, rounded_by_format(getattr(F, function), relative))
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    images = TensorDataset(torch.randn(6, 3, 96, 96), torch.arange(6) % 3)
    live = apply_plan(model, freezes_more_in_its_second_phase(), lr=0.1)
    first, _ = live.cached(images, tmp_path / "both", batch_size=3)
    live.step(epoch=1)

    continued, _ = live.cached(images, tmp_path / "both", batch_size=3)
    from_images, _ = live.cached(images, tmp_path / "second alone", batch_size=3)

    assert (first.computed, continued.computed, from_images.computed) == (6, 6, 6)
    assert torch.equal(continued.batch(range(6)), from_images.batch(range(6)))
