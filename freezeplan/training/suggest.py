"""Which plan for some photos and a model: a depth profile, gradients, and short trials, within a budget of seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from freezeplan import Plan, load_plan, resolve_plan
from freezeplan.errors import PlanError
from freezeplan.model.describer import describe
from freezeplan.report.forecast import forecast
from freezeplan.training.compare import compare, read_trial
from freezeplan.training.gradients import Pull, auto_rgn, fit_head, relative_gradient_norms, scored
from freezeplan.training.pixels import Pixels
from freezeplan.training.probe import Depth, carries_to, depth_profile, linear_head, stage_features
from freezeplan.training.ranking import Place, Trial, rank
from freezeplan.training.trials import Comparison, Job, Photos, Watch, one_by_one
from freezeplan.training.weights import blank

RATES = (1e-3, 3e-4, 3e-3)
"""Base learning rates of the rounds of trials: all plans at the first one, then at the next."""
PROBE, FULL, OWN = "linear_probe", "full", "auto_rgn"
PRESETS = (PROBE, "surgical_last", FULL, "frozen_stages_2", OWN, "llrd")
"""Candidates, in the order of their trials: the cheap ones and what they are measured against first."""
CHEAP = (PROBE, "surgical_last")
"""Those that cost little once the features of what they freeze are there."""
BATCHES = 8
"""Batches of gradients, at most."""
FEWEST = 5
"""Batches of gradients, at least."""
ALIKE = 0.5
"""Auto-RGN's plan is dropped where no rate is below this: it would be nearly ``full``."""


@dataclass(frozen=True)
class Budget:
    """Seconds that may be used.

    Args:
        seconds: All of them.
        clock: Says what time it is, in seconds.

    Examples:
        >>> times = iter([0.0, 4.0])
        >>> Budget(10.0, lambda: next(times)).left
        6.0
    """

    seconds: float
    clock: Callable[[], float]
    start: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.clock())

    @property
    def left(self) -> float:
        """Seconds that are left; below 0 where more were used."""
        return self.seconds - (self.clock() - self.start)


@dataclass(frozen=True)
class Evidence:
    """What the first two rungs found out."""

    depths: tuple[Depth, ...] = ()
    """Rung (a); empty where it was skipped."""
    pulls: tuple[Pull, ...] = ()
    """Rung (b); empty where it was skipped."""
    batches: int = 0
    """Of gradients."""
    skipped: tuple[str, ...] = ()
    """A sentence for each rung that was skipped."""
    forward: float = 0.0
    """Seconds an image, without gradients; 0 where it was not measured."""
    step: float = 0.0
    """Seconds an image, forward and backward; 0 where it was not measured."""


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
    trials: tuple[Trial, ...]
    places: tuple[Place, ...]
    skipped: tuple[str, ...]
    """A sentence for each trial or round that was skipped, or failed."""
    decision: Decision

    @property
    def plan(self) -> Plan:
        """The plan that is suggested."""
        found = next(one.plan for one in self.candidates if one.name == self.decision.plan)
        assert found is not None
        return found


