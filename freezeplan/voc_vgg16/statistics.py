"""Results over seeds, classes and images: spreads, paired differences, confusions, mistakes. Data in, data out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from freezeplan.errors import DataError

ERRORS = ("top1_error", "top5_error", "largest_error", "first_error", "any_error", "train_error")
NEUTRAL = frozenset(
    {
        "device",
        "threads",
        "workers",
        "skip_bad",
        "cache",
        "cache_dir",
        "cache_limit",
        "channels_last",
        "compile",
        "cuda_graph",
    }
)
"""Settings that change a figure's last digits at most."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    seeds: int


@dataclass(frozen=True)
class Mistake:
    """A validation image that an arm gets wrong and at least one other arm gets right."""

    file: str
    label: str
    predicted: str
    right: tuple[str, ...]
    """The arms that get it right."""


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation.

    Examples:
        >>> spread([0.25, 0.75])
        Spread(mean=0.5, deviation=0.3535533905932738, seeds=2)
        >>> spread([0.25]).deviation is None
        True
    """
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def arm_of(plan: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an arm as it stands in ``results.json``: its plan, means and deviations over its runs, the runs.

    A figure that one of the runs lacks has neither: top-5 of few classes, the precision of a class without images.
    """
    spreads = {key: _over([run[key] for run in runs]) for key in ERRORS}
    classes = {name: _over([run["average_precision"][name] for run in runs]) for name in runs[0]["average_precision"]}
    return {
        "plan": dict(plan),
        **{key: found and found.mean for key, found in spreads.items()},
        "deviation": {key: found and found.deviation for key, found in spreads.items()},
        "average_precision": {name: found and found.mean for name, found in classes.items()},
        "learned": all(run["learned"] for run in runs),
        "runs": list(runs),
    }


