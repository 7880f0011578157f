"""Trials of several plans to a ranking: the rate chosen on held-out training images, the error on validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2_000
"""Bootstrap samples of the validation images."""
LEVEL = 0.95
"""Coverage of the intervals."""


@dataclass(frozen=True)
class Trial:
    """One plan, trained at one rate with one seed. Errors are fractions from 0 to 1."""

    plan: str
    lr: float
    """Base learning rate."""
    seed: int
    choice_error: float
    """Top-1 error on the images that were held out of the training images. The rate is chosen by it."""
    val_error: float
    """Top-1 error on the validation images."""
    train_error: float
    """Top-1 error on the images that were trained on."""
    seconds: float
    """Features, training and evaluation after each epoch."""
    peak_bytes: int | None
    """Largest memory: of the GPU, or resident memory of the process; None where the system does not say it."""
    trained: int
    """Parameters that are trained in any phase."""
    features: bool
    """Whether it was trained on cached features."""
    wrong: tuple[bool, ...]
    """For each validation image, whether its class was missed."""
    until: int | None = None
    """Epochs that it was trained, where it was stopped or may be; None: all of them."""


@dataclass(frozen=True)
class Place:
    """One plan in the ranking, at its best rate."""

    plan: str
    lr: float
    val_error: float
    """Mean over the seeds, as the other figures."""
    interval: tuple[float, float]
    """Of the validation error, by resampling validation images."""
    choice_error: float
    train_error: float
    seconds: float
    """Of one trial."""
    peak_bytes: int | None
    """The largest of the seeds."""
    trained: int
    features: bool
    behind: tuple[float, float] | None
    """Interval of its validation error less the first plan's, image by image; None for the first."""

    @property
    def within_noise(self) -> bool:
        """Whether the difference to the first plan may be chance: its interval contains 0."""
        return self.behind is not None and self.behind[0] <= 0 <= self.behind[1]


def rank(trials: Sequence[Trial]) -> tuple[Place, ...]:
    """Choose the best rate of each plan and sort the plans by their validation error.

    The rate is the one with the lowest mean ``choice_error``; of equal ones the lowest rate. The validation images have
    no part in this choice, so the errors in the ranking are not flattered by it.

    Args:
        trials: Of any number of plans, rates and seeds; each plan has the same seeds at each of its rates.

    Returns:
        One place a plan, the lowest validation error first; of equal ones the one that took less time.

    Examples:
        >>> one = Trial("probe", 1e-3, 0, 0.2, 0.5, 0.1, 2.0, None, 10, True, (True, False))
        >>> two = Trial("full", 1e-3, 0, 0.2, 0.0, 0.1, 9.0, None, 90, False, (False, False))
        >>> [(place.plan, place.within_noise) for place in rank([one, two])]
        [('full', False), ('probe', True)]
    """
    by_plan: dict[str, dict[float, list[Trial]]] = {}
    for trial in trials:
        by_plan.setdefault(trial.plan, {}).setdefault(trial.lr, []).append(trial)
    chosen = []
    for rates in by_plan.values():
        best = min(rates, key=lambda lr: (fmean(trial.choice_error for trial in rates[lr]), lr))
        chosen.append(rates[best])
    chosen.sort(key=lambda found: (fmean(t.val_error for t in found), fmean(t.seconds for t in found)))
    wrong = [torch.tensor([t.wrong for t in found], dtype=torch.float64).mean(0) for found in chosen]
    draws = _draws(len(wrong[0])) if wrong else torch.zeros(0)
    return tuple(
        _place(found, _interval(draws @ mine), None if mine is wrong[0] else _interval(draws @ (mine - wrong[0])))
        for found, mine in zip(chosen, wrong, strict=True)
    )


