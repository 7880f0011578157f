"""Trials: a plan is trained at one rate with one seed and measured, one trial after the other.

Trials of one plan share a model and its features: what is frozen is run, and proved, once for all rates and seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from freezeplan import Plan, resolve_plan
from freezeplan.errors import FreezePlanError
from freezeplan.training.checkpoint import Checkpoint
from freezeplan.training.ranking import Trial
from freezeplan.training.settings import Settings
from freezeplan.training.shared import Shared
from freezeplan.training.train import Progress, train_arm
from freezeplan.training.voc import Split
from freezeplan.training.weights import build


@dataclass(frozen=True)
class Job:
    """One plan to be trained at one rate with one seed."""

    plan: str
    lr: float
    seed: int
    until: int | None = None
    """Epoch after which it is looked at, and perhaps stopped; None: it is trained to the end."""

    @property
    def name(self) -> str:
        """A name for a file."""
        part = "" if self.until is None else f", {self.until} epochs"
        return f"{self.plan.replace('/', '+')}, lr {self.lr:g}, seed {self.seed}{part}"


@dataclass(frozen=True)
class Photos:
    """What every trial is trained and measured on."""

    train: Split
    held_out: Split
    """Images held out of the training images, then the validation images."""
    choice: int
    """Number of the former; 0: all are both, so that what is chosen by them looks a little too good."""


@dataclass(frozen=True)
class Comparison:
    """What all trials share besides the images."""

    plans: Mapping[str, Plan]
    settings: Settings
    """Of every trial but for its rate."""
    model: str
    weights: str | None
    classes: int
    unfinished: Path | None = None
    """Folder of trials that are trained in parts; None: each is trained to the end at once."""


class Watch(Progress, Protocol):
    """Who is told how a comparison is getting on."""

    def started(self, job: Job, images: int) -> None:
        """Take note of a job that starts and of the images it will be trained on, all epochs together."""

    def finished(self, trial: Trial) -> None:
        """Take note of a job that is done."""

    def failed(self, job: Job, error: FreezePlanError) -> None:
        """Take note of a job that cannot be done."""


def train_one(job: Job, comparison: Comparison, photos: Photos, progress: Progress, shared: Shared) -> Trial:
    """Train one plan at one rate with one seed, and measure it.

    Args:
        job: Which.
        comparison: What all trials share.
        photos: The images.
        progress: Is told of steps and epochs.
        shared: What earlier trials of the plan left, and what this one leaves. The figures are the same without it.

    Raises:
        FreezePlanError: What building, applying and training raise.
    """
    settings = replace(comparison.settings, lr=job.lr)
    device = torch.device(settings.device)
    fresh = build(
        comparison.model, classes=comparison.classes, image_size=settings.image_size, weights=comparison.weights,
        seed=job.seed,
    ).to(device)  # fmt: skip
    model = shared.model_for(job.plan, fresh)
    made_earlier = sum(feed.wall_seconds for feed in shared.feeds.values())
    plan = comparison.plans[job.plan]
    trained = sum(group.elements for group in resolve_plan(plan, model).groups)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    forget_peak(device)
    try:
        run = train_arm(
            model, plan, (photos.train, photos.held_out), settings, seed=job.seed, progress=progress,
            checkpoint=_checkpoint(job, comparison), until=job.until, shared=shared,
        )  # fmt: skip
    except BaseException:
        shared.feeds = {}
        raise
    finally:
        torch.set_num_threads(threads)
    wrong = (torch.tensor(run.predicted) != photos.held_out.labels.cpu()).tolist()
    choice, val = wrong[: photos.choice], wrong[photos.choice :]
    return Trial(
        plan=job.plan,
        lr=job.lr,
        seed=job.seed,
        choice_error=sum(choice or val) / len(choice or val),
        val_error=sum(val) / len(val),
        train_error=run.train_error,
        seconds=run.seconds + made_earlier,
        peak_bytes=peak(device),
        trained=trained,
        features=run.features > 0,
        wrong=tuple(val),
        until=job.until,
    )


def _checkpoint(job: Job, comparison: Comparison) -> Checkpoint | None:
    """Where a trial that may be stopped is kept between its parts."""
    if comparison.unfinished is None:
        return None
    comparison.unfinished.mkdir(parents=True, exist_ok=True)
    whole = replace(job, until=None)
    return Checkpoint(comparison.unfinished / f"{whole.name}.checkpoint", lambda message: None)


def one_by_one() -> Engine:
    """Return an engine that trains jobs in this process; a job that cannot be done stops no other."""
    shared = Shared()

    def engine(
        jobs: Iterable[Job], comparison: Comparison, photos: Photos, watch: Watch
    ) -> Iterator[Trial | tuple[Job, FreezePlanError]]:
        for job in jobs:
            watch.started(job, len(photos.train.labels) * comparison.settings.epochs)
            try:
                trial = train_one(job, comparison, photos, watch, shared)
            except FreezePlanError as error:
                watch.failed(job, error)
                yield job, error
                continue
            watch.finished(trial)
            yield trial

    return engine


Engine = Callable[[Iterable[Job], Comparison, Photos, Watch], Iterator[Trial | tuple[Job, FreezePlanError]]]
"""Runs jobs and gives each trial, or job and error, as soon as it is done."""


def forget_peak(device: torch.device) -> None:
    """Begin to measure the largest memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def peak(device: torch.device) -> int | None:
    """Return the largest memory since ``forget_peak`` in bytes: of the GPU, or resident; None where it is not said."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024
