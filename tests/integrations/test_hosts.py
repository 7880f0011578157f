"""Real models of other packages that contain timm models: examples/hosts.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import TensorDataset

from freezeplan import apply_plan, load_delta

ROOT = Path(__file__).parents[2]
EXAMPLE = runpy.run_path(str(ROOT / "examples/hosts.py"))
HOSTS: dict[str, Any] = EXAMPLE["HOSTS"]
PLAN = {
    "version": 1,
    "layer_decay": 0.8,
    "rules": [
        {"stage": "..1", "frozen": True},
        {"role": "norm", "mode": "eval", "optional": True},
        {"match": ".*", "lr_mult": 1},
    ],
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the packages' own


def build(name: str) -> nn.Module:
    """The model, with the same random weights each time."""
    for package in ("segmentation_models_pytorch", "open_clip", "transformers", "peft", "lightning", "scipy"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model: nn.Module = HOSTS[name].build()
    return model


def floats(answer: Any) -> list[Tensor]:
    """All floating-point tensors in what a model gives."""
    return [leaf for leaf in tree_flatten(answer)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def answers(name: str, model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the model gives for images."""
    call = HOSTS[name].call
    return floats(model(images) if call is None else call(model, images))


def images_of(name: str, count: int = 2) -> Tensor:
    """Images as they come from a loader, between 0 and 1."""
    size = HOSTS[name].size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", HOSTS)
def test_presets_fit_as_the_table_in_the_docs_says(name: str) -> None:
    model = build(name)
    expected = EXAMPLE["row"](name, model, EXAMPLE["refused"](model))
    assert expected in (ROOT / "docs/your_own_model.md").read_text().splitlines()


@pytest.mark.parametrize("name", HOSTS)
def test_trains_is_proved_saved_and_undone(name: str, tmp_path: Path) -> None:
    model = build(name)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters(remove_duplicate=False)}
    model.train()
    applied = apply_plan(model, PLAN, lr=1e-3)
    assert applied.resolution.frozen
    optimizer = torch.optim.AdamW(applied)
    applied.seal()
    before = {row.name: model.get_parameter(row.name).detach().clone() for row in applied.resolution.trained}
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(answer.square().mean() for answer in answers(name, model, images_of(name)) if answer.requires_grad)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    applied.check(optimizer)
    assert applied.verify()
    moved = [key for key, value in before.items() if not torch.equal(value, model.get_parameter(key))]
    assert moved

    applied.save_delta(tmp_path / "delta.safetensors")
    other = build(name)
    load_delta(other, tmp_path / "delta.safetensors")
    found, wanted = other.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []

    applied.undo()
    assert flags == {key: parameter.requires_grad for key, parameter in model.named_parameters(remove_duplicate=False)}


def cheap(name: str) -> bool:
    """Whether the model takes images alone, and takes them in double precision in seconds."""
    return HOSTS[name].call is None and HOSTS[name].size < 224


@pytest.mark.parametrize("name", [name for name in HOSTS if cheap(name)])
def test_features_give_what_images_give(name: str, tmp_path: Path) -> None:
    """In double precision, so that what kernels round differently is far below what a wrong pass would give."""
    model = build(name).double()
    applied = apply_plan(model, PLAN, lr=1e-3)
    images = images_of(name, 4).double()
    features, rest = applied.cached(TensorDataset(images), tmp_path, batch_size=2)
    model.eval()
    with torch.no_grad():
        plain = answers(name, model, images[:2])
        replayed = floats(rest(features.batch(range(2))))
    assert plain
    assert len(plain) == len(replayed)
    for one, two in zip(plain, replayed, strict=True):  # features are stored in single precision
        assert (one - two).abs().max() <= 1e-4 * one.abs().max()
