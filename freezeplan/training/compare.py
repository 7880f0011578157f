"""Several plans on one's own photos: each is trained at some rates with some seeds, on the same data and budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from freezeplan import Plan, Rule, load_plan, resolve_plan
from freezeplan.atomic import whole_file
from freezeplan.errors import DataError, PlanError, Problem
from freezeplan.training.photos import split_each_class
from freezeplan.training.ranking import Trial
from freezeplan.training.settings import Settings
from freezeplan.training.trials import Comparison, Engine, Job, Photos, Watch
from freezeplan.training.voc import VocData, load_split

RATES = (3e-4, 1e-3, 3e-3)
"""Base learning rates that are tried where none is given: a factor of about 3 apart, for AdamW."""
CHOICE_SHARE = 0.2
"""Part of each class's training images that is held out, for choosing the rate."""
SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def load_plans(given: Sequence[str | Path]) -> Mapping[str, Plan]:
    """Load plans to be compared.

    Args:
        given: Presets, plan files, and folders, which stand for the plan files in them.

    Returns:
        Name to plan, in the order given. A preset keeps its name, a file is called as it is without its suffix.

    Raises:
        PlanError: If a plan cannot be loaded, a folder holds none, or two plans have one name.

    Examples:
        >>> list(load_plans(["linear_probe", "full"]))
        ['linear_probe', 'full']
    """
    plans: dict[str, Plan] = {}
    for one in given:
        folder = Path(one)
        files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES) if folder.is_dir() else [one]
        if not files:
            raise PlanError("holds no plan", where=str(one), notes=[f"plans are {', '.join(SUFFIXES)} files"])
        for file in files:
            plan = load_plan(file)
            name = Path(file).stem if Path(file).suffix in SUFFIXES else str(file)
            if name in plans:
                notes = ["give the file another name"]
                raise PlanError(f"two plans would be called {name!r}", where=str(file), notes=notes)
            plans[name] = plan
    return plans


def fit_to(plans: Mapping[str, Plan], model: nn.Module) -> tuple[Mapping[str, Plan], tuple[str, ...]]:
    """Check that all plans fit a model, and let those train the head that would leave a new one frozen.

    Args:
        plans: Name to plan.
        model: With a new head; it may be on the meta device. It is not changed.

    Returns:
        The plans, and a sentence for each that was changed.

    Raises:
        PlanError: If a plan does not fit; all mistakes of all plans at once.
    """
    fitting: dict[str, Plan] = {}
    notes: list[str] = []
    problems: list[Problem] = []
    for name, plan in plans.items():
        try:
            resolution = resolve_plan(plan, model)
            heads = _head(model)
            if heads and heads <= {row.name for row in resolution.always_frozen}:
                plan = plan.model_copy(update={"rules": (Rule(role="head", lr_mult=1), *plan.rules)})
                resolve_plan(plan, model)
                notes.append(f"{name} freezes the head, which is new and knows nothing: it is trained too")
            fitting[name] = plan
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return fitting, tuple(notes)


def least_frozen_first(plans: Mapping[str, Plan], model: nn.Module) -> list[str]:
    """Return the names of plans, those first that freeze the fewest elements in all of their phases.

    So the features of a plan can be made of those of the plan before it, where that one freezes a part of what it does.

    Args:
        plans: Name to plan; all fit the model.
        model: It may be on the meta device.

    Examples:
        >>> from freezeplan.training.weights import blank
        >>> plans = load_plans(["linear_probe", "surgical_last", "full"])
        >>> least_frozen_first(plans, blank("test_resnet", 3))
        ['full', 'surgical_last', 'linear_probe']
    """
    frozen = {
        name: sum(row.elements for row in resolve_plan(plan, model).always_frozen) for name, plan in plans.items()
    }
    return sorted(plans, key=lambda name: frozen[name])


def _head(model: nn.Module) -> set[str]:
    probe = Plan.model_validate({"version": 1, "rules": [{"role": "head", "lr_mult": 1}], "default": {"frozen": True}})
    try:
        return {row.name for row in resolve_plan(probe, model).trained}
    except PlanError:
        return set()


def hold_out(data: VocData, seed: int) -> tuple[VocData, int]:
    """Hold a fifth of each class's training images out, for choosing rates.

    Args:
        data: The data; validation images are not touched.
        seed: Of the split.

    Returns:
        The data with these images put ahead of the validation images, and their number.

    Raises:
        DataError: If a class has a single training image.
    """
    train, choice = split_each_class(data.train, seed, CHOICE_SHARE)
    missing = {photo.objects[0].name for photo in train} - {photo.objects[0].name for photo in choice}
    if missing:
        raise DataError(
            f"class {min(missing)!r} has one training image, and a part of each class is held out to choose the rate",
            where=str(data.files.path),
            notes=["add images of it, or leave out such classes with --skip-bad"],
        )
    return replace(data, train=tuple(train), val=(*choice, *data.val)), len(choice)


def decode_photos(
    data: VocData,
    settings: Settings,
    *,
    seed: int,
    transform: Callable[[Any], Any],
    progress: Callable[[int, int], None],
) -> Photos:
    """Decode all images once, for all trials.

    Args:
        data: What ``read_photos`` returned.
        settings: Of every trial.
        seed: Of the images that are held out.
        transform: A PIL image to what a model gets before it is normalised, uint8, (3, S, S).
        progress: Is told how many images of a list are done.

    Raises:
        DataError: If an image does not decode and ``settings.skip_bad`` is off.
    """
    held, choice = hold_out(data, seed)
    train, rest = (
        load_split(
            held, split, image_size=settings.image_size, rule=settings.label, transform=transform,
            workers=settings.workers, skip_bad=settings.skip_bad, progress=progress,
        ).to(torch.device(settings.device))
        for split in ("train", "val")
    )  # fmt: skip
    bad = set(rest.skipped)
    return Photos(train, rest, choice - sum(photo.file in bad for photo in held.val[:choice]))


def compare(
    jobs: Sequence[Job],
    comparison: Comparison,
    photos: Photos,
    watch: Watch,
    *,
    folder: Path,
    engine: Engine,
) -> tuple[list[Trial], dict[Job, str]]:
    """Train all jobs, and keep each trial in a file as soon as it is done.

    Args:
        jobs: Plans, rates and seeds. Those whose trial is in ``folder`` already are not trained again.
        comparison: What all trials share.
        photos: The images.
        watch: Is told of everything.
        folder: Holds one JSON file a trial; it is made.
        engine: Where the jobs run.

    Returns:
        The trials in the order of ``jobs``, and for each job that could not be done its error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {job: trial for job in jobs if (trial := read_trial(folder / f"{job.name}.json")) is not None}
    failed: dict[Job, str] = {}
    for done in engine([job for job in jobs if job not in found], comparison, photos, watch):
        if isinstance(done, tuple):
            failed[done[0]] = str(done[1])
            continue
        job = Job(done.plan, done.lr, done.seed, done.until)
        found[job] = done
        with whole_file(folder / f"{job.name}.json") as temporary:
            temporary.write_text(json.dumps(asdict(done)), encoding="utf-8")
    return [found[job] for job in jobs if job in found], failed


def read_trial(path: Path) -> Trial | None:
    """Return a trial that was kept; None where there is none, or none that is whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Trial(**{**data, "wrong": tuple(data["wrong"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
