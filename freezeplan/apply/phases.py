"""Progress -> phase: a pure function of the epoch and of recorded transitions, so a resumed run is the same run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from freezeplan.errors import ApplyError, did_you_mean
from freezeplan.plan.schema import Phase, Plateau


@dataclass(frozen=True)
class Progress:
    """What is known of a training so far; nothing else decides the phase."""

    epoch: int = 0
    """The epoch that comes next, from 0."""
    ended: tuple[tuple[int, int], ...] = ()
    """(phase, epoch before which its plateau ended it)."""
    best: float | None = None
    """Best value of the metric that the current phase waits for."""
    waited: int = 0
    """Epochs since then."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "ended": [list(pair) for pair in self.ended],
            "best": self.best,
            "waited": self.waited,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """Return what ``as_dict`` wrote.

        Examples:
            >>> Progress.from_dict(Progress(epoch=3, ended=((0, 2),)).as_dict())
            Progress(epoch=3, ended=((0, 2),), best=None, waited=0)
        """
        ended = tuple((int(phase), int(epoch)) for phase, epoch in data["ended"])
        return cls(int(data["epoch"]), ended, data["best"], int(data["waited"]))


def phase_at(phases: Sequence[Phase], progress: Progress, epochs: int | None) -> int:
    """Return the index of the phase that holds in the epoch that comes next.

    Args:
        phases: The plan's phases; none counts as one without end.
        progress: The epoch and the plateaus that were reached.
        epochs: Epochs of the whole training; needed where a phase ends after a percentage of them.

    Raises:
        ApplyError: If a percentage has no number of epochs to count from.

    Examples:
        >>> phases = [Phase(name="head", until=2), Phase(name="top", until="50%"), Phase(name="all")]
        >>> [phase_at(phases, Progress(epoch), 8) for epoch in range(6)]
        [0, 0, 1, 1, 2, 2]
    """
    reached = dict(progress.ended)
    for index, phase in enumerate(phases):
        if isinstance(phase.until, Plateau):
            if index not in reached or progress.epoch < reached[index]:
                return index
        elif phase.until is None or progress.epoch < _epoch(phase, epochs):
            return index
    return 0


def _epoch(phase: Phase, epochs: int | None) -> int:
    if isinstance(phase.until, int):
        return phase.until
    if epochs is None:
        raise ApplyError(
            f"phase {phase.name!r} ends after {phase.until} of the epochs, and their number is not known",
            notes=["apply_plan(model, plan, epochs=30)"],
        )
    return math.ceil(float(str(phase.until).rstrip("%")) / 100 * epochs)


def check_epochs(phases: Sequence[Phase], epochs: int | None) -> None:
    """Refuse a number of epochs that is none, or with which a phase would end before the one ahead of it.

    Where percentages of a short training are rounded to the same epoch, the later phase is passed over.

    Raises:
        ApplyError: Saying which; and where a percentage has no number of epochs to count from.

    Examples:
        >>> check_epochs([Phase(name="head", until=5), Phase(name="top", until="10%"), Phase(name="all")], 30)
        Traceback (most recent call last):
        ...
        freezeplan.errors.ApplyError: phase 'top' ends after 10% of 30 epochs, that is 3, and the one ahead ends after 5
    """
    if epochs is not None:
        _check_whole("epochs", epochs, least=1)
    ahead = 0
    for phase in phases:
        if phase.until is None or isinstance(phase.until, Plateau):
            continue
        end = _epoch(phase, epochs)
        if end < ahead < (epochs or math.inf):
            said = f"{phase.until} of {epochs} epochs, that is {end}," if isinstance(phase.until, str) else f"{end}"
            raise ApplyError(f"phase {phase.name!r} ends after {said} and the one ahead ends after {ahead}")
        ahead = end


def _check_whole(name: str, value: object, *, least: int) -> None:
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        raise ApplyError(f"{name} is a whole number >= {least}, found {value!r}")


def advance(
    phases: Sequence[Phase], progress: Progress, epochs: int | None, epoch: int, metrics: Mapping[str, float]
) -> Progress:
    """Return the progress before an epoch, given the metrics of the one before it.

    A phase that waits for a plateau ends when its metric has had no new best value for ``patience`` epochs. Asked again
    for the same epoch it changes nothing; asked for an earlier one it forgets what came later.

    Args:
        phases: The plan's phases.
        progress: What was known before.
        epochs: Epochs of the whole training, or None.
        epoch: The epoch that comes next, from 0.
        metrics: Values measured after the epoch before it, by name.

    Raises:
        ApplyError: If the epoch is no whole number, or the current phase waits for a metric that is not given or is no
            number.

    Examples:
        >>> phases = [Phase(name="head", until={"metric": "loss", "patience": 1}), Phase(name="all")]
        >>> progress = Progress()
        >>> for epoch, loss in enumerate([0.9, 0.8, 0.8], start=1):
        ...     progress = advance(phases, progress, None, epoch, {"loss": loss})
        >>> progress.ended
        ((0, 3),)
    """
    _check_whole("epoch", epoch, least=0)
    if epoch == progress.epoch:
        return progress
    if epoch < progress.epoch:
        return Progress(epoch, tuple((phase, at) for phase, at in progress.ended if at <= epoch))
    current = phase_at(phases, progress, epochs)
    until = phases[current].until if phases else None
    if isinstance(until, Plateau):
        value = _metric(phases[current], until, metrics)
        worse = progress.best is not None and (
            value >= progress.best if until.goal == "min" else value <= progress.best
        )
        if not worse and not math.isnan(value):
            progress = replace(progress, best=value, waited=0)
        else:
            progress = replace(progress, waited=progress.waited + 1)
        if progress.waited >= until.patience:
            progress = Progress(epoch, (*progress.ended, (current, epoch)))
    moved = replace(progress, epoch=epoch)
    if phase_at(phases, moved, epochs) != current:
        moved = replace(moved, best=None, waited=0)
    return moved


def _metric(phase: Phase, until: Plateau, metrics: Mapping[str, float]) -> float:
    by_name: object = metrics
    if not isinstance(by_name, Mapping):
        raise ApplyError(f"metrics is a mapping such as {{{until.metric!r}: 0.5}}, found {metrics!r}")
    if until.metric not in metrics:
        given = f"found {', '.join(map(repr, metrics))}" if metrics else "found none"
        raise ApplyError(
            f"phase {phase.name!r} waits for the metric {until.metric!r}, {given}",
            notes=[
                *did_you_mean(until.metric, metrics),
                f"applied.step(epoch=e, metrics={{{until.metric!r}: value}}), from the second epoch on",
            ],
        )
    try:
        return float(metrics[until.metric])
    except (TypeError, ValueError):
        raise ApplyError(f"the metric {until.metric!r} is a number, found {metrics[until.metric]!r}") from None
