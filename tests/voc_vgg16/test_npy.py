"""The lecture's ``vgg16.npy``: the same logits, and nothing in it is executed."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import freezeplan.voc_vgg16.model  # noqa: F401  # registers the slim VGG
from freezeplan.errors import WeightsError
from freezeplan.model.describer import create_model
from freezeplan.training.pixels import MEAN, STD
from freezeplan.voc_vgg16.command import default_settings, fixed
from freezeplan.voc_vgg16.npy import CONNECTED, CONVOLUTIONS, read_npy
from freezeplan.voc_vgg16.weights import build


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
    with torch.no_grad():  # logits as a trained one's
        model.head.fc.weight.mul_(10 / model(torch.randn(1, 3, 224, 224)).abs().max())
    path = saved(tmp_path / "vgg16.npy", in_lecture_layout(model))
    other = create_model("vgg16", num_classes=1000).eval()
    other.load_state_dict(read_npy(path))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, found = model(images), other(images)

    assert expected.abs().max() > 5
    assert (expected - found).abs().max() <= 1e-4


def old_pickle(layers):
    """As Python 2 and numpy before 2.0 wrote it, by hand: protocol 2, names and numbers as byte strings."""

    def text(content):
        return b"U" + bytes([len(content)]) + content

    def array(values):
        shape = b"".join(b"K" + bytes([side]) for side in values.shape)
        kind = b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
        state = b"(K\x03" + text(b"<") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        content = values.tobytes()
        numbers = b"T" + len(content).to_bytes(4, "little") + content
        return made + b"(K\x01(" + shape + b"t" + kind + state + b"\x89" + numbers + b"tb"

    items = b"".join(text(name) + b"](" + array(one) + array(two) + b"e" for name, (one, two) in layers.items())
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize("inside", ["array", "dict"])
def test_a_file_of_python_2_is_read(inside, tmp_path):
    """Its names and numbers are byte strings, and its functions stand in ``numpy.core``."""
    layers = {
        b"conv1_1": [np.random.rand(3, 3, 3, 8).astype(np.float32), np.random.rand(8).astype(np.float32)],
        b"fc8": [np.random.rand(6, 4).astype(np.float32), np.random.rand(4).astype(np.float32)],
    }
    content = old_pickle(layers)
    assert b"numpy.core" in content
    assert b"numpy._core" not in content
    if inside == "array":  # np.save wraps a dict in an array of one object
        head, kind = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R", b"U\x02O8"
        state = b"cnumpy\ndtype\n" + kind + b"K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2 + b"K?tb"
        content = head + b"(K\x01)" + state + b"\x89](" + content[2:-1] + b"etb."
    path = tmp_path / "vgg16.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(content)

    found = read_npy(path)

    assert list(found) == ["features.0.weight", "features.0.bias", "head.fc.weight", "head.fc.bias"]
    expected = layers[b"conv1_1"][0].transpose(3, 2, 0, 1)[:, ::-1]
    assert np.array_equal(found["features.0.weight"].numpy(), expected)
    assert np.array_equal(found["head.fc.weight"].numpy(), layers[b"fc8"][0].T)


def test_the_normalisation_of_the_file_is_said():
    """With the facts that a run prints and writes."""
    settings = default_settings("vgg16", sample=False)

    assert fixed("vgg16", "vgg16.npy", settings)["normalisation"] == (
        "RGB, 0 to 255, less 123.68, 116.779, 103.939; the file's filters, made for BGR, are turned to RGB"
    )
    assert fixed("vgg16", "vgg16.pth", replace(settings, normalise="bgr-mean"))["normalisation"] == (
        "BGR, 0 to 255, less 103.939, 116.779, 123.68"
    )


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
        "layer 'conv1_1' holds (3, 3), (3,), expected a filter of 4 axes of 3 input channels and a bias",
    ),
    "grey": (
        {"conv1_1": [np.zeros((3, 3, 1, 8), np.float32), np.zeros(8, np.float32)]},
        "layer 'conv1_1' holds (3, 3, 1, 8), (8,), expected a filter of 4 axes of 3 input channels and a bias",
    ),
    "number": ({"fc7": 5}, "layer 'fc7' holds int, expected a filter of 2 axes and a bias"),
    "none": ({"conv1_2": None}, "layer 'conv1_2' holds NoneType, expected a filter of 4 axes and a bias"),
    "nothing": ({"conv1_2": []}, "layer 'conv1_2' holds nothing, expected a filter of 4 axes and a bias"),
    "text": ({"conv1_2": "ab"}, "layer 'conv1_2' holds str, expected a filter of 4 axes and a bias"),
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
