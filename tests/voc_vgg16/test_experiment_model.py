from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

import freezeplan.voc_vgg16.model  # noqa: F401  # registers the two architectures
from freezeplan.errors import ModelError

SLIM, FULL = "vgg16_slim_fc256", "vgg16_fc256"


def slim(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(SLIM, num_classes=20, **kwargs).eval()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_lectures_parameter_counts():
    model = timm.create_model(FULL, num_classes=20, device="meta")
    assert count(model) == 21_142_612
    assert count(model.features) == 14_714_688
    assert count(model.pre_logits) == 6_422_784
    assert count(model.head) == 5_140


def test_convolutions_have_the_names_and_shapes_of_timms_vgg16():
    ours = timm.create_model(FULL, device="meta").features.state_dict()
    theirs = timm.create_model("vgg16", device="meta").features.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_slim_has_an_eighth_of_the_width():
    model = slim()
    assert count(model.features) == 230_568
    assert model.pre_logits.fc.weight.shape == (256, 256)
    assert [conv.out_channels for conv in model.features if isinstance(conv, nn.Conv2d)] == [
        *(8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64)
    ]


@pytest.mark.parametrize("name", [SLIM, FULL])
def test_the_configuration_names_the_architecture(name):
    model = timm.create_model(name, num_classes=7, device="meta")
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    assert cfg["architecture"] == name
    assert (cfg["first_conv"], cfg["classifier"]) == ("features.0", "head.fc")
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg["first_conv"]], nn.Conv2d)
    assert modules[cfg["classifier"]] is model.get_classifier()
    again = timm.create_model(cfg["architecture"], num_classes=7, in_chans=3, device="meta")
    assert list(again.state_dict()) == list(model.state_dict())


def test_preprocessing_follows_the_configuration():
    config = timm.data.resolve_model_data_config(slim())
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 64, 64), (0.5,) * 3, (0.25,) * 3)


def test_forward_is_head_after_features(image):
    model = slim()
    logits = model(image)
    assert logits.shape == (2, 20)
    assert torch.equal(logits, model.forward_head(model.forward_features(image)))
    hidden = model.forward_head(model.forward_features(image), pre_logits=True)
    assert hidden.shape == (2, 256)
    assert torch.equal(logits, model.get_classifier()(hidden))


def test_the_linear_layer_reads_the_map_in_nchw_order(image):
    model = slim()
    assert torch.allclose(model(image), model.to(memory_format=torch.channels_last)(image), atol=1e-5)
    pool5 = model.forward_features(image)
    assert torch.equal(model.pre_logits(pool5), model.pre_logits.fc(pool5.reshape(2, -1)).relu().reshape(2, 256, 1, 1))


@pytest.mark.skipif(not hasattr(timm.models.VGG, "forward_intermediates"), reason="an older timm's VGG has none")
def test_forward_intermediates(image):
    final, taps = slim().forward_intermediates(image)
    assert [tap.shape[-1] for tap in taps] == [64, 32, 16, 8, 4, 2]
    assert torch.equal(final, taps[-1])


def test_features_only(image):
    taps = timm.create_model(SLIM, features_only=True)(image)
    assert [tap.shape[1] for tap in taps] == [8, 16, 32, 64, 64, 64]


def test_reset_classifier(image):
    model = slim()
    model.reset_classifier(0)
    assert model(image).shape == (2, 256)
    model.reset_classifier(5)
    assert model(image).shape == (2, 5)
    assert not model.head.fc.bias.any()


@pytest.mark.parametrize("kwargs", [{}, {"norm_layer": nn.BatchNorm2d}])
def test_weights_are_he_normal_and_biases_zero(kwargs):
    model = slim(**kwargs)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.25)
            assert not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm2d):
            assert not layer.running_mean.any()
            assert (layer.running_var == 1).all()


def test_the_seed_decides_the_weights():
    first, second = slim().state_dict(), slim().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", ["context", "argument"])
def test_meta_device_allocates_nothing(how):
    if how == "context":
        with torch.device("meta"):
            model = timm.create_model(FULL, num_classes=20)
    else:
        model = timm.create_model(FULL, num_classes=20, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 20)


def test_nothing_is_left_on_the_meta_device():
    assert not any(tensor.is_meta for tensor in [*slim().parameters(), *slim().buffers()])


def test_dtype():
    assert {parameter.dtype for parameter in slim(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_deepcopy_and_state_dict(image):
    model = slim()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(image), model(image))
    other = timm.create_model(SLIM, num_classes=20).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(image), model(image))


def test_another_image_size():
    model = slim(img_size=96)
    assert model.pre_logits.fc.in_features == 64 * 3 * 3
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 20)
    assert model.pretrained_cfg["input_size"] == (3, 96, 96)
    assert slim().pretrained_cfg["input_size"] == (3, 64, 64)


def test_in_chans():
    assert slim(in_chans=1)(torch.zeros(1, 1, 64, 64)).shape == (1, 20)


def test_an_image_of_another_size_is_a_clear_error():
    with pytest.raises(ModelError, match="made for features of 64 x 2 x 2 and got 64 x 3 x 3"):
        slim()(torch.zeros(1, 3, 96, 96))
