"""Features of a plan that freezes more are made of those of a plan that freezes less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from freezeplan import apply_plan
from freezeplan.model import create_model

BATCH, IMAGES = 8, 64


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=3)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(IMAGES, 3, 32, 32, generator=generator), torch.arange(IMAGES) % 3)


def computed(model: nn.Module, plan: str, data: TensorDataset, folder: Path, **options: Any) -> tuple[Any, int]:
    """The features of a plan, and how many images went through the first convolution in whole batches."""
    seen: list[int] = []
    with apply_plan(model, plan) as applied:
        hook = model.get_submodule("conv1.0").register_forward_hook(lambda m, given, out: seen.append(len(out)))
        features, _ = applied.cached(data, folder, batch_size=BATCH, **options)
        hook.remove()
    return features, sum(size for size in seen if size == BATCH)


@pytest.mark.parametrize("keep", ["device", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_images_are_not_run_again(model: nn.Module, data: TensorDataset, tmp_path: Path, keep: str) -> None:
    shallow, first = computed(model, "surgical_last", data, tmp_path / "a", keep=keep)
    deep, second = computed(model, "linear_probe", data, tmp_path / "a", keep=keep, after=shallow.cut)
    alone, third = computed(model, "linear_probe", data, tmp_path / "b", keep=keep)

    assert (first, third) == (IMAGES, IMAGES)
    assert second <= 2 * BATCH  # the first batch: what the features have to lead to, and once more in the end
    assert deep.computed == IMAGES
    assert torch.equal(deep.batch(range(IMAGES)), alone.batch(range(IMAGES)))
    assert [file.name for file in tmp_path.glob("a/*/*.safetensors")]


@pytest.mark.slow
def test_what_does_not_lead_there_is_left_aside(model: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    """Deeper features, those of other weights, and those of other images."""
    deep, _ = computed(model, "linear_probe", data, tmp_path)
    assert computed(model, "surgical_last", data, tmp_path, after=deep.cut)[1] == IMAGES
    shallow, _ = computed(model, "surgical_last", data, tmp_path)
    with torch.no_grad():
        model.get_submodule("layer1.0.conv1").weight.mul_(1.5)
    assert computed(model, "linear_probe", data, tmp_path, after=shallow.cut)[1] >= IMAGES
    other = TensorDataset(data.tensors[0].flip(0), data.tensors[1])
    again, _ = computed(model, "surgical_last", data, tmp_path)
    features, images = computed(model, "linear_probe", other, tmp_path, after=again.cut)
    assert images >= IMAGES
    alone, _ = computed(model, "linear_probe", other, tmp_path / "b")
    assert torch.equal(features.batch(range(IMAGES)), alone.batch(range(IMAGES)))


def test_half_the_digits_lead_nowhere(model: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
    shallow, _ = computed(model, "surgical_last", data, tmp_path, dtype="float16")
    assert computed(model, "linear_probe", data, tmp_path, dtype="float16", after=shallow.cut)[1] == IMAGES
