"""What is measured before a plan is tried: a depth profile, and relative gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from freezeplan.model.describer import describe
from freezeplan.training.gradients import Pull, fit_head, relative_gradient_norms, scored
from freezeplan.training.pixels import Pixels
from freezeplan.training.probe import Depth, Features, depth_profile, linear_head, stage_features
from freezeplan.training.settings import Settings
from freezeplan.training.voc import Split

BATCHES = 8
"""Batches of gradients, at most."""
FEWEST = 5
"""Batches of gradients, at least."""


@dataclass(frozen=True)
class Budget:
    """Seconds that may be used.

    Args:
        seconds: All of them.
        clock: Says what time it is, in seconds.

    Examples:
        >>> times = iter([0.0, 4.0])
        >>> Budget(10.0, lambda: next(times)).left
        6.0
    """

    seconds: float
    clock: Callable[[], float]
    start: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.clock())

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 where more were used."""
        return self.seconds - (self.clock() - self.start)

    def short_of(self, needed: float) -> str:
        """Say that something is skipped as it would take longer than what is left; empty where it would not.

        Examples:
            >>> times = iter([0.0, 4.0])
            >>> Budget(10.0, lambda: next(times)).short_of(7)
            'skipped, about 7 s needed and 6 s of the budget left'
        """
        left = self.left
        if needed <= left:
            return ""
        if left < 1:
            return "skipped, as the budget is used up"
        return f"skipped, about {needed:.0f} s needed and {max(0.0, left):.0f} s of the budget left"


@dataclass(frozen=True)
class Evidence:
    """What the first two rungs found out."""

    depths: tuple[Depth, ...] = ()
    """Rung (a); empty where it was skipped."""
    pulls: tuple[Pull, ...] = ()
    """Rung (b); empty where it was skipped."""
    batches: int = 0
    """Of gradients."""
    skipped: tuple[str, ...] = ()
    """A sentence for each rung that was skipped."""
    forward: float = 0.0
    """Seconds an image, without gradients; 0 where it was not measured."""
    step: float = 0.0
    """Seconds an image, forward and backward; 0 where it was not measured."""


def profile(
    model: nn.Module, images: Split, settings: Settings, budget: Budget, *, seed: int
) -> tuple[Evidence, Features | None]:
    """Rung (a): one forward pass with a probe at each stage.

    Args:
        model: As each trial starts from it. Modes are the caller's afterwards.
        images: Training images.
        settings: Of the trials.
        budget: The rung is skipped if it would take longer than what is left.
        seed: Of folds.

    Returns:
        What was found, and the features; None where the rung was skipped.
    """
    description = describe(model)
    if why := description.unknown.get("stage"):
        return Evidence(skipped=(f"depth profile and gradients: skipped, {why}",)), None
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    pixels = Pixels(model, images, normalise=settings.normalise, channels_last=settings.channels_last)
    count, size = len(pixels), settings.batch_size
    stage_features(model, description, [pixels(torch.arange(min(size, count)))])  # what is slow the first time
    begun = budget.clock()
    stage_features(model, description, [pixels(torch.arange(min(size, count)))])
    forward = (budget.clock() - begun) / min(size, count)
    if short := budget.short_of(forward * count):
        return Evidence(skipped=(f"depth profile and gradients: {short}",), forward=forward), None
    found = stage_features(model, description, (pixels(rows) for rows in torch.split(torch.arange(count), size)))
    return Evidence(depth_profile(found.stages, images.labels.cpu(), seed=seed), forward=forward), found


def with_gradients(
    evidence: Evidence, features: Features, model: nn.Module, images: Split, settings: Settings, budget: Budget, *,
    classes: int, seed: int, ahead: float,
) -> Evidence:  # fmt: skip
    """Rung (b): a few batches of gradients.

    The head is fitted on one half of the images, and gradients are of the other half: a head that knows its images by
    heart has none for them.

    Args:
        evidence: Of rung (a).
        features: Of the images.
        model: The head's values are changed.
        images: Training images.
        settings: Of the trials.
        budget: The rung is skipped if it would take longer than what is left.
        classes: How many there are.
        seed: Of the halves.
        ahead: Seconds of what comes before the plan that is made of gradients, and of its trial: without time for that
            gradients are of no use.

    Returns:
        The evidence with gradients, or with the reason why there are none.
    """
    description, size, count = describe(model), settings.batch_size, len(images.labels)
    head, need = linear_head(model, description), 4 * evidence.forward * size * FEWEST
    if head is None or features.head is None:
        skipped = "gradients: skipped, the classifier is not one linear layer, so it cannot be fitted on features"
        return replace(evidence, skipped=(skipped,))
    if short := budget.short_of(need + ahead):
        return replace(evidence, skipped=(f"gradients, and the trial of the plan that is made of them: {short}",))
    labels = images.labels.cpu()
    pixels = Pixels(model, images, normalise=settings.normalise, channels_last=settings.channels_last)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fitted, rest = order[: count // 2], order[count // 2 :]
    weight, bias = fit_head(features.head[fitted], labels[fitted], classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    parts = rest.tensor_split(max(FEWEST, len(rest) // size))[:BATCHES]
    given = [(pixels(rows), images.labels[rows.to(pixels.device)]) for rows in parts if len(rows)]
    begun = budget.clock()
    pulls = relative_gradient_norms(model, scored(model, description), given)
    step = (budget.clock() - begun) / sum(len(some) for some, _ in given)
    return replace(evidence, pulls=pulls, batches=len(given), step=step)
