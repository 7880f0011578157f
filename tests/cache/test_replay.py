"""Passes over features: the same answers and gradients as the plain pass, and what cannot be replayed is named."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import FreezePlanError, apply_plan
from freezeplan.cache import replay
from freezeplan.cache.replay_proof import prove
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

HEAD = {"version": 1, "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}


def images(size, count=3, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def made(model, plan, size=64):
    live = apply_plan(model, plan)
    prefix = live.prefix(images(size))
    return live, prefix, replay.Rest(model, prefix)


def gradients(answer, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(answer.square().sum(), trained, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def assert_same(model, prefix, rest, batch):
    """Answers in eval mode, answers and gradients in train mode, to 1e-5 of the largest number; whether bit by bit."""
    features = replay.capture(model, [prefix], batch)[0]
    model.eval()
    with torch.no_grad():
        plain, replayed = model(batch), rest(features)
    assert (plain - replayed).abs().max() <= 1e-5 * plain.abs().max()
    exact = torch.equal(plain, replayed)
    model.train()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.manual_seed(0)
    plain = model(batch)
    expected = gradients(plain, model)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    torch.manual_seed(0)
    replayed = rest(features)

    assert (plain - replayed).abs().max() <= 1e-5 * plain.abs().max()
    exact &= torch.equal(plain, replayed)
    for a, b in zip(expected, gradients(replayed, model), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-12
        exact &= torch.equal(a, b)
    return exact


QUICK = {("test_resnet", "linear_probe"), ("test_resnet", "frozen_stages_2"), ("test_vit", "surgical_last")}
CASES = [
    pytest.param(name, plan, marks=() if (name, plan) in QUICK else pytest.mark.slow)
    for name in ("test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_byobnet")
    for plan in ("linear_probe", "surgical_last", "frozen_stages_2")
]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_answers_and_gradients_are_those_of_the_plain_pass(name, plan):
    """In train and in eval mode, over more images than were watched."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5)
    size = model.pretrained_cfg["input_size"][-1]
    _, prefix, rest = made(model, plan, size)

    assert prefix.stored
    assert_same(model, prefix, rest, images(size, 5))


MODELS = [
    "botnet26t_256", "coat_tiny", "coatnet_pico_rw_224", "convit_tiny", "convnext_atto", "crossvit_tiny_240",
    "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "edgenext_xx_small", "efficientformer_l1",
    "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny",
    "ghostnet_100", "hardcorenas_a", "hgnetv2_b0", "inception_v3", "levit_128s", "maxvit_pico_rw_256",
    "mixer_s32_224", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224",
    "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvgg_a0", "resnet18", "rexnet_100",
    "swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_svt_small", "visformer_tiny",
    "vit_tiny_patch16_224", "xcit_nano_12_p16_224",
]  # fmt: skip


SIZED = {
    "botnet26t_256", "coat_tiny", "coatnet_pico_rw_224", "convit_tiny", "deit_tiny_patch16_224", "efficientformerv2_s0",
    "gcvit_xxtiny", "levit_128s", "maxvit_pico_rw_256", "mixer_s32_224", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny",
    "pit_ti_224", "swin_tiny_patch4_window7_224", "tnt_s_patch16_224", "twins_svt_small", "visformer_tiny",
    "vit_tiny_patch16_224",
}  # fmt: skip
"""They have to be told the size of their images; the others take any, but for efficientformer_l1."""


