"""Trials of one plan share a model, its features and their proof, and give the figures that they give alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import pil_to_tensor

from freezeplan.cache import boundaries
from freezeplan.model.describer import create_model
from freezeplan.training.compare import fit_to, load_plans
from freezeplan.training.photos import read_photos
from freezeplan.training.settings import Settings
from freezeplan.training.shared import Shared
from freezeplan.training.trials import Comparison, Engine, Job, Photos, one_by_one, train_one
from freezeplan.training.voc import load_split

MODEL = "test_resnet"


class Silent:
    def __getattr__(self, name: str):
        return lambda *given: None


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(create_model(MODEL, num_classes=10).state_dict(), path)
    return path


def compared(jobs: list[Job], comparison: Comparison, images: Photos, engine: Engine) -> list[dict]:
    found = []
    for trial in engine(jobs, comparison, images, Silent()):
        assert not isinstance(trial, tuple), trial
        found.append({key: value for key, value in asdict(trial).items() if key not in ("seconds", "peak_bytes")})
    return found


def photos_and_settings(folder: Path, cache: Path) -> tuple[Photos, Settings]:
    data = read_photos(folder)
    train, val = (
        load_split(
            data, split, image_size=32, rule="largest", transform=lambda image: pil_to_tensor(image.resize((32, 32)))
        )
        for split in ("train", "val")
    )  # fmt: skip
    settings = Settings(epochs=2, batch_size=8, image_size=32, optimizer="adamw", cache_dir=str(cache), threads=1)
    return Photos(train, val, 0), settings


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """One entry for each proof of cached features."""
    found: list[str] = []
    real = boundaries.prove
    monkeypatch.setattr(boundaries, "prove", lambda *given: (found.append("proof"), real(*given))[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "random", "proofs"),
    [
        ("linear_probe", False, 1),
        ("surgical_last", False, 1),
        ("linear_probe", True, 2),  # each seed has a body of its own
        ("norm_and_head", False, 0),  # nothing can be cached
        ("full", False, 0),
        ("lp_ft", False, 4),  # phases
    ],
)
def test_rates_and_seeds_share_one_proof(tmp_path, photos, weights, passes, plan, random, proofs):
    images, settings = photos_and_settings(photos, tmp_path)
    plans, _ = fit_to(load_plans([plan]), create_model(MODEL, num_classes=3))
    comparison = Comparison(plans, settings, MODEL, "random" if random else str(weights), 3)
    jobs = [Job(plan, lr, seed) for seed in (0, 1) for lr in (1e-3, 1e-2)]

    together = compared(jobs, comparison, images, one_by_one())
    assert len(passes) == proofs
    alone = [compared([job], comparison, images, one_by_one())[0] for job in jobs]
    uncached = replace(comparison, settings=replace(settings, cache=False))

    assert together == alone
    assert len({trial["wrong"] for trial in together}) > 1 or plan != "full"
    if plan == "full":
        assert together == compared(jobs, uncached, images, one_by_one())


def test_a_trial_is_charged_for_what_it_shares(tmp_path, photos, weights):
    """Which rate came first says nothing about its cost."""
    images, settings = photos_and_settings(photos, tmp_path)
    plans, _ = fit_to(load_plans(["linear_probe"]), create_model(MODEL, num_classes=3))
    comparison = Comparison(plans, settings, MODEL, str(weights), 3)
    shared = Shared()

    first, second = (train_one(Job("linear_probe", lr, 0), comparison, images, Silent(), shared) for lr in (1e-3, 1e-2))

    assert shared.feeds[""].wall_seconds > 0
    assert min(first.seconds, second.seconds) >= shared.feeds[""].wall_seconds
