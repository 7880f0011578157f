"""What a model is fed with: images, or where a part ahead of everything trained is frozen, kept features of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from freezeplan import AppliedPlan
from freezeplan.cache.boundaries import Cut
from freezeplan.cache.features import Features, Images
from freezeplan.cache.memory import FeatureDtype
from freezeplan.training.pixels import Pixels


class Give(Protocol):
    """Rows of a split to what the module gets for them."""

    def __call__(self, rows: Tensor, moves: Tensor | None = None) -> Tensor:
        """Return it for rows (N,), on the split's device; images moved, where ``moves`` are given.

        Where the rows are on that device too, nobody waits for it, unless features are larger than its memory.
        """


@dataclass(frozen=True)
class Feed:
    """What is run, and what it gets for rows of a split."""

    module: nn.Module
    """The model, or what is left of it to run on features."""
    train: Give
    """For the training split."""
    val: Give
    """For the validation split."""
    kept: bool = False
    """Whether that are features."""
    blocked_by_augment: bool = False
    """Whether they could be, were the images not augmented."""
    computed: int = 0
    """Features that were computed and not found on disk."""
    seconds: float = 0.0
    """That this took."""
    difference: float = 0.0
    """By how much the features differ from those of a plain step, relative to the largest; measured."""
    wall_seconds: float = 0.0
    """That making the feed took, with the proof and reading images."""
    cut: Cut | None = None
    """Where the passes were cut, if it keeps features."""
    on_device: bool = False
    """Whether the features of the training split are in the memory of a CUDA device."""


def feed(
    applied: AppliedPlan,
    data: tuple[Pixels, Pixels],
    *,
    batch_size: int,
    cache: bool,
    augmented: bool,
    directory: Path | None,
    limit: int | None,
    after: Cut | None = None,
    dtype: FeatureDtype,
    progress: Callable[[int, int], None],
) -> Feed:
    """Say what a model is trained and validated on, in the phase that its plan is in.

    Features are kept on a CUDA device where they fit, as ``AppliedPlan.cached`` says; images are read, hashed and
    copied as bytes.

    Args:
        applied: The plan on the model.
        data: Training and validation images.
        batch_size: Images a pass, while features are computed.
        cache: Whether features may be kept; they are where a part of the model can be cached, is worth it and is no
            larger than the images.
        augmented: Whether training images are other ones each time, of which no features can be kept.
        directory: Where features are kept; None: the user's cache folder.
        limit: Bytes that it may hold at most; None: what the disk has.
        after: See ``AppliedPlan.cached``.
        dtype: Of kept features.
        progress: Is told how many images of how many of a split have features.

    Raises:
        FreezePlanError: What ``AppliedPlan.cached`` raises.
    """
    train, val = data
    found = applied.prefix(train(torch.arange(3) % len(train))) if cache else None
    worth = found is not None and bool(found.stored) and not found.advice
    if not worth or augmented:
        return Feed(applied.model, train, val, blocked_by_augment=worth)
    made = [
        applied.cached(
            TensorDataset(split.images),
            directory,
            prepare=split.prepare,
            batch_size=batch_size,
            dtype=dtype,
            limit=limit,
            after=after,
            progress=progress,
        )
        for split in data
    ]
    features, module = [one for one, _ in made], made[0][1]
    computed, seconds = sum(one.computed for one in features), sum(one.seconds for one in features)
    kept = [_Kept(one) for one in features]
    difference = max(one.difference for one in features)
    return Feed(
        module, kept[0], kept[1], kept=True, computed=computed, seconds=seconds, difference=difference,
        cut=features[0].cut if isinstance(features[0], Features) else None,
        on_device=features[0].kept == "device" and features[0].device.type == "cuda",
    )  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    features: Features | Images

    def __call__(self, rows: Tensor, moves: Tensor | None = None) -> Tensor:
        assert moves is None, "augmented images have no features"
        return self.features.batch(rows)
