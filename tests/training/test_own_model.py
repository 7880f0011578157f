"""``compare`` and ``suggest`` take a model of one's own: a function's, whose model is timm's or holds one."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from freezeplan.cli import app
from freezeplan.errors import ModelError, WeightsError
from freezeplan.training.compare_command import compare_plans, eval_transform
from freezeplan.training.suggest_command import suggest_plan
from freezeplan.training.weights import blank, build, default_image_size

GIVEN = {"image_size": 32, "epochs": 2, "batch_size": 8, "threads": 1}
SOURCE = """
import timm, torch
from torch import nn

class Host(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = timm.create_model("test_resnet", features_only=True)
        self.neck = nn.Conv2d(96, 16, 1)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.classifier((self.neck(self.backbone(images)[-1]) * self.scale).mean((2, 3)))

class Wrapped(nn.Module):
    def __init__(self, num_classes, name, **arguments):
        super().__init__()
        self.net = timm.create_model(name, num_classes=num_classes, **arguments)

    def forward(self, images):
        return self.net(images)

class Pair(Wrapped):
    def forward(self, images):
        return self.net(images), 1

def host(num_classes=1000): return Host(num_classes)
def whole(num_classes=1000): return timm.create_model("test_resnet", num_classes=num_classes)
def wrapped(num_classes=1000): return Wrapped(num_classes, "test_resnet")
def vit(num_classes=1000): return Wrapped(num_classes, "vit_tiny_patch16_224", img_size=48)
def pair(num_classes=1000): return Pair(num_classes, "test_resnet")
def deaf(num_classes=1000): return Host(7)
def fixed(): return Host(7)
def bare(num_classes=1000): return nn.Linear(3, num_classes)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The functions, in a module of this test's own in the working directory; return their names."""
    name = f"models_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return lambda function: f"{name}:{function}"


@pytest.fixture
def weights(tmp_path):
    """A file of weights of the whole model, and one of the model that holds it."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    save_file({f"net.{name}": tensor for name, tensor in state.items()}, tmp_path / "inside.safetensors")
    return tmp_path / "whole.safetensors", tmp_path / "inside.safetensors"


def trials(folder, photos, plans, **options):
    code = compare_plans(plans, **{**GIVEN, "data": str(photos), "out": folder, "cache_dir": folder / "c", **options})
    assert code == 0
    found = json.loads((folder / "results.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key not in ("seconds", "peak_bytes")} for trial in found]


@pytest.mark.slow
def test_a_function_that_returns_a_timm_model_gives_the_digits_of_its_name(tmp_path, photos, models, weights):
    given = {"plans": ["linear_probe", "full"], "lr": [1e-2], "weights": str(weights[0])}

    named = trials(tmp_path / "a", photos, model="test_resnet", **given)

    assert trials(tmp_path / "b", photos, model=models("whole"), **given) == named


@pytest.mark.slow
def test_a_model_that_holds_timms_is_trained_as_that_one_is(tmp_path, photos, models, weights, monkeypatch):
    """The same tensors, one level deeper; the new head has the same values where both are drawn alike."""
    given = {"plans": ["linear_probe", "surgical_last", "full"], "lr": [1e-2]}
    named = trials(tmp_path / "a", photos, model="test_resnet", weights=str(weights[0]), **given)

    one = build(models("wrapped"), classes=3, image_size=32, weights=str(weights[1]), seed=0)
    two = build("test_resnet", classes=3, image_size=32, weights=str(weights[0]), seed=0)
    assert all(torch.equal(one.net.state_dict()[name], value) for name, value in two.state_dict().items()
               if not name.startswith("fc."))  # fmt: skip
    inside = trials(tmp_path / "b", photos, model=models("wrapped"), weights=str(weights[1]), **given)
    same = ("plan", "lr", "seed", "trained", "features")
    assert [[trial[key] for key in same] for trial in inside] == [[trial[key] for key in same] for trial in named]


def test_weights_fill_all_but_the_head_and_what_is_outside(models, weights, tmp_path):
    state = build(models("host"), classes=3, image_size=32, weights=None, seed=1).state_dict()
    inside = {name: tensor + 1 for name, tensor in state.items() if name.startswith("backbone.")}
    file = tmp_path / "backbone.safetensors"
    save_file(inside, file)

    given = {"classes": 3, "image_size": 32, "weights": file}
    one, two = (build(models("host"), **given, seed=seed).state_dict() for seed in (1, 2))

    assert all(torch.equal(one[name], inside[name]) and torch.equal(two[name], inside[name]) for name in inside)
    assert torch.equal(one["classifier.weight"], state["classifier.weight"])
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])
    del inside["backbone.layer3.0.conv1.weight"]
    save_file(inside, file)
    with pytest.raises(WeightsError, match=r"the first tensor that differs is backbone\.layer3\.0\.conv1\.weight"):
        build(models("host"), **given, seed=1)


def test_size_and_normalisation_are_those_of_the_model_inside(models):
    assert default_image_size(models("host")) == default_image_size("test_resnet") == 160
    one, two = eval_transform(models("host"), 32), eval_transform("test_resnet", 32)
    from PIL import Image

    image = Image.effect_noise((50, 40), 90).convert("RGB")
    assert torch.equal(one(image), two(image))


@pytest.mark.slow
def test_suggest_finds_a_plan_for_it(tmp_path, photos, models):
    name, out = models("host"), tmp_path / "out"
    suggest_plan(**GIVEN, data=str(photos), model=name, out=out, cache_dir=tmp_path / "c", seed=0, budget=60)

    found = json.loads((out / "suggestion.json").read_text())
    assert [depth["stage"] for depth in found["depths"]] == [0, 1, 2, 3, 4]
    assert {trial["plan"] for trial in found["trials"]} >= {"linear_probe", "full"}
    checked = CliRunner().invoke(app, ["check", str(out / "suggested.yaml"), name, "--num-classes", "3"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("function", "size", "said"),
    [
        ("pair", 32, r"models_\w+:pair gives tuple for 2 images and 3 classes, expected logits of shape \(2, 3\)"),
        ("deaf", 32, r"models_\w+:deaf gives \(2, 7\) for 2 images and 3 classes, expected logits of shape \(2, 3\)"),
        ("vit", 32, r"models_\w+:vit cannot take images of 32 x 32 pixels: AssertionError: Input height \(32\)"),
        ("fixed", 32, r"models_\w+:fixed cannot be built with num_classes=3: TypeError: .*'num_classes'"),
        ("bare", 32, "Linear is not a timm model and holds none, which the training needs"),
    ],
)
def test_what_cannot_be_trained_is_refused(models, function, size, said):
    with pytest.raises(ModelError, match=said):
        build(models(function), classes=3, image_size=size, weights=None, seed=0)


def test_random_weights_are_not_promised(models):
    with pytest.raises(WeightsError, match=r"--weights random: the values of .*:host are those that"):
        build(models("host"), classes=3, image_size=32, weights="random", seed=0)
    assert build(models("vit"), classes=3, image_size=48, weights=None, seed=0).training


def test_the_command_takes_it(tmp_path, photos, models):
    typed = ["compare", "linear_probe", "--data", str(photos), "--lr", "0.01", "--epochs", "1", "--image-size", "32"]
    done = CliRunner().invoke(app, [*typed, "--model", models("host"), "--out", str(tmp_path / "out")])

    assert done.exit_code == 0, done.output
    name = models("host")
    assert f"{name}; weights: those that {name} returns" in " ".join(done.output.split())
    assert blank(name, 3).classifier.out_features == 3
