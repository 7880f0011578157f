"""What each phase of a run is fed with, and what its features took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from freezeplan import AppliedPlan
from freezeplan.cache.memory import FeatureDtype
from freezeplan.errors import FreezePlanWarning, ModelError
from freezeplan.training.feed import Feed, feed
from freezeplan.training.pixels import Pixels
from freezeplan.training.processes import Processes
from freezeplan.training.settings import Settings
from freezeplan.training.shared import Shared


@dataclass
class Feeder:
    """Makes the feed of each phase, and adds up."""

    applied: AppliedPlan
    """The plan on the model."""
    data: tuple[Pixels, Pixels]
    """Training and validation images."""
    settings: Settings
    dtype: FeatureDtype
    """Of cached features."""
    processes: Processes
    progress: Callable[[int, int], None]
    """Is told how many images of how many of a split have features."""
    shared: Shared | None = None
    """What earlier runs left, and what this one leaves."""
    seconds: float = 0.0
    """That all feeds took."""
    computed: int = 0
    """Features that were computed and not found on disk."""
    features_seconds: float = 0.0
    """That this took."""
    epochs: int = 0
    """How many were trained on features; whoever trains counts them."""
    difference: float = 0.0
    """By how much features differ from those of a plain step, at most."""

    def feed(self) -> Feed:
        """Make the feed of the phase that holds now, with the module compiled if that is asked for.

        Raises:
            ModelError: If a batch does not fit in the device's memory.

        Warns:
            FreezePlanWarning: Where augmentation is all that stands against cached features.
        """
        begun = time.perf_counter()
        settings, title = self.settings, self.applied.plan.title
        if self.shared is not None and self.shared.feeds:
            return self.shared.feeds[""]
        devices = [torch.cuda.current_device()] if torch.device(settings.device).type == "cuda" else []
        with torch.random.fork_rng(devices=devices), explained(settings.batch_size):
            found = feed(
                self.applied, self.data, batch_size=settings.batch_size, cache=settings.cache,
                augmented=settings.augment != "none", limit=settings.cache_limit,
                directory=Path(settings.cache_dir) if settings.cache_dir else None,
                after=self.shared.after if self.shared is not None else None,
                dtype=self.dtype, progress=self.progress,
            )  # fmt: skip
        if settings.compile:
            found.module.compile()
        if found.blocked_by_augment and self.processes.first:
            warnings.warn(
                f"{title}: --augment {settings.augment} changes images ahead of what is frozen, so no features are "
                "kept and the frozen layers run in every epoch",
                FreezePlanWarning,
                stacklevel=3,
            )
        found = replace(found, wall_seconds=time.perf_counter() - begun)
        if self.shared is not None and not self.applied.plan.phases:
            self.shared.feeds[""] = found
        self.seconds += found.wall_seconds
        self.computed += found.computed
        self.features_seconds += found.seconds
        self.difference = max(self.difference, found.difference)
        return found


@contextmanager
def explained(batch_size: int) -> Iterator[None]:
    """Turn what torch says of a batch that is too large, or of a single image, into an error that says what to do.

    Raises:
        ModelError: In its place.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        notes = [f"--batch-size {max(1, batch_size // 2)}, or a smaller --image-size"]
        raise ModelError(f"a batch of {batch_size} does not fit in the device's memory", notes=notes) from error
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise ModelError("a norm layer needs more than one image a batch", notes=["--batch-size 2 or more"]) from error