def front(places: Sequence[Place]) -> tuple[str, ...]:
    """Return the plans that no other plan beats in both error and seconds, the fastest first.

    Examples:
        >>> front(rank([]))
        ()
    """
    found: list[Place] = []
    for place in sorted(places, key=lambda place: (place.seconds, place.val_error)):
        if not found or place.val_error < found[-1].val_error:
            found.append(place)
    return tuple(place.plan for place in found)


def unlearned(places: Sequence[Place], guessing: float) -> str:
    """Say that no plan learned the training images, in a sentence; empty where one did, or none was trained.

    Args:
        places: The ranking.
        guessing: The training error of whoever always names the commonest class.
    """
    if not places or any(place.train_error < guessing for place in places):
        return ""
    whose = "the plan has" if len(places) == 1 else f"all {len(places)} plans have"
    return (
        f"nothing was learned: {whose} a training error that is no better than naming the commonest class each time "
        f"({100 * guessing:.1f} %); train for more epochs or at other rates, or look at the labels"
    )


def verdict(places: Sequence[Place], guessing: float = 1.0) -> str:
    """Say in one sentence which plan is best, or that there is no evidence and which of the best is the cheapest.

    Args:
        places: The ranking.
        guessing: The training error of whoever always names the commonest class; that a plan is best is said only
            where one is below it.

    Examples:
        >>> verdict([])
        'no plan has all of its trials'
    """
    if not places:
        return "no plan has all of its trials"
    if said := unlearned(places, guessing):
        return said
    first, *others = places
    if not others:
        return f"{first.plan} alone was trained, its best rate is {first.lr:g}"
    alike = [first, *(place for place in others if place.within_noise)]
    if len(alike) == 1:
        return f"{first.plan} is best, at lr {first.lr:g}"
    cheapest = min(alike, key=lambda place: place.seconds)
    names = ", ".join(place.plan for place in alike)
    return f"no evidence of a difference between {names}; the cheapest is {cheapest.plan}, at lr {cheapest.lr:g}"


def _place(found: Sequence[Trial], interval: tuple[float, float], behind: tuple[float, float] | None) -> Place:
    peaks = [trial.peak_bytes for trial in found if trial.peak_bytes is not None]
    return Place(
        plan=found[0].plan,
        lr=found[0].lr,
        val_error=fmean(trial.val_error for trial in found),
        interval=interval,
        choice_error=fmean(trial.choice_error for trial in found),
        train_error=fmean(trial.train_error for trial in found),
        seconds=fmean(trial.seconds for trial in found),
        peak_bytes=max(peaks, default=None),
        trained=found[0].trained,
        features=any(trial.features for trial in found),
        behind=behind,
    )


def _draws(images: int) -> Tensor:
    """Weights of the images in each bootstrap sample, (RESAMPLES, images); each row sums to 1. Always the same."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(images, (RESAMPLES, images), generator=random)
    counts = torch.zeros(RESAMPLES, images, dtype=torch.float64)
    return counts.scatter_add_(1, rows, torch.ones_like(counts)) / images


def _interval(samples: Tensor) -> tuple[float, float]:
    """The percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3)."""
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=samples.dtype)
    low, high = samples.quantile(edges).tolist()
    return low, high


def without_images(trial: Trial) -> dict[str, Any]:
    """Return a trial as data for JSON, without what it had of each image."""
    return {key: value for key, value in asdict(trial).items() if key != "wrong"}


def as_rows(places: Sequence[Place]) -> list[Mapping[str, object]]:
    """Return the ranking as data for JSON and CSV, one row a plan."""
    on_front = front(places)
    return [
        {
            "plan": place.plan, "lr": place.lr, "val_error": place.val_error, "val_error_low": place.interval[0],
            "val_error_high": place.interval[1], "train_error": place.train_error, "choice_error": place.choice_error,
            "seconds": place.seconds, "peak_bytes": place.peak_bytes, "trained": place.trained,
            "cached_features": place.features, "within_noise": place.within_noise, "front": place.plan in on_front,
        }
        for place in places
    ]  # fmt: skip
