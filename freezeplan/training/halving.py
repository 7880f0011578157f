"""Successive halving: plans and rates that are behind after a part of the epochs are stopped.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS 2016
(arXiv 1502.07943), with the held-out error after an epoch as the loss.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from freezeplan.training.compare import compare
from freezeplan.training.ranking import Trial
from freezeplan.training.trials import Comparison, Engine, Job, Photos, Watch

UNFINISHED = "unfinished"


def looks(arms: int, epochs: int) -> tuple[int, ...]:
    """Return the epochs after which the worse half is stopped.

    Args:
        arms: Pairs of a plan and a rate.
        epochs: Of a whole training.

    Examples:
        >>> looks(12, 10), looks(2, 10), looks(12, 3), looks(1, 10)
        ((1, 2, 5), (5,), (1,), ())
    """
    most = min(arms, epochs)
    return tuple(epochs >> part for part in range(int(math.log2(most)), 0, -1)) if most > 1 else ()


def compare_by_halves(
    jobs: Sequence[Job], comparison: Comparison, photos: Photos, watch: Watch, *, folder: Path, engine: Engine
) -> tuple[list[Trial], dict[Job, str], list[Trial]]:
    """Train jobs like ``compare``, but stop the worse half of plans and rates several times.

    After each epoch of ``looks`` the better half goes on, by the mean error of its seeds on the images that are held
    out of the training images; the validation images decide nothing. Of equal ones those go on that come first.
    A job that could not be done is not tried again; the other seeds of its plan and rate count without it.

    Args:
        jobs: Each pair of plan and rate with the same seeds.
        comparison: What all trials share.
        photos: The images.
        watch: Is told of everything.
        folder: As for ``compare``; trials go on from checkpoints in it.
        engine: Where the jobs run. What runs where the checkpoints are not is trained from the start, to the same end.

    Returns:
        The trials that were trained to the end, errors by job, and the last trial of each job that was stopped.
    """
    unfinished = folder / UNFINISHED
    parts = replace(comparison, unfinished=unfinished)
    stopped: list[Trial] = []
    failed: dict[Job, str] = {}
    left = list(jobs)
    for epoch in looks(len({(job.plan, job.lr) for job in jobs}), comparison.settings.epochs):
        so_far = [replace(job, until=epoch) for job in left]
        trials, errors = compare(so_far, parts, photos, watch, folder=folder, engine=engine)
        failed |= {replace(job, until=None): error for job, error in errors.items()}
        going = _better_half(trials)
        stopped += [trial for trial in trials if (trial.plan, trial.lr) not in going]
        left = [job for job in left if job not in failed and (job.plan, job.lr) in going]
    trials, errors = compare(left, parts, photos, watch, folder=folder, engine=engine)
    shutil.rmtree(unfinished, ignore_errors=True)
    return trials, failed | errors, stopped


def _better_half(trials: Sequence[Trial]) -> set[tuple[str, float]]:
    errors: dict[tuple[str, float], list[float]] = {}
    for trial in trials:
        errors.setdefault((trial.plan, trial.lr), []).append(trial.choice_error)
    return set(sorted(errors, key=lambda arm: fmean(errors[arm]))[: math.ceil(len(errors) / 2)])


def said(trial: Trial, epochs: int) -> str:
    """Say of a trial when it was stopped.

    Examples:
        >>> said(Trial("full", 3e-3, 0, 0.5, 0.4, 0.1, 2.0, None, 9, False, (), until=2), epochs=8)
        'full, lr 0.003, seed 0: after 2 of 8 epochs, at 50.0 % error on the held-out images'
    """
    return (
        f"{trial.plan}, lr {trial.lr:g}, seed {trial.seed}: after {trial.until} of {epochs} epochs, at "
        f"{100 * trial.choice_error:.1f} % error on the held-out images"
    )
