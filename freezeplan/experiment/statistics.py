"""Results over seeds, classes and images: spreads, paired differences, confusions, mistakes. Data in, data out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from freezeplan.errors import DataError
from freezeplan.experiment.results import arm_of

NEUTRAL = frozenset(
    {"device", "threads", "workers", "skip_bad", "cache", "cache_dir", "cache_limit", "channels_last", "compile"}
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


def error_spread(results: Mapping[str, Any], arm: str, key: str = "top1_error") -> Spread | None:
    """Return an error of an arm over its seeds; None where there is no such figure (top-5 of few classes)."""
    values = [run[key] for run in results["arms"][arm]["runs"]]
    return None if None in values else spread(values)


def paired(results: Mapping[str, Any], arm: str, base: str, key: str = "top1_error") -> Spread | None:
    """Return an arm's error minus that of another, seed by seed; None if they share no seed.

    Seeds share the head's values and the order of images, so the difference spreads less than either error.

    Examples:
        >>> arms = {"a": {"runs": [{"seed": 0, "e": 0.25}, {"seed": 1, "e": 0.5}]},
        ...         "b": {"runs": [{"seed": 0, "e": 0.5}, {"seed": 1, "e": 0.75}]}}
        >>> paired({"arms": arms}, "a", "b", "e")
        Spread(mean=-0.25, deviation=0.0, seeds=2)
    """
    mine, theirs = ({run["seed"]: run[key] for run in results["arms"][name]["runs"]} for name in (arm, base))
    both = [mine[seed] - theirs[seed] for seed in mine if seed in theirs and mine[seed] is not None]
    return spread(both) if both else None


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


def mistakes(results: Mapping[str, Any], arm: str, limit: int) -> list[Mistake]:
    """Return images that an arm gets wrong with its first seed and another arm right, most arms first.

    Args:
        results: What ``results.summarise`` returned.
        arm: The arm.
        limit: How many at most.
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
    return sorted(shared, key=lambda mistake: -len(mistake.right))[:limit]


def merge(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Put the arms and seeds of several runs into one.

    Args:
        found: Where a run is from, and its ``results.json``.

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
    return {**first, "published": published, "arms": arms}


def _facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    facts = [(key, first.get(key), second.get(key)) for key in ("data", "val", "model", "weights", "label")]
    return facts + [
        (name, value, second["settings"].get(name)) for name, value in first["settings"].items() if name not in NEUTRAL
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
