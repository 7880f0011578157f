"""``freezeplan suggest``: from what was typed to a commented plan file and the command that trains it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from freezeplan.errors import OutputError
from freezeplan.report import terminal
from freezeplan.training.compare_command import TRIALS, Screen, begin, cores, device_named, is_taken, print_facts
from freezeplan.training.evidence import Budget
from freezeplan.training.parts import PARTS, in_parts
from freezeplan.training.photos import read_photos, split_each_class, without_bad
from freezeplan.training.settings import Device, Settings
from freezeplan.training.short_trials import RATES
from freezeplan.training.suggest import suggest
from freezeplan.training.suggest_report import FILES, print_evidence, print_trials, write
from freezeplan.training.trials import Comparison
from freezeplan.training.voc import Photo, VocData
from freezeplan.training.weights import blank, build, check_size, default_image_size, weights_title

REQUEST = "request.json"
"""What was asked for, below ``--out``: trials are taken again only for the same."""


def suggest_plan(
    *,
    model: str,
    data: str,
    weights: str | None = None,
    data_dir: Path | None = None,
    budget: float = 120.0,
    images: int = 1000,
    epochs: int = 3,
    batch_size: int = 32,
    image_size: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    device: Device = "auto",
    threads: int | None = None,
    workers: int | None = None,
    cache_dir: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Suggest a plan for one's own photos, print its evidence, and write it to a folder.

    The validation images are never read, so that a training of the plan can be measured on them.

    Args:
        model: A timm model name, or ``package.module:function``.
        data: See ``read_photos``.
        weights: A file, ``random``, or None for timm's pretrained weights.
        data_dir: Where a data set of timm's is kept.
        budget: Seconds for all three rungs; a rung or trial that would take longer is skipped.
        images: Training images that are used at most, of each class its share.
        epochs: Of a trial.
        batch_size: Images a step, at most.
        image_size: Side in pixels; None: what the model was trained on.
        seed: Of the images, folds, heads and trials.
        out: None: ``runs/suggest-DATE-TIME``.
        resume: Take the trials that ``out`` holds; they cost no budget.
        skip_bad: Leave out images that do not decode and classes that are in one split only.
        device: ``auto`` takes CUDA where there is one.
        threads: Threads inside torch; None: one a core.
        workers: Threads that decode images; None: one a core.
        cache_dir: Where features of frozen layers are kept; None: the user's cache folder.
        clock: Seconds, for the budget.

    Returns:
        0, or 1 where no trial ran because they failed.

    Raises:
        FreezePlanError: If the data, the model or its weights are no good, or ``out`` is not free.
    """
    stdout, stderr = terminal.stdout(), terminal.stderr()
    limit = Budget(budget, clock)
    out = out or Path("runs") / time.strftime("suggest-%Y%m%d-%H%M%S")
    found = fewer(read_photos(data, seed=seed, data_dir=data_dir, skip_bad=skip_bad), images, seed)
    settings = Settings(
        epochs=epochs, batch_size=batch_size, image_size=image_size or default_image_size(model), lr=RATES[0],
        optimizer="adamw", skip_bad=skip_bad, device=device_named(device), threads=threads or cores(),
        workers=workers or cores(), cache_dir=None if cache_dir is None else str(cache_dir),
    )  # fmt: skip
    request = {
        "model": model, "weights": weights_title(model, weights), "data": found.name, "images": len(found.train),
        "image_size": settings.image_size, "epochs": epochs, "batch_size": batch_size, "seed": seed, "parts": PARTS,
    }  # fmt: skip
    _check_free(out, resume, request)
    start = build(model, classes=len(found.classes), image_size=settings.image_size, weights=weights, seed=seed)
    check_size(start, model, settings.image_size)
    start.to(torch.device(settings.device))
    comparison = Comparison({}, settings, model, weights, len(found.classes))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with Screen(stderr, 0, epochs, error="held-out error") as screen:
            parts = in_parts(found, settings, seed, model, screen.decoded)
            begin(out / REQUEST, request)
            suggestion = suggest(start, parts, comparison, limit, screen, folder=out / TRIALS, seed=seed)
    finally:
        torch.set_num_threads(threads_before)
    _, bad = without_bad(found, parts.images)
    facts = {
        "model": f"{model}; weights: {weights_title(model, weights)}",
        "data": f"{found.name}: {len(parts.images.labels):,} training images in {len(parts)} parts, of which one is "
        f"held out, {len(found.classes)} classes; the validation images were not read",
        **({"split": found.note} if found.note else {}),
        **({"left out": bad} if bad else {}),
        "images": f"{settings.image_size} pixels",
        "trials": f"{epochs} epochs of AdamW, constant rate, batch size {batch_size}, seed {seed}",
        "errors": "on the images held out; rate and plan are chosen by the same, so they are a little too low",
        "time": f"{budget - limit.left:.0f} s of {budget:.0f} s",
    }
    plan = write(out, suggestion, blank(model, len(found.classes)), facts, f"{found.name}, {model}")
    print_facts(stdout, facts)
    print_evidence(stdout, suggestion.evidence)
    print_trials(stdout, suggestion)
    stdout.print(f"\nWritten to {out}: {', '.join(FILES)}", soft_wrap=True)
    rate = suggestion.decision.lr
    words = [
        "freezeplan", "compare", str(plan), "--model", model, "--data", data,
        *(["--weights", weights] if weights else []), "--image-size", str(settings.image_size),
        *(["--lr", f"{rate:g}"] if rate else []),
    ]  # fmt: skip
    stdout.print(f"Train it fully:\n{shlex.join(words)}", soft_wrap=True)
    return int(suggestion.tried.failed and not suggestion.tried.trials)


def _check_free(out: Path, resume: bool, request: dict[str, Any]) -> None:
    """Refuse a folder with another suggestion, or with this one without ``resume``."""
    if is_taken(out, FILES):
        if not resume:
            raise OutputError("already holds a suggestion", where=str(out), notes=["--resume goes on with it"])
        try:
            before = json.loads((out / REQUEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise OutputError("does not say what its trials were for", where=str(out), notes=["--out DIR"]) from None
        other = [key for key in request if before.get(key) != request[key]]
        if other:
            found = ", ".join(f"{key} {before.get(key)}, now {request[key]}" for key in other)
            notes = ["give another --out"]
            raise OutputError(f"holds a suggestion for something else: {found}", where=str(out), notes=notes)


def fewer(data: VocData, images: int, seed: int) -> VocData:
    """Return the data with at most about ``images`` training images, of each class its share and at least two.

    Args:
        data: What ``read_photos`` returned.
        images: How many.
        seed: Decides which.
    """
    if len(data.train) <= images:
        return data
    kept = split_each_class(data.train, seed, images / len(data.train))[1]
    lone: dict[str, list[Photo]] = {}
    for photo in kept:
        lone.setdefault(photo.objects[0].name, []).append(photo)
    files = {photo.file for photo in kept}
    for photo in data.train:  # a class with a single image could not be held out
        mine = lone[photo.objects[0].name]
        if len(mine) < 2 and photo.file not in files:
            mine.append(photo)
            files.add(photo.file)
    return replace(data, train=tuple(photo for photo in data.train if photo.file in files))
