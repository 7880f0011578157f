"""The lecture's ``vgg16.npy``: the same logits, and nothing in it is executed."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import freezeplan.experiment.model  # noqa: F401  # registers the slim VGG
from freezeplan.errors import WeightsError
from freezeplan.experiment.npy import CONNECTED, CONVOLUTIONS, MEAN, STD, read_npy
from freezeplan.experiment.weights import build
from freezeplan.zoo import create_model


def in_lecture_layout(model):
    """What the lecture's file would hold of a model of timm's."""
    state, layers = model.state_dict(), {}
    for layer, name in {**CONVOLUTIONS, **CONNECTED}.items():
        if f"{name}.weight" not in state:
            continue
        weight = state[f"{name}.weight"]
        if layer in CONVOLUTIONS:
            weight = weight.permute(2, 3, 1, 0)
            weight = weight.flip(2) if layer == "conv1_1" else weight
        elif layer == "fc6":
            weight = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
        else:
            weight = weight.flatten(1).T
        layers[layer] = [weight.contiguous().numpy(), state[f"{name}.bias"].numpy()]
    return layers


def saved(path, layers):
    np.save(path, layers, allow_pickle=True)
    return path


def test_convolutions_come_back(tmp_path):
    """Of the slim VGG, through ``--weights``; the normalisation is the file's."""
    torch.manual_seed(0)
    model = create_model("vgg16_slim_fc256", num_classes=3)
    path = saved(tmp_path / "vgg16.npy", in_lecture_layout(model))
    built = build("vgg16_slim_fc256", classes=3, image_size=64, weights=path, seed=0)
    images = torch.randn(2, 3, 64, 64)

    assert torch.equal(built.features(images), model.features(images))
    assert (built.pretrained_cfg["mean"], built.pretrained_cfg["std"]) == (MEAN, STD)


def test_the_first_layer_gets_what_the_lectures_does():
    """Pixels from 0 to 255, blue first, less the mean."""
    pixels = torch.randint(0, 256, (3, 2, 2)).float()
    mine = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = pixels.flip(0) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)

    assert torch.allclose(mine.flip(0), theirs, atol=1e-3)


@pytest.mark.slow
def test_the_logits_of_all_of_vgg16(tmp_path):
    """Its fully connected layers too, in the order of the flattened features."""
    torch.manual_seed(0)
    model = create_model("vgg16", num_classes=1000).eval()
    path = saved(tmp_path / "vgg16.npy", in_lecture_layout(model))
    other = create_model("vgg16", num_classes=1000).eval()
    other.load_state_dict(read_npy(path))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, found = model(images), other(images)

    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


WRONG = {
    "code": (
        {"conv1_1": Evil()},
        "asks for posix.system; only a dict of arrays is read, and nothing in a file is executed",
    ),
    "list": ([1, 2], "an array of int64 and shape (2,), expected a dict of layers"),
    "other": (
        {"weights": 1},
        "holds no layer of VGG16\n  layers such as 'conv1_1' and 'fc6' are looked for; found 'weights'",
    ),
    "shape": (
        {"conv1_1": [np.zeros((3, 3), np.float32), np.zeros(3, np.float32)]},
        "layer 'conv1_1' holds [(3, 3), (3,)], expected a filter of 4 axes and a bias",
    ),
    "rows": (
        {"fc6": [np.zeros((50, 4), np.float32), np.zeros(4, np.float32)]},
        "layer 'fc6' has 50 rows, expected 7 x 7 x channels",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_file_is_refused(name, tmp_path):
    """Code above all."""
    content, message = WRONG[name]
    path = saved(tmp_path / "vgg16.npy", content)
    with pytest.raises(WeightsError) as error:
        read_npy(path)

    assert str(error.value) == f"{path}: {message}"


def test_a_damaged_file_is_named(tmp_path):
    """Cut off in the middle."""
    path = saved(tmp_path / "vgg16.npy", {"conv1_1": [np.zeros((3, 3, 3, 8), np.float32), np.zeros(8, np.float32)]})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WeightsError, match=r"vgg16\.npy: cannot be read as weights"):
        read_npy(path)
