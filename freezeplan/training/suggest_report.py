"""A suggestion for people: the evidence as tables and a picture, and a plan file whose comments name it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn

from freezeplan import Plan, load_plan, resolve_plan
from freezeplan.atomic import write_all
from freezeplan.errors import OutputError
from freezeplan.model.describer import describe
from freezeplan.plan.dump import dump
from freezeplan.report.terminal import print_table
from freezeplan.training.compare_report import ACCENT, OTHER, percent, print_ranking, svg
from freezeplan.training.evidence import Evidence
from freezeplan.training.probe import carries_to
from freezeplan.training.ranking import Place, as_rows, without_images
from freezeplan.training.short_trials import on_all_parts
from freezeplan.training.suggest import PROBE, Suggestion

FILES = ("suggested.yaml", "depth.svg", "suggestion.json")


def print_evidence(console: Console, evidence: Evidence) -> None:
    """Print the figures of every stage, and how far the representation carries."""
    rates = {pull.stage: pull for pull in evidence.pulls}
    depths = {depth.stage: depth for depth in evidence.depths}
    if depths or rates:
        gradients = ("relative gradient", "of the largest") if rates else ()
        rows = []
        for stage in sorted({*depths, *rates}):
            depth, pull = depths.get(stage), rates.get(stage)
            first = (str(depth.channels), percent(depth.error), percent(depth.spread)) if depth else ("", "", "")
            second = (f"{pull.norm:.2g}", f"{pull.rate:.2f}") if pull else ("",) * len(gradients)
            rows.append((str(stage), *first, *second))
        print_table(console, ("stage", "features", "probe error %", "+-", *gradients), rows)
    for sentence in (*carried(evidence), *pulled(evidence), *evidence.skipped):
        console.print(Text(sentence), soft_wrap=True)
    console.print()


def carried(evidence: Evidence) -> tuple[str, ...]:
    """Say how far the pretrained representation carries; nothing where it was not measured.

    Examples:
        >>> from freezeplan.training.probe import Depth
        >>> print(*carried(Evidence((Depth(0, 8, 0.6, 0.02, 1.0), Depth(1, 8, 0.3, 0.02, 1.0)))))
        a ridge probe is best at stage 1 of 0 to 1, with 30.0 % error; no earlier stage is within a standard error
    """
    if not evidence.depths:
        return ()
    best, first = carries_to(evidence.depths)
    early = "no earlier stage is within a standard error"
    if first.stage != best.stage:
        early = f"stage {first.stage} is already within a standard error of it, with {percent(first.error)} %"
    stages = f"{evidence.depths[0].stage} to {evidence.depths[-1].stage}"
    said = f"a ridge probe is best at stage {best.stage} of {stages}, with {percent(best.error)} % error; {early}"
    last = evidence.depths[-1]
    if last.error <= best.error + 2 * best.spread:
        return (said,)
    return said, f"the last stage, which {PROBE} reads, has lost part of it: {percent(last.error)} % error"


def pulled(evidence: Evidence) -> tuple[str, ...]:
    """Say which stage has the largest relative gradient, in a sentence; none where it was not measured."""
    if not evidence.pulls:
        return ()
    largest, least = (choose(evidence.pulls, key=lambda pull: pull.norm) for choose in (max, min))
    return (
        f"the relative gradient is largest at stage {largest.stage} and smallest at stage {least.stage}, "
        f"{least.rate:.2g} of it ({evidence.batches} batches)",
    )


def print_trials(console: Console, found: Suggestion) -> None:
    """Print which plans were dropped or skipped, the ranking of the others, and the decision."""
    for one in found.candidates:
        if one.dropped:
            console.print(Text(f"not tried: {one.name}, {one.dropped}"), soft_wrap=True)
    for sentence in (*found.tried.skipped, *on_all(found)):
        console.print(Text(sentence), soft_wrap=True)
    if found.places:
        print_ranking(console, found.places, found.decision.sentence)
    else:
        console.print(Text(found.decision.sentence), soft_wrap=True)


def on_all(found: Suggestion) -> tuple[str, ...]:
    """Say what plans that were trained with every part held out in turn have on all images, in a sentence, if any."""
    places = on_all_parts(found.tried)
    if len(places) < 2:
        return ()
    images = len(found.tried.trials[0].wrong) + sum(len(some[0].wrong) for some in found.tried.again)
    figures = ", ".join(f"{place.plan} {percent(place.val_error)} %" for place in places)
    assert places[1].behind is not None
    low, high = (100 * edge for edge in places[1].behind)
    times, second = 1 + len(found.tried.again), places[1].plan
    return (
        f"trained {times} times, with other images held out each time, {images:,} in all: {figures}; {second} is "
        f"{low:+.1f} to {high:+.1f} points behind",
    )


def to_svg(evidence: Evidence, title: str) -> bytes:
    """Draw the probe's error at each stage with its standard error, and the relative gradients, if any, below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depths, pulls = evidence.depths, evidence.pulls
    figure = Figure(figsize=(7, 5 if pulls else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, sharex=True, height_ratios=(2, 1)) if pulls else [figure.subplots()]
    stages = [depth.stage for depth in depths]
    errors = [100 * depth.error for depth in depths]
    panels[0].errorbar(stages, errors, [100 * depth.spread for depth in depths], color=ACCENT, marker="o", capsize=3)
    panels[0].set(ylabel="error of a ridge probe, %")
    if depths:
        best, _ = carries_to(depths)
        panels[0].plot([best.stage], [100 * best.error], "o", color=ACCENT, ms=11, mfc="none")
    if pulls:
        panels[1].bar([pull.stage for pull in pulls], [pull.rate for pull in pulls], color=OTHER, width=0.6)
        panels[1].set(ylabel="relative gradient\n(the largest is 1)", ylim=(0, 1.05))
    panels[-1].set_xlabel("stage, from the stem on")
    panels[-1].set_xticks(stages)
    for axes in panels:
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    return svg(figure, "suggest")


def plan_text(found: Suggestion, model: nn.Module, facts: Mapping[str, str]) -> str:
    """Return the suggested plan as a file, whose comments say which evidence stands behind each line.

    Args:
        found: The suggestion.
        model: With its new head; it may be on the meta device.
        facts: What stands at the head of the file, by name.

    Returns:
        YAML that ``load_plan`` reads; the plan's rules are those of the preset, or Auto-RGN's.
    """
    plan = found.plan.model_copy(update={"name": "suggested", "description": _described(found)})
    behind = [
        *(f"{name}: {value}" for name, value in facts.items()),
        found.decision.sentence, *carried(found.evidence), *pulled(found.evidence),
        *(_place(place) for place in found.places),
        *(f"not tried: {one.name}, {one.dropped}" for one in found.candidates if one.dropped),
        *on_all(found), *found.tried.skipped, *found.evidence.skipped,
    ]  # fmt: skip
    notes = iter(_notes(plan, found, model))
    lines = []
    for line in dump(plan, comments=behind).splitlines():
        if line.startswith("  - "):
            lines.append(f"  # {next(notes)}")
        elif line.startswith("default:"):
            lines.append(f"# what no rule decides; {_whole(found)}")
        elif line.startswith("layer_decay:"):
            lines.append(f"# each layer slower than the next one; {_whole(found)}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _described(found: Suggestion) -> str:
    return f"The plan {found.decision.plan}, suggested {'by short trials' if found.places else 'without a trial'}."


def _place(place: Place) -> str:
    low, high = (percent(edge) for edge in place.interval)
    noise = ", within noise of the first" if place.within_noise else ""
    error = f"{percent(place.val_error)} % error ({low} to {high})"
    return f"trial: {place.plan}, lr {place.lr:g}: {error}, {place.seconds:.1f} s{noise}"


def _whole(found: Suggestion) -> str:
    place = next((place for place in found.places if place.plan == found.decision.plan), None)
    if place is None:
        return "no trial ran"
    rank = found.places.index(place) + 1
    return f"by the trials: {percent(place.val_error)} % error, place {rank} of {len(found.places)}"


def _notes(plan: Plan, found: Suggestion, model: nn.Module) -> Sequence[str]:
    """A comment for each rule: which stages it decides, and what was measured there."""
    resolution, description = resolve_plan(plan, model), describe(model)
    depths = {depth.stage: depth for depth in found.evidence.depths}
    pulls = {pull.stage: pull for pull in found.evidence.pulls}
    notes = []
    for number in range(1, len(plan.rules) + 1):
        decided = [row.name for row in resolution.rows if row.rule == number]
        stages = sorted({description.stages[name] for name in decided if name in description.stages})
        said = [_span(stages)] if stages else ["the head, which is new"]
        if any(name not in description.stages for name in decided) and stages:
            said = [f"{said[0]} and the head"]
        if stages and stages[-1] in depths:
            said.append(f"probe error {percent(depths[stages[-1]].error)} % at stage {stages[-1]}")
        own = [pulls[stage].rate for stage in stages if stage in pulls]
        if own:
            span = f"{own[0]:.2g}" if len(own) == 1 else f"{min(own):.2g} to {max(own):.2g}"
            said.append(f"relative gradient {span} of the largest")
        notes.append("; ".join([*said, _whole(found)]))
    return notes


def _span(stages: Sequence[int]) -> str:
    if not stages:
        return ""
    return f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"


def as_data(found: Suggestion) -> Mapping[str, Any]:
    """Return a suggestion as data for JSON: evidence, candidates, trials, ranking, decision."""
    return {
        "depths": [asdict(depth) for depth in found.evidence.depths],
        "gradients": [asdict(pull) for pull in found.evidence.pulls],
        "gradient_batches": found.evidence.batches,
        "skipped": [*found.evidence.skipped, *found.tried.skipped],
        "dropped": {one.name: one.dropped for one in found.candidates if one.dropped},
        "trials": [without_images(trial) for trial in found.tried.trials],
        "again": [[without_images(trial) for trial in some] for some in found.tried.again],
        "ranking": as_rows(found.places),
        "plan": found.decision.plan,
        "lr": found.decision.lr,
        "sentence": found.decision.sentence,
    }


def write(out: Path, found: Suggestion, model: nn.Module, facts: Mapping[str, str], title: str) -> Path:
    """Write the plan, the picture and the data, all of them or none, and read the plan again.

    Args:
        out: The folder; it is made.
        found: The suggestion.
        model: With its new head, for checking the plan; it may be on the meta device.
        facts: Of the run, for comments and data.
        title: Of the picture.

    Returns:
        The plan's file.

    Raises:
        OutputError: If they cannot be written.
    """
    data = json.dumps({"facts": facts, **as_data(found)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    texts = (plan_text(found, model, facts).encode(), to_svg(found.evidence, title), data.encode())
    try:
        write_all(out, dict(zip(FILES, texts, strict=True)))
    except OSError as error:
        raise OutputError(f"the suggestion cannot be written: {error.strerror or error}", where=str(out)) from error
    resolve_plan(load_plan(out / FILES[0]), model)
    return out / FILES[0]