def look(model: nn.Module, photos: Photos, comparison: Comparison, budget: Budget, *, seed: int) -> Evidence:
    """Rungs (a) and (b): one forward pass with a probe at each stage, and a few batches of gradients.

    The head of (b) is fitted on one half of the training images, and gradients are of the other half: a head that
    knows its images by heart has none for them.

    Args:
        model: As each trial starts from it. The head's values are changed, and modes are the caller's afterwards.
        photos: The training images alone are read.
        comparison: Settings of the trials.
        budget: A rung that would take longer than what is left is skipped.
        seed: Of folds and halves.
    """
    settings, clock = comparison.settings, budget.clock
    description = describe(model)
    if why := description.unknown.get("stage"):
        return Evidence(skipped=(f"depth profile and gradients: skipped, {why}",))
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    pixels = Pixels(model, photos.train, normalise=settings.normalise, channels_last=settings.channels_last)
    count, size = len(pixels), settings.batch_size
    labels = photos.train.labels.cpu()
    stage_features(model, description, [pixels(torch.arange(min(size, count)))])  # what is slow the first time
    begun = clock()
    stage_features(model, description, [pixels(torch.arange(min(size, count)))])
    forward = (clock() - begun) / min(size, count)
    if forward * count > budget.left:
        return Evidence(
            skipped=(_skipped("depth profile and gradients", forward * count, budget.left),), forward=forward
        )
    found = stage_features(model, description, (pixels(rows) for rows in torch.split(torch.arange(count), size)))
    depths = depth_profile(found.stages, labels, seed=seed)
    pulls: tuple[Pull, ...] = ()
    batches, step, skipped = 0, 0.0, ""
    head, need = linear_head(model, description), 4 * forward * size * FEWEST
    if head is None or found.head is None:
        skipped = "gradients: skipped, the classifier is not one linear layer, so it cannot be fitted on features"
    elif need > budget.left:
        skipped = _skipped("gradients", need, budget.left)
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        fitted, rest = order[: count // 2], order[count // 2 :]
        weight, bias = fit_head(found.head[fitted], labels[fitted], comparison.classes)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        parts = rest.tensor_split(max(FEWEST, len(rest) // size))[:BATCHES]
        given = [(pixels(rows), photos.train.labels[rows.to(pixels.device)]) for rows in parts if len(rows)]
        begun, stages = clock(), scored(model, description)
        pulls, batches = relative_gradient_norms(model, stages, given), len(given)
        step = (clock() - begun) / sum(len(images) for images, _ in given)
    return Evidence(depths, pulls, batches, (skipped,) if skipped else (), forward, step)


def _skipped(what: str, needed: float, left: float) -> str:
    return f"{what}: skipped, about {needed:.0f} s needed and {max(0.0, left):.0f} s of the budget left"


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


def in_order(names: Sequence[str], rates: Sequence[float], seed: int) -> tuple[Job, ...]:
    """Return the trials in the order in which the budget is spent.

    Plans with a trained part so small that all rates cost little come first, at all rates; the others at the first
    rate, then at the next.

    Examples:
        >>> [(job.plan, job.lr) for job in in_order(["linear_probe", "full", "llrd"], (1, 2), seed=0)]
        [('linear_probe', 1), ('linear_probe', 2), ('full', 1), ('llrd', 1), ('full', 2), ('llrd', 2)]
    """
    cheap = [Job(name, rate, seed) for name in names if name in CHEAP for rate in rates]
    return (*cheap, *(Job(name, rate, seed) for rate in rates for name in names if name not in CHEAP))


def try_out(
    left: Mapping[str, Plan], photos: Photos, comparison: Comparison, budget: Budget, watch: Watch, *,
    folder: Path, seed: int, evidence: Evidence, rates: Sequence[float] = RATES,
) -> tuple[tuple[Trial, ...], tuple[str, ...]]:  # fmt: skip
    """Rung (c): train plans for a short time, as far as the budget goes, in the order of ``in_order``.

    A trial starts only if what it will take is left. That is estimated from the seconds of the first two rungs and
    the plan's arithmetic, later from the plan's own trials. So plans may have different numbers of rates.

    Args:
        left: Plans by name, in the order of their trials.
        photos: With images held out, which all is chosen by.
        comparison: What the trials share.
        budget: Of all three rungs together.
        watch: Is told of trials.
        folder: Keeps each trial; those that are there are not trained again and need no budget.
        seed: Of all trials.
        evidence: Seconds an image.
        rates: Base learning rates.

    Returns:
        The trials, and a sentence for each plan of which some were skipped or failed.
    """
    trials: list[Trial] = []
    said: dict[str, str] = {}
    engine = one_by_one()
    for job in in_order(list(left), rates, seed):
        if job.plan in said:
            continue
        if read_trial(folder / f"{job.name}.json") is None:
            own = [trial.seconds for trial in trials if trial.plan == job.plan]
            needed = max(own) if own else estimate(left[job.plan], photos, comparison, evidence)
            if needed > budget.left:
                what = f"trials of {job.plan} from lr {job.lr:g} on" if own else f"trials of {job.plan}"
                said[job.plan] = _skipped(what, needed, budget.left)
                continue
        done, failed = compare([job], comparison, photos, watch, folder=folder, engine=engine)
        trials += done
        if failed:
            said[job.plan] = f"trial of {job.name}: failed, {failed[job].splitlines()[0]}"
    return tuple(trials), tuple(said.values())


def estimate(plan: Plan, photos: Photos, comparison: Comparison, evidence: Evidence) -> float:
    """Return about how many seconds a trial takes, by what was measured; 0 where nothing was.

    Args:
        plan: What is trained.
        photos: How many images.
        comparison: Epochs, sizes, the model.
        evidence: Seconds an image.
    """
    train, held, settings = len(photos.train.labels), len(photos.held_out.labels), comparison.settings
    step = settings.epochs * train * (evidence.step or 3 * evidence.forward)
    evaluations = ((1 + settings.epochs) * held + train) * evidence.forward
    model = blank(comparison.model, comparison.classes)
    resolution, heads = resolve_plan(plan, model), describe(model).roles.get("head", frozenset())
    if not step or not resolution.always_frozen:
        return step + evaluations
    once = (train + held) * evidence.forward
    if {name for group in resolution.groups for name in group.tensors} <= heads and settings.cache:
        return once
    found = forecast(
        lambda: blank(comparison.model, comparison.classes), plan,
        image_size=settings.image_size, batch_size=settings.batch_size,
    )  # fmt: skip
    if found.cached_ratio is None or found.prefix.advice or not settings.cache:
        return step * found.ratio + evaluations
    behind = 1 - found.prefix.flops / max(1, found.cost.forward_flops)
    return once + step * found.cached_ratio + evaluations * behind


def decide(places: Sequence[Place]) -> Decision:
    """Choose a plan from a ranking by its bootstrap intervals.

    The first is suggested where its difference to the second is no chance. Otherwise there is no evidence, and the
    one of both that trains fewer parameters is suggested, of equal ones the one that took less time. That
    ``linear_probe`` is enough is said only where ``full`` was tried too.

    Args:
        places: What ``rank`` returned; may be empty.

    Examples:
        >>> decide([]).sentence
        'no plan was tried: linear_probe is named because it is the cheapest, without evidence'
    """
    if not places:
        sentence = f"no plan was tried: {PROBE} is named because it is the cheapest, without evidence"
        return Decision(PROBE, None, sentence)
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
    model: nn.Module, photos: Photos, comparison: Comparison, budget: Budget, watch: Watch, *, folder: Path, seed: int
) -> Suggestion:
    """Climb the three rungs and choose.

    Args:
        model: As each trial starts from it; its head is changed.
        photos: Training images, and images held out of them; ``choice`` is 0.
        comparison: What the trials share; its plans do not count.
        budget: Of all rungs.
        watch: Is told of trials.
        folder: Keeps each trial.
        seed: Of everything.

    Raises:
        FreezePlanError: If the model cannot be run on the images.
    """
    evidence = look(model, photos, comparison, budget, seed=seed)
    found = candidates(evidence, blank(comparison.model, comparison.classes))
    left = {one.name: one.plan for one in found if one.plan is not None and not one.dropped}
    shared = Comparison(left, comparison.settings, comparison.model, comparison.weights, comparison.classes)
    trials, skipped = try_out(left, photos, shared, budget, watch, folder=folder, seed=seed, evidence=evidence)
    places = rank(trials)
    return Suggestion(evidence, found, trials, places, skipped, decide(places))
