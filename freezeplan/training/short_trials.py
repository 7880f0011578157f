"""Short trials within a budget: all plans with one part of the images held out, the first two with every part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from freezeplan import Plan
from freezeplan.training.compare import compare, read_trial
from freezeplan.training.evidence import Budget
from freezeplan.training.parts import Parts
from freezeplan.training.ranking import Place, Trial, rank
from freezeplan.training.trials import Comparison, Job, Photos, Watch, one_by_one

RATES = (1e-3, 3e-4, 3e-3)
"""Base learning rates of the rounds of trials: all plans at the first one, then at the next."""
CHEAP = ("linear_probe", "surgical_last")
"""Plans that cost little once the features of what they freeze are there: the first round is theirs, at all rates."""


@dataclass(frozen=True)
class Tried:
    """The trials of a budget."""

    trials: tuple[Trial, ...] = ()
    """With the first part held out."""
    again: tuple[tuple[Trial, ...], ...] = ()
    """Of plans that were the first two at some time, with each other part held out."""
    skipped: tuple[str, ...] = ()
    """A sentence for what was skipped, or failed."""
    failed: bool = False
    """Whether a trial failed."""


def rounds(names: Sequence[str], rates: Sequence[float], seed: int) -> tuple[tuple[Job, ...], ...]:
    """Return the trials in the order in which the budget is spent.

    Cheap plans come first, at all rates; then the others at the first rate, then at the next.

    Examples:
        >>> for some in rounds(["linear_probe", "full", "llrd"], (1, 2), seed=0):
        ...     print([(job.plan, job.lr) for job in some])
        [('linear_probe', 1), ('linear_probe', 2)]
        [('full', 1), ('llrd', 1)]
        [('full', 2), ('llrd', 2)]
    """
    cheap = tuple(Job(name, rate, seed) for name in names if name in CHEAP for rate in rates)
    return (cheap, *(tuple(Job(name, rate, seed) for name in names if name not in CHEAP) for rate in rates))


def try_out(
    plans: Mapping[str, Plan], parts: Parts, comparison: Comparison, budget: Budget, watch: Watch, *,
    folder: Path, seed: int, costs: Mapping[str, float], rates: Sequence[float] = RATES,
) -> Tried:  # fmt: skip
    """Train plans for a short time, as far as the budget goes.

    After each round the first two plans, each at its best rate, are trained again with every other part of the images
    held out, so that they are compared on all of them. A trial starts only if what it will take is left, by the plan's
    own trials or by ``costs``. So plans may have different numbers of rates.

    Args:
        plans: By name, in the order of their trials.
        parts: The images.
        comparison: What the trials share.
        budget: Of all three rungs together.
        watch: Is told of trials.
        folder: Keeps each trial; those that are there are not trained again and need no budget.
        seed: Of all trials.
        costs: Plan to about how many seconds its first trial takes.
        rates: Base learning rates.
    """
    shared = replace(comparison, plans=plans)
    found: list[list[Trial]] = [[] for _ in range(len(parts))]
    engines = [one_by_one() for _ in found]
    said: dict[str, str] = {}
    lost: list[Job] = []
    not_again = ""

    def short_of(jobs: Sequence[Job], part: int) -> str:
        seconds = []
        for job in jobs:
            if read_trial(_folder(folder, part) / f"{job.name}.json") is None:
                own = [trial.seconds for some in found for trial in some if trial.plan == job.plan]
                seconds.append(max(own) if own else costs.get(job.plan, 0.0))
        return budget.short_of(sum(seconds)) if seconds else ""

    def train(job: Job, part: int, photos: Photos) -> None:
        where = _folder(folder, part)
        done, failed = compare([job], shared, photos, watch, folder=where, engine=engines[part])
        found[part] += done
        if failed:
            lost.append(job)
            said[job.plan] = f"trial of {job.name}: failed, {failed[job].splitlines()[0]}"

    first = parts.holding_out(0)
    for jobs in rounds(list(plans), rates, seed):
        for job in jobs:
            if job.plan in said:
                continue
            if short := short_of([job], 0):
                tried = any(trial.plan == job.plan for trial in found[0])
                said[job.plan] = f"trials of {job.plan}{f' from lr {job.lr:g} on' if tried else ''}: {short}"
            else:
                train(job, 0, first)
        pair, not_again = [Job(place.plan, place.lr, seed) for place in rank(found[0])[:2]], ""
        for part in range(1, len(parts)) if len(pair) == 2 else ():
            left = [job for job in pair if not any((one.plan, one.lr) == (job.plan, job.lr) for one in found[part])]
            if short := short_of(left, part):
                not_again = f"{pair[0].plan} and {pair[1].plan} with other images held out: {short}"
                break
            if left:
                photos = parts.holding_out(part)
                for job in left:
                    train(job, part, photos)
    again = tuple(tuple(some) for some in found[1:] if some)
    skipped = (*said.values(), *([not_again] if not_again else []))
    return Tried(tuple(found[0]), again, skipped, bool(lost))


def ranking(tried: Tried) -> tuple[Place, ...]:
    """Rank the plans that were tried; the first two by all images that both were measured on.

    The others are behind the first as they are on the first part alone.

    Examples:
        >>> ranking(Tried())
        ()
    """
    places, known = rank(tried.trials), on_all_parts(tried)
    pair = [place for place in known if place.plan in {leader.plan for leader in places[:2]}]
    if len(pair) < 2:
        return places
    first, second = pair
    others = rank([trial for trial in tried.trials if trial.plan != second.plan])
    return (first, second, *(place for place in others if place.plan != first.plan))


def on_all_parts(tried: Tried) -> tuple[Place, ...]:
    """Rank the plans that were trained with every part held out in turn, at one rate, by all images."""
    jobs = {(place.plan, place.lr) for place in rank(tried.trials)}
    for some in tried.again:
        jobs &= {(trial.plan, trial.lr) for trial in some}
    parts = (tried.trials, *tried.again) if tried.again else ()
    found = {job: [t for some in parts for t in some if (t.plan, t.lr) == job] for job in sorted(jobs)}
    return rank([joined(trials) for trials in found.values() if trials])


def joined(trials: Sequence[Trial]) -> Trial:
    """Return one trial in place of several of a plan, each measured on other images.

    Its errors are of all images, its seconds the mean.

    Examples:
        >>> one = Trial("full", 1e-3, 0, 0.5, 0.5, 0.0, 2.0, None, 9, False, (True, False))
        >>> joined([one, one]).val_error, joined([one, one]).wrong
        (0.5, (True, False, True, False))
    """
    wrong = tuple(image for trial in trials for image in trial.wrong)
    error = sum(wrong) / len(wrong)
    return replace(
        trials[0], choice_error=error, val_error=error, wrong=wrong,
        train_error=fmean(trial.train_error for trial in trials), seconds=fmean(trial.seconds for trial in trials),
        peak_bytes=max((trial.peak_bytes for trial in trials if trial.peak_bytes is not None), default=None),
    )  # fmt: skip


def _folder(folder: Path, part: int) -> Path:
    return folder / f"part {part + 1}" if part else folder
