"""What a model is fed with: images, or where a part ahead of everything trained is frozen, kept features of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from freezeplan import AppliedPlan
from freezeplan.cache import FeatureDtype, Features
from freezeplan.experiment.voc import Split


@dataclass(frozen=True)
class Feed:
    """What is run, and what it gets for rows of a split."""

    module: nn.Module
    """The model, or what is left of it to run on features."""
    train: Callable[[Tensor], Tensor]
    """Rows of the training split, (N,), to what the module gets for them, on the split's device."""
    val: Callable[[Tensor], Tensor]
    """The same for the validation split."""
    kept: bool = False
    """Whether that are features."""
    computed: int = 0
    """Features that were computed and not found on disk."""
    seconds: float = 0.0
    """That this took."""


def feed(
    applied: AppliedPlan,
    data: tuple[Split, Split],
    *,
    batch_size: int,
    cache: bool,
    dtype: FeatureDtype,
    progress: Callable[[int, int], None],
) -> Feed:
    """Say what a model is trained and validated on.

    Args:
        applied: The plan on the model.
        data: Training and validation split.
        batch_size: Images a pass, while features are computed.
        cache: Whether features may be kept; they are where a part of the model can be memoised, is worth it and is no
            larger than the images.
        dtype: Of kept features.
        progress: Is told how many images of how many of a split have features.

    Raises:
        FreezePlanError: What ``AppliedPlan.cached`` raises.
    """
    pixels = [_Pixels(applied.model, split) for split in data]
    if cache:
        found = applied.prefix(pixels[0].rows(torch.arange(3) % len(pixels[0])))
        if found.stored and not found.advice:
            device = data[0].images.device
            made = [applied.cached(images, batch_size=batch_size, dtype=dtype, progress=progress) for images in pixels]
            features, module = [one for one, _ in made], made[0][1]
            train, val = (_Kept(one, device) for one in features)
            computed, seconds = sum(one.computed for one in features), sum(one.seconds for one in features)
            return Feed(module, train, val, True, computed, seconds)
    return Feed(applied.model, pixels[0].rows, pixels[1].rows)


@dataclass(frozen=True)
class _Kept:
    features: Features
    device: torch.device

    def __call__(self, rows: Tensor) -> Tensor:
        return self.features.batch(rows).to(self.device)


class _Pixels(Dataset[Tensor]):
    """A split's images as the model's weights expect them: normalised, channels-last."""

    def __init__(self, model: nn.Module, split: Split):
        config: Any = model.pretrained_cfg
        device = split.images.device
        self._images = split.images
        self._mean, self._std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Tensor:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.rows(torch.tensor([row]))[0]

    def rows(self, rows: Tensor) -> Tensor:
        images = self._images[rows.to(self._images.device)]
        return images.float().div(255).sub(self._mean).div(self._std).contiguous(memory_format=torch.channels_last)
