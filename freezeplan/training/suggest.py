"""Which plan for some photos and a model: a depth profile, gradients, and short trials, within a budget of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from freezeplan import Plan, load_plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.training.costs import costs
from freezeplan.training.evidence import Budget, Evidence, profile, with_gradients
from freezeplan.training.gradients import auto_rgn
from freezeplan.training.measures import commonest_error
from freezeplan.training.parts import Parts
from freezeplan.training.probe import carries_to
from freezeplan.training.ranking import Place, unlearned
from freezeplan.training.short_trials import CHEAP, RATES, Tried, ranking, try_out
from freezeplan.training.trials import Comparison, Watch
from freezeplan.training.weights import blank

PROBE, FULL, OWN = "linear_probe", "full", "auto_rgn"
PRESETS = (PROBE, "surgical_last", FULL, "frozen_stages_2", OWN, "llrd")
"""Candidates, in the order of their trials: the cheap ones and what they are measured against first."""
ALIKE = 0.5
"""Auto-RGN's plan is dropped where no rate is below this: it would be nearly ``full``."""


@dataclass(frozen=True)
class Candidate:
    """A plan, and whether the evidence leaves it."""

    name: str
    plan: Plan | None
    """None where there is none."""
    dropped: str
    """Why it is not tried; empty where it is."""


@dataclass(frozen=True)
class Decision:
    """What is suggested."""

    plan: str
    lr: float | None
    """Base learning rate of its best trial; None where none ran."""
    sentence: str
    """What the trials say about it."""


@dataclass(frozen=True)
class Suggestion:
    """All that the three rungs found."""

    evidence: Evidence
    candidates: tuple[Candidate, ...]
    tried: Tried
    places: tuple[Place, ...]
    decision: Decision

    @property
    def plan(self) -> Plan:
        """The plan that is suggested."""
        found = next(one.plan for one in self.candidates if one.name == self.decision.plan)
        assert found is not None
        return found


def candidates(evidence: Evidence, model: nn.Module) -> tuple[Candidate, ...]:
    """Say which plans the first two rungs leave for the trials.

    ``linear_probe`` always, as it costs nearly nothing, and ``full``, which the others are measured against.

    - The probe of the last stage that ``surgical_last`` freezes is behind that of an earlier stage by more than two
      standard errors: it is dropped, since what it freezes has lost what tells the classes apart.
    - Auto-RGN's plan is dropped where its rates are nearly alike, or none were measured.

    Gradients drop no preset: their largest was at an early stage on photos for which ``frozen_stages_2`` was best.

    Args:
        evidence: What ``look`` found.
        model: With its new head; it may be on the meta device.
    """
    found = []
    for name in PRESETS:
        dropped, plan = _why_dropped(name, evidence), None
        if name != OWN:
            plan = load_plan(name)
        elif evidence.pulls:
            plan = auto_rgn(evidence.pulls)
        if plan is not None:
            try:
                resolve_plan(plan, model)
            except PlanError as error:
                plan, dropped = None, f"it does not fit the model: {error.problems[0].message}"
        found.append(Candidate(name, plan, dropped))
    return tuple(found)


def _why_dropped(name: str, evidence: Evidence) -> str:
    if name in (PROBE, FULL):
        return ""
    if name == OWN:
        if not evidence.pulls:
            return "no gradients were measured"
        least = min(evidence.pulls, key=lambda pull: pull.rate)
        if least.rate >= ALIKE:
            return f"its rates are nearly alike, the lowest is {least.rate:.2g} (stage {least.stage})"
        return ""
    if name == "surgical_last":
        if len(evidence.depths) < 2:
            return ""
        best, _ = carries_to(evidence.depths[:-1])
        last = evidence.depths[-2]
        if last.error > best.error + 2 * best.spread:
            return (
                f"the probe at stage {last.stage}, the last that it freezes, has {100 * last.error:.1f} % error, "
                f"at stage {best.stage} {100 * best.error:.1f} %"
            )
        return ""
    return ""


def decide(places: Sequence[Place], guessing: float = 1.0) -> Decision:
    """Choose a plan from a ranking by its bootstrap intervals.

    The first is suggested where its difference to the second is no chance. Otherwise there is no evidence, and the
    one of both that trains fewer parameters is suggested, of equal ones the one that took less time. That
    ``linear_probe`` is enough is said only where ``full`` was tried too.

    Args:
        places: What ``rank`` returned; may be empty.
        guessing: The training error of whoever always names the commonest class. Where no plan is below it, the
            cheapest is named, without evidence.

    Examples:
        >>> decide([]).sentence
        'no plan was tried: linear_probe is named because it is the cheapest, without evidence'
    """
    if not places:
        sentence = f"no plan was tried: {PROBE} is named because it is the cheapest, without evidence"
        return Decision(PROBE, None, sentence)
    if said := unlearned(places, guessing):
        return Decision(PROBE, None, f"{said}; {PROBE} is named because it is the cheapest, without evidence")
    first, *others = places
    if not others:
        return Decision(first.plan, first.lr, f"{first.plan} alone was tried, so nothing is known of other plans")
    measured = any(place.plan == FULL for place in places)
    second, chosen, said = others[0], first, f"{first.plan} is best"
    if second.within_noise and second.behind is not None:
        chosen = min((first, second), key=lambda place: (place.trained, place.seconds))
        low, high = (100 * edge for edge in second.behind)
        said = f"no evidence of a difference between {first.plan} and {second.plan} ({low:+.1f} to {high:+.1f} points)"
        said += f"; {chosen.plan} is the cheaper one"
    elif first.plan == FULL:
        said = f"nothing here beats {FULL}"
    if not measured:
        said += f"; {FULL} was not tried"
    elif chosen.plan == PROBE:
        said = f"{PROBE} is enough: {said}"
    return Decision(chosen.plan, chosen.lr, said)


def suggest(
    model: nn.Module, parts: Parts, comparison: Comparison, budget: Budget, watch: Watch, *, folder: Path, seed: int
) -> Suggestion:
    """Climb the three rungs and choose.

    Args:
        model: As each trial starts from it; its head is changed.
        parts: Training images; the first part is held out of the first two rungs.
        comparison: What the trials share; its plans do not count.
        budget: Of all rungs.
        watch: Is told of trials.
        folder: Keeps each trial.
        seed: Of everything.

    Raises:
        FreezePlanError: If the model cannot be run on the images.
    """
    photos, settings = parts.holding_out(0), comparison.settings
    evidence, features = profile(model, photos.train, settings, budget, seed=seed)
    fresh = blank(comparison.model, comparison.classes)
    fitting = {one.name: one.plan for one in candidates(evidence, fresh) if one.plan is not None}
    seconds = dict(costs(fitting, photos, comparison, evidence))
    seconds[OWN] = seconds.get(FULL, 0.0)
    if features is not None:
        before = [name for name in PRESETS[: PRESETS.index(OWN) + 1] if name in seconds]
        cheap = len(RATES) + len(parts) - 1
        ahead = sum(seconds[name] * (cheap if name in CHEAP else 1) for name in before)
        evidence = with_gradients(
            evidence, features, model, photos.train, settings, budget, classes=comparison.classes, seed=seed,
            ahead=ahead,
        )  # fmt: skip
    del photos, features
    found = candidates(evidence, fresh)
    left = {one.name: one.plan for one in found if one.plan is not None and not one.dropped}
    tried = try_out(left, parts, comparison, budget, watch, folder=folder, seed=seed, costs=seconds)
    places = ranking(tried)
    return Suggestion(evidence, found, tried, places, decide(places, commonest_error(parts.images.labels)))
