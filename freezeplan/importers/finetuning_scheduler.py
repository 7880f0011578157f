"""A schedule of finetuning-scheduler -> a plan with a phase for each of its depths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freezeplan.errors import PlanError, did_you_mean
from freezeplan.importers.imported import Imported, refused
from freezeplan.importers.origin import SCHEDULE, check_origin
from freezeplan.plan.load import read_data
from freezeplan.plan.location import Source
from freezeplan.plan.regex import objection
from freezeplan.plan.schema import Phase, Plateau, Rate, Rule

BASE_MAX_LR = 1e-5
"""The rate of a later depth that names none: the package's own default (its ``base_max_lr``)."""

MONITOR, PATIENCE = "val_loss", 3
"""What ends a depth without ``max_transition_epoch``: the package's documented metric, and Lightning's own patience."""

_KEYS = ("params", "max_transition_epoch", "lr")
_LITERAL = re.compile(r"[\w.]+")


def read(path: Path, *, lr: float | None = None, monitor: str = MONITOR, patience: int = PATIENCE) -> Imported:
    """Return the plan that thaws what a schedule thaws, when it does, at the rates that it names.

    A name that ends in ``.weight`` or ``.bias`` is that parameter; anything else is a regular expression that, as in
    the package, must match the beginning of a parameter's name. What no depth names stays frozen. The plan is for the
    module that the schedule was written for: names keep their prefixes, such as ``model.``.

    Args:
        path: The schedule, YAML or JSON: ``{0: {params: [...], max_transition_epoch: 3}, 1: {params: [...]}}``.
        lr: The optimizer's learning rate, which depth 0 is trained at; later depths have rates of their own.
        monitor: The metric of the package's ``FTSEarlyStopping``, which ends depths without ``max_transition_epoch``.
            A smaller value is better.
        patience: Its patience: epochs without a new best value.

    Raises:
        PlanError: If the file is another tool's or a plan; depths are not 0, 1, 2, ...; a ``max_transition_epoch`` is
            no integer, or not above that of the depth before; a key or a value is one that a plan cannot say; or later
            depths need ``lr`` and it was not given.
    """
    if lr is not None:
        lr = _above_0("lr", lr, "")
    with refused("--monitor and --patience"):
        plateau = Plateau(metric=monitor, patience=patience)
    check_origin(None, path, SCHEDULE)
    data, source = read_data(path)
    check_origin(data, path, SCHEDULE)
    if not isinstance(data, dict) or set(map(str, data)) != set(map(str, range(len(data)))) or not data:
        raise PlanError("a schedule is a mapping with the depths 0, 1, 2, ... as keys", where=source.where(()))
    depths = [(key, data[key]) for key in sorted(data, key=int)]
    if len(depths) > 1 and lr is None:
        raise PlanError(
            "the depths behind the first name their rates themselves, so a plan needs the first one's",
            where=source.where((depths[1][0],)),
            notes=["--lr 1e-3: the learning rate that the optimizer is made with"],
        )
    rules = []
    for number, (key, depth) in enumerate(depths):
        patterns = _patterns(key, depth, source)
        rate = _rate(key, depth, source) / (lr or 1.0) if number else 1.0
        with refused(source.where((key,))):
            rules.append(Rule(match=patterns, lr_mult=float(f"{rate:.12g}")))
    phases: list[Phase] = []
    stopped: list[str] = []
    for number, (key, depth) in enumerate(depths[:-1]):
        later = [pattern for rule in rules[number + 1 :] for pattern in rule.match or ()]
        until = _until(key, depth, phases, source)
        if until is None:
            stopped.append(str(key))
        phases.append(Phase(name=f"depth {key}", until=until or plateau, rules=[Rule(match=later, frozen=True)]))
    if phases:
        phases.append(Phase(name=f"depth {depths[-1][0]}"))
    notes = _notes(stopped, monitor, patience)
    return Imported.of(path, notes, weight_decay="all", default=Rate(frozen=True), phases=phases, rules=rules)


def _notes(stopped: list[str], monitor: str, patience: int) -> tuple[str, ...]:
    if not stopped:
        return ()
    number = "1 depth has" if len(stopped) == 1 else f"{len(stopped)} depths have"
    return (
        f"{number} no max_transition_epoch: the package ends them by FTSEarlyStopping, here after {patience} epochs "
        f"without a new best {monitor}; set others by --monitor and --patience",
        "at the end of a depth the package goes back to its best checkpoint and keeps its best value; a plan goes on "
        "with the weights as they are, and each phase has a best value of its own",
    )


def _patterns(key: Any, depth: Any, source: Source) -> list[str]:
    if not isinstance(depth, dict) or not isinstance(depth.get("params"), list) or not depth["params"]:
        raise PlanError(f"depth {key} has a list of params", where=source.where((key,)))
    for name in depth:
        if name not in _KEYS:
            raise PlanError(
                f"{name} of depth {key} has no counterpart in a plan",
                where=source.where((key, name)),
                notes=did_you_mean(str(name), _KEYS) or ("take it out and set it in the training code",),
            )
    return [_pattern(text, source.where((key, "params", index))) for index, text in enumerate(depth["params"])]


def _pattern(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise PlanError(f"a parameter is named by text, found {text!r}", where=where)
    if _LITERAL.fullmatch(text) and text.rpartition(".")[2] in ("weight", "bias"):
        return text.replace(".", r"\.")
    reason = objection(text)
    if reason:
        raise PlanError(f"{text[:200]!r} {reason}", where=where)
    whole = "(?=)" if "$" in text or r"\Z" in text else ""  # then it is held against parameters' names only
    return f"{whole}(?:{text}).*"


def _rate(key: Any, depth: dict[str, Any], source: Source) -> float:
    return _above_0(f"lr of depth {key}", depth.get("lr", BASE_MAX_LR), source.where((key, "lr")))


def _above_0(name: str, value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise PlanError(f"{name} is a number above 0, found {value!r}", where=where)
    return number


def _until(key: Any, depth: dict[str, Any], before: Sequence[Phase], source: Source) -> int | None:
    """The epoch before which a depth ends; None where early stopping ends it."""
    value = depth.get("max_transition_epoch", -1)
    where = source.where((key, "max_transition_epoch"))
    if not isinstance(value, int) or isinstance(value, bool) or value == 0:
        found = f"found {value!r}"
        raise PlanError(f"max_transition_epoch of depth {key} is 1 or more, or -1 for none; {found}", where=where)
    if value < 0:
        return None
    earlier = [phase.until for phase in before if isinstance(phase.until, int)]
    if earlier and value <= earlier[-1]:
        raise PlanError(
            f"max_transition_epoch of depth {key} is above that of the depths before, {earlier[-1]}; found {value}",
            where=where,
        )
    return value