def curve(run, live, loader):
    """Loss of each step of three epochs."""
    optimizer = torch.optim.SGD(live, lr=0.01)
    losses = []
    torch.manual_seed(0)
    for _ in range(3):
        run.train()
        for given, labels in loader:
            loss = nn.functional.cross_entropy(run(given), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the features are larger than the images")
@pytest.mark.parametrize("plan", ["linear_probe", "surgical_last"])
@pytest.mark.parametrize("name", MODELS)
def test_one_model_of_each_module(name, plan, tmp_path):
    """Head only and last stage, on one model of each of more than 40 architecture modules.

    The same answers and gradients, bit by bit, and the same losses in three epochs of training. Convolutions are
    channels-last from the start, as `cached` computes features, and all images are one batch: so both sides use the
    same kernels.
    """
    torch.manual_seed(0)
    size = 224 if name == "efficientformer_l1" else 96
    model = create_model(name, num_classes=5, **({"img_size": size} if name in SIZED else {}))
    model.to(memory_format=torch.channels_last)
    live, other = (apply_plan(one, plan, lr=0.01) for one in (model, copy.deepcopy(model)))
    prefix = live.prefix(images(size, 2))
    data = TensorDataset(images(size, 4), torch.arange(4) % 5)
    features, rest = live.cached(data, tmp_path)
    exact = assert_same(model, prefix, rest, images(size, 2, seed=1))
    curves = [curve(rest, live, DataLoader(features, 4)), curve(other.model, other, DataLoader(data, 4))]

    assert not any("depends on the batch" in why for why in prefix.reasons.values())
    assert exact
    assert curves[0] == curves[1]


def test_parameters_are_the_models_own():
    """The same objects under the same names, so that optimizers, averages and checkpoints fit both."""
    model = create_model("resnet18", num_classes=5)
    live, _, rest = made(model, "surgical_last")
    rest_names = dict(rest.named_parameters())

    assert {id(p) for p in rest.parameters()} == {id(p) for p in live.trainable_parameters()}
    assert all(model.get_parameter(name) is parameter for name, parameter in rest_names.items())
    assert rest_names.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert rest.state_dict().keys() <= model.state_dict().keys()
    assert "layer4.0.bn1.running_mean" in rest.state_dict()


def test_modes_devices_and_copies_go_through():
    """``train`` and ``eval`` are the model's, ``to`` moves all of it, a deep copy is a whole of its own."""
    model = create_model("test_resnet", num_classes=3)
    _, prefix, rest = made(model, "linear_probe")
    assert rest.train() is rest
    assert model.training
    assert not model.layer1.training
    assert rest.eval() is rest
    assert not model.training

    other = copy.deepcopy(rest)
    features = replay.capture(model, [prefix], images(64))[0]
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert torch.equal(rest(features), model(images(64)))
    assert not torch.equal(other(features), rest(features))
    assert rest.to(torch.float64) is rest
    assert model.conv1[0].weight.dtype is torch.float64


@pytest.mark.slow
def test_training_on_features_trains_the_model():
    """Three epochs with momentum give the loss curve of the plain loop, and the same weights."""
    batch, labels = images(64, 8), torch.arange(8) % 3
    curves, weights = [], []
    for replayed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("resnet18", num_classes=3)
        live, prefix, rest = made(model, "surgical_last")
        given = replay.capture(model.train(), [prefix], batch)[0] if replayed else batch
        optimizer = torch.optim.SGD(live, lr=0.01, momentum=0.9)
        run = rest if replayed else model
        curves.append([])
        for _ in range(3):
            run.train()
            loss = nn.functional.cross_entropy(run(given), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
        weights.append(model.state_dict())

    assert curves[0] == curves[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_what_was_thawed_is_refused():
    """Features of what is trained now are of no use."""
    model = create_model("test_resnet", num_classes=3)
    _, prefix, rest = made(model, "linear_probe")
    features = replay.capture(model, [prefix], images(64))[0]
    model.layer4.requires_grad_(True)
    with pytest.raises(ApplyError) as error:
        rest(features)

    assert str(error.value) == (
        "what these features were computed with is trained now, so they are of no use\n"
        "  after a new phase: features, rest = applied.cached(...) again"
    )


def test_images_are_no_features():
    """What goes where is said."""
    model = create_model("test_resnet", num_classes=3)
    _, prefix, rest = made(model, "linear_probe")
    features = replay.capture(model, [prefix], images(64))[0]
    for wrong in (images(64), features[0], features[:, :-1]):
        with pytest.raises(ApplyError) as error:
            rest(wrong)

        assert str(error.value) == (
            f"features of this model have the shape (N, 96), found {tuple(wrong.shape)}\n"
            "  images go to the model itself; after a new phase: applied.cached(...) again"
        )


class Part(nn.Module):
    """A convolution whose answer a subclass wraps up."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)


class Pair(Part):
    def forward(self, x):
        y = self.conv(x)
        return {"map": y, "size": (y.shape[2], y.shape[3]), "more": [y + 1, None]}


class Count(Part):
    def forward(self, x):
        return self.conv(x), len(x)


class Integers(Part):
    def forward(self, x):
        y = self.conv(x)
        return y, (y > 0).long()


class Own(Part):
    def forward(self, x):
        return iter([self.conv(x)])


class Net(nn.Module):
    """A frozen part, something with its answer, and a head."""

    def __init__(self, part, use):
        super().__init__()
        self.part, self.head, self.use = part, nn.Linear(3, 4), use
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.use(self, self.part(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("part", "use", "stored", "reason"),
    [
        pytest.param(Pair(), lambda net, y: y["map"] * y["size"][0] + y["more"][0], {"part"}, None, id="nested"),
        pytest.param(Count(), lambda net, y: y[0] / y[1], {"part.conv"}, "it gives 2 for two images and 3 for three",
                     id="number-of-images"),
        pytest.param(Integers(), lambda net, y: y[0] * y[1], {"part.conv"},
                     "it gives int64, and only floating-point numbers are kept", id="integers"),
        pytest.param(Own(), lambda net, y: next(y), {"part.conv"}, None, id="no-tensor"),
        pytest.param(nn.Conv2d(3, 3, 1), lambda net, y: net.act(y) + y, {"part"}, None, id="changed-in-place"),
        pytest.param(nn.Conv2d(3, 3, 1), lambda net, y: net.act(y + 0), {"act"}, None, id="in-place-on-a-copy"),
        pytest.param(nn.Conv2d(3, 3, 1), lambda net, y: y.mul_(2), {"part"}, None, id="the-rest-changes-it-in-place"),
    ],
)  # fmt: skip
def test_answers_of_every_kind(part, use, stored, reason):
    """Dictionaries, tuples and constants are kept; what cannot be is run, and named."""
    torch.manual_seed(0)
    model = Net(part, use)
    live, prefix, rest = made(model, HEAD, 8)

    assert {call.module for call in prefix.stored} == stored
    assert (reason is None) == ("part" not in prefix.reasons)
    assert prefix.reasons.get("part") == reason
    features = replay.capture(model, [prefix], images(8))[0]
    before = features.clone()
    rest(features)
    assert torch.equal(features, before)
    prove(model, rest, prefix, images(8))
    assert_same(model, prefix, rest, images(8, 7))
    live.undo()


def test_a_path_that_autograd_does_not_see_is_found():
    """A frozen module that depends on trained ones through ``detach`` is named before anything is trained."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.late, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.late(self.head(x).detach()).mean((2, 3)))

    model = Hidden()
    plan = {
        "version": 1,
        "rules": [{"match": ["head", "last"], "lr_mult": 1}, {"match": ".*", "frozen": True}],
    }
    _, prefix, rest = made(model, plan, 8)
    with pytest.raises(ApplyError) as error:
        prove(model, rest, prefix, images(8))

    assert str(error.value) == (
        "cached features give different results, first at 'head'\n"
        "  this model cannot be trained on cached features; train it on images, with the same plan"
    )


def test_what_depends_on_the_batch_is_found():
    """Code of a module that looks at other images in a way that two of them do not show."""

    class Rolled(Part):
        def forward(self, x):
            y = self.conv(x)
            return y - 1e-6 * y.roll(1, 0) if len(y) > 2 else y

    model = Net(Rolled(), lambda net, y: y)
    prefix = apply_plan(model, HEAD).prefix(images(8, 2))
    with pytest.raises(ApplyError) as error:
        prove(model, replay.Rest(model, prefix), prefix, images(8))

    assert str(error.value) == (
        "part: its output for an image depends on the other images of the batch, so features cannot be cached\n"
        "  train on images with the same plan; freezeplan run --no-cache"
    )
    assert issubclass(ApplyError, FreezePlanError)


def test_what_is_not_the_same_twice_is_found():
    """A part that draws at random where two images do not show it."""

    class Noisy(Part):
        def forward(self, x):
            y = self.conv(x)
            return y + 1e-6 * torch.rand_like(y) if len(y) > 2 else y

    model = Net(Noisy(), lambda net, y: y)
    prefix = apply_plan(model, HEAD).prefix(images(8, 2))
    with pytest.raises(ApplyError) as error:
        prove(model, replay.Rest(model, prefix), prefix, images(8))

    assert str(error.value) == (
        "part: its output is not the same for the same batch twice: it is random, or its kernels are not "
        "deterministic, so features cannot be cached\n"
        "  train on images with the same plan; freezeplan run --no-cache"
    )


def test_gradients_that_no_device_gives_twice_are_not_asked_for():
    """A gradient that is drawn from a state of its own differs between two plain passes."""

    class Drawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1 + 1e-3 * torch.rand((), generator=RANDOM))

    model = create_model("test_resnet", num_classes=3)
    _, prefix, rest = made(model, "linear_probe")
    answered = model.fc.forward
    model.fc.forward = lambda x: Drawn.apply(answered(x))

    prove(model, rest, prefix, images(64))


RANDOM = torch.Generator().manual_seed(0)


def test_proving_changes_nothing():
    """Weights, buffers, gradients, modes, random state."""
    model = create_model("test_resnet", num_classes=3)
    _, prefix, rest = made(model, "surgical_last")
    model.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    prove(model, rest, prefix, images(64))

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