def _over(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def pairs(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the difference in top-1 error between any two arms, seed by seed: the later arm's minus the earlier's.

    Seeds share the head's values and the order of images, so a difference spreads less than either error. Where an arm
    did not learn there is no difference, but the ``reason``.

    Args:
        arms: What ``arm_of`` returned, by name.

    Examples:
        >>> runs = [{"seed": 0, "top1_error": 0.5}, {"seed": 1, "top1_error": 0.75}]
        >>> fewer = [{"seed": 1, "top1_error": 0.25}]
        >>> arms = {"a": {"learned": True, "runs": runs}, "b": {"learned": True, "runs": fewer}}
        >>> pairs(arms)
        [{'arm': 'b', 'base': 'a', 'seeds': [1], 'mean': -0.5, 'deviation': None, 'reason': None}]
        >>> pairs({**arms, "a": {"learned": False, "runs": runs}})[0]["reason"]
        'a did not learn'
    """
    found = []
    for base, arm in combinations(arms, 2):
        theirs, mine = ({run["seed"]: run["top1_error"] for run in arms[name]["runs"]} for name in (base, arm))
        seeds = sorted(mine.keys() & theirs.keys())
        idle = [name for name in (base, arm) if not arms[name]["learned"]]
        reason = f"{' and '.join(idle)} did not learn" if idle else None if seeds else "no seed in common"
        difference = None if reason else spread([mine[seed] - theirs[seed] for seed in seeds])
        found.append(
            {
                "arm": arm,
                "base": base,
                "seeds": seeds,
                "mean": difference and difference.mean,
                "deviation": difference and difference.deviation,
                "reason": reason,
            }
        )
    return found


def saving(runs: Sequence[Mapping[str, Any]]) -> str:
    """Say what cached features saved an arm: the frozen forward passes of all epochs but the one that computed them.

    It also says by how much they differ from those of a plain step, where they do. Empty: the arm used none.

    Examples:
        >>> saving([{"features": 100, "features_computed": 100, "features_seconds": 2.0, "features_epochs": 10}])
        'features of 100 images computed in 2.0 s and cached, which saves about 18 s of frozen layers'
    """
    computed, seconds = (sum(run[key] for run in runs) for key in ("features_computed", "features_seconds"))
    images = max(run["features"] for run in runs)
    if not images:
        return ""
    difference = max(run.get("features_difference", 0.0) for run in runs)
    notes = f"; they differ by {difference:.1e} of the largest from those of a plain step" if difference else ""
    if graphed := sum(run.get("graphed_steps", 0) for run in runs):
        notes += f"; {graphed:,} steps were launched as CUDA graphs"
    if reason := next((run["graph_reason"] for run in runs if run.get("graph_reason")), ""):
        notes += f"; no CUDA graph: {reason}"
    if not computed:
        return f"the features of all {images:,} images were there: no frozen layer was run{notes}"
    passes = sum(run["features"] * run["features_epochs"] for run in runs)
    return (
        f"features of {computed:,} images computed in {seconds:.1f} s and cached, "
        f"which saves about {max(0.0, seconds * passes / computed - seconds):.0f} s of frozen layers{notes}"
    )


def rates_too_high(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each arm that unlearns: fine-tuning that fits its training images worse than a frozen backbone.

    That is an arm whose training error and last training loss are above those of ``frozen_convs`` in every seed that
    both have, or whose training loss is not below its first one. ``scratch`` starts from nothing and is not compared.

    Examples:
        >>> def arm(error, *losses):
        ...     epochs = [{"train_loss": loss} for loss in losses]
        ...     return {"train_error": error, "runs": [{"seed": 0, "train_error": error, "epochs": epochs}]}
        >>> rates_too_high({"arms": {"frozen_convs": arm(0.02, 1.0, 0.1), "same_lr": arm(0.35, 1.5, 0.9)}})
        ["same_lr: training error 35.0 %, above frozen_convs' 2.0 %: its rate is probably too high"]
    """
    arms = results["arms"]
    frozen = {run["seed"]: run for run in arms.get("frozen_convs", {"runs": []})["runs"]}
    lines = []
    for name, found in arms.items():
        if name in ("scratch", "frozen_convs"):
            continue
        both = [(run, frozen[run["seed"]]) for run in found["runs"] if run["seed"] in frozen]
        if both and all(_fits_worse(run, other) for run, other in both):
            own, other = (100 * fmean(run["train_error"] for run in side) for side in zip(*both, strict=True))
            why = f"training error {own:.1f} %, above frozen_convs' {other:.1f} %"
        elif all(len(run["epochs"]) > 1 and not _loss(run, -1) < _loss(run, 0) for run in found["runs"]):
            why = "its training loss is not below that of its first epoch"
        else:
            continue
        lines.append(f"{name}: {why}: its rate is probably too high")
    return lines


def _fits_worse(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(run["train_error"] > other["train_error"] and not _loss(run, -1) <= _loss(other, -1))


def _loss(run: Mapping[str, Any], epoch: int) -> float:
    """The training loss of an epoch; infinite where it was not finite."""
    loss = run["epochs"][epoch]["train_loss"]
    return math.inf if loss is None else float(loss)


def confusion(results: Mapping[str, Any], arm: str) -> list[list[int]]:
    """Return how often an arm called a class (row) what (column), over all validation images and seeds."""
    count = len(results["data"]["classes"])
    matrix = [[0] * count for _ in range(count)]
    for run in results["arms"][arm]["runs"]:
        for label, guess in zip(results["val"]["labels"], run["predicted"], strict=True):
            matrix[label][guess] += 1
    return matrix


def class_errors(results: Mapping[str, Any], arm: str) -> dict[str, float | None]:
    """Return class -> fraction of its validation images that an arm calls something else, over all seeds."""
    rows = zip(results["data"]["classes"], confusion(results, arm), strict=True)
    return {name: 1 - row[index] / sum(row) if sum(row) else None for index, (name, row) in enumerate(rows)}


def mistakes(results: Mapping[str, Any], arm: str) -> list[Mistake]:
    """Return images that an arm gets wrong with its first seed and another arm right, most arms first.

    Args:
        results: What ``results.summarise`` returned.
        arm: The arm.
    """
    classes, labels = results["data"]["classes"], results["val"]["labels"]
    first = {name: found["runs"][0]["predicted"] for name, found in results["arms"].items()}
    found = [
        Mistake(
            file,
            classes[label],
            classes[first[arm][row]],
            tuple(name for name, predicted in first.items() if predicted[row] == label),
        )
        for row, (file, label) in enumerate(zip(results["val"]["files"], labels, strict=True))
        if first[arm][row] != label
    ]
    shared = [mistake for mistake in found if mistake.right]
    return sorted(shared, key=lambda mistake: -len(mistake.right))


def merge(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Put the arms and seeds of several runs into one.

    Args:
        found: Where a run is from, and its ``results.json``.

    Returns:
        What ``results.summarise`` returns, but for ``versions`` and ``asked``, which may differ; in ``origins`` the
        runs as they were, by where they are from. Settings are the first run's where they change no figure.

    Raises:
        DataError: If two of them are of other data, another model or other settings, or hold the same arm and seed.
    """
    (origin, first), *others = found
    for where, results in others:
        for key, one, two in _facts(first, results):
            if one != two:
                notes = [f"{origin} has {_short(one)}, {where} has {_short(two)}"]
                raise DataError(f"is another experiment than {origin}: its {key} differs", where=where, notes=notes)
    plans: dict[str, Any] = {}
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    origins: dict[tuple[str, int], str] = {}
    for where, results in found:
        for arm, one in results["arms"].items():
            if plans.setdefault(arm, one["plan"]) != one["plan"]:
                raise DataError(f"its arm {arm!r} has another plan than in {origin}", where=where)
            for run in one["runs"]:
                if (arm, run["seed"]) in origins:
                    earlier = origins[arm, run["seed"]]
                    notes = [f"give one of the two, or runs of other seeds: the first is in {earlier}"]
                    raise DataError(f"holds arm {arm!r} with seed {run['seed']} again", where=where, notes=notes)
                origins[arm, run["seed"]] = where
                runs.setdefault(arm, {})[run["seed"]] = run
    published: dict[str, Any] = {}
    for _, results in found:
        published |= results["published"]
    arms = {arm: arm_of(plan, [runs[arm][seed] for seed in sorted(runs[arm])]) for arm, plan in plans.items()}
    whole = {key: value for key, value in first.items() if key not in ("versions", "asked", "facts")}
    return {**whole, "published": published, "pairs": pairs(arms), "arms": arms, "origins": dict(found)}


def _facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    facts = [(key, first.get(key), second.get(key)) for key in ("data", "val", "model", "weights", "label")]
    return facts + [
        (name, value, second["settings"].get(name)) for name, value in first["settings"].items() if name not in NEUTRAL
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
