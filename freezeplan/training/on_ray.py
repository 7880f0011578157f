"""A comparison's jobs as Ray tasks: on this machine, or on a cluster that is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from freezeplan.errors import FreezePlanError, MissingExtraError
from freezeplan.training.ranking import Trial
from freezeplan.training.shared import Shared
from freezeplan.training.train import Epoch
from freezeplan.training.trials import Comparison, Engine, Job, Photos, Watch, train_one

RETRIES = 3
"""How often a task is run again whose worker or node died."""


class Silent:
    """A progress that nobody reads: a task runs elsewhere."""

    def batch(self, images: int, loss: Tensor) -> None:
        """Do nothing."""

    def epoch(self, epoch: Epoch) -> None:
        """Do nothing."""

    def kept(self, done: int, images: int) -> None:
        """Do nothing."""


def on_ray(address: str | None = None) -> Engine:
    """Return an engine that gives each job to Ray, as a task with one GPU or as many CPUs as it has threads.

    A task whose worker or node dies is run again, up to ``RETRIES`` times. The features of a prefix are computed once a
    node: its tasks share the folder of cached features, and a lock lets the first one compute them.

    Args:
        address: Of a cluster, as ``ray.init`` takes it; None: Ray is started on this machine, and ended afterwards.

    Raises:
        MissingExtraError: If Ray is not installed.
        FreezePlanError: If the cluster cannot be reached.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "ray") from None

    def engine(
        jobs: Iterable[Job], comparison: Comparison, photos: Photos, watch: Watch
    ) -> Iterator[Trial | tuple[Job, FreezePlanError]]:
        cuda = comparison.settings.device == "cuda"
        needs: dict[str, Any] = {"num_gpus": 1} if cuda else {"num_cpus": comparison.settings.threads}
        _begin(ray, address)
        try:
            shared = ray.put((comparison, _moved(photos, "cpu")))
            task = ray.remote(max_retries=RETRIES, **needs)(train_there)
            pending = {task.remote(job, shared): job for job in jobs}
            for job in pending.values():
                watch.started(job, len(photos.train.labels) * comparison.settings.epochs)
            while pending:
                (done, *_), _ = ray.wait(list(pending))
                job = pending.pop(done)
                try:
                    found = ray.get(done)
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    found = FreezePlanError(f"its Ray task could not be finished: {reason}")
                if isinstance(found, Trial):
                    watch.finished(found)
                    yield found
                else:
                    watch.failed(job, found)
                    yield job, found
        finally:
            if address is None:
                ray.shutdown()

    return engine


def train_there(job: Job, shared: tuple[Comparison, Photos]) -> Trial | FreezePlanError:
    """Train a job in a Ray worker; an error that names a mistake is returned, so that it arrives as it is."""
    comparison, photos = shared
    try:
        return train_one(job, comparison, _moved(photos, comparison.settings.device), Silent(), Shared())
    except FreezePlanError as error:
        return error


def _moved(photos: Photos, device: str) -> Photos:
    where = torch.device(device)
    return replace(photos, train=photos.train.to(where), held_out=photos.held_out.to(where))


def _begin(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        notes = ["without --address Ray starts on this machine; ray start --head starts a cluster"]
        raise FreezePlanError(f"Ray cannot be reached at {address!r}: {reason}", notes=notes) from None
