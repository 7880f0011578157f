"""``freezeplan compare``: from what was typed to the ranking, its files and its exit code."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from freezeplan import Plan
from freezeplan.atomic import whole_file
from freezeplan.errors import FreezePlanError, OutputError
from freezeplan.model.image_config import image_config
from freezeplan.report import terminal
from freezeplan.training.checkpoint import check_same_run, read_facts
from freezeplan.training.compare import RATES, compare, decode_photos, fit_to, least_frozen_first, load_plans
from freezeplan.training.compare_report import FILES, percent, print_ranking, write
from freezeplan.training.halving import compare_by_halves, said
from freezeplan.training.measures import commonest_error
from freezeplan.training.on_ray import on_ray
from freezeplan.training.photos import read_photos, without_bad
from freezeplan.training.ranking import Trial, rank, verdict, without_images
from freezeplan.training.settings import Amp, Settings
from freezeplan.training.train import Epoch
from freezeplan.training.trials import Comparison, Job, one_by_one
from freezeplan.training.voc import VocData
from freezeplan.training.weights import blank, build, check_size, default_image_size, weights_title

TRIALS = "trials"
"""The folder below ``--out`` that keeps each trial."""
ABOUT = "comparison.json"
"""What the trials of a comparison have in common, beside them."""


def compare_plans(
    plans: Sequence[str],
    *,
    data: str,
    model: str,
    weights: str | None = None,
    data_dir: Path | None = None,
    lr: Sequence[float] = (),
    seed: Sequence[int] = (),
    epochs: int = 10,
    batch_size: int = 32,
    image_size: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    halving: bool = False,
    skip_bad: bool = False,
    device: str = "auto",
    amp: Amp | None = None,
    threads: int | None = None,
    workers: int | None = None,
    cache: bool = True,
    cache_dir: Path | None = None,
    ray: bool = False,
    address: str | None = None,
) -> int:
    """Train plans on one's own photos, print their ranking, and write it to a folder.

    Args:
        plans: Presets, plan files, folders of plan files.
        data: See ``read_photos``.
        model: A timm model name, or ``package.module:function``; see ``build``.
        weights: A file, ``random``, or None for timm's pretrained weights, or what the function returns.
        data_dir: Where a data set of timm's is kept.
        lr: Base learning rates; ``RATES`` where none is given.
        seed: Seeds; 0 where none is given. The first one also decides which images are held out.
        epochs: Passes over the training images, the same for every plan.
        batch_size: Images a step, at most.
        image_size: Side in pixels; None: what the model was trained on.
        out: None: ``runs/compare-DATE-TIME``.
        resume: Take the trials that ``out`` holds, and train the others.
        halving: Stop the worse half of plans and rates after a part of the epochs, several times.
        skip_bad: Leave out images that do not decode and classes that are in one split only.
        device: ``auto`` takes CUDA where there is one.
        amp: ``bf16`` or ``fp16`` for autocast; None: float32.
        threads: Threads inside torch; None: one a core.
        workers: Threads that decode images; None: one a core.
        cache: Whether features of frozen layers are computed once, and shared by all trials.
        cache_dir: Where they are kept; None: the user's cache folder.
        ray: Whether each trial is a Ray task.
        address: Of a Ray cluster; None: Ray is started on this machine.

    Returns:
        0, or 1 where a plan could not be trained at one of its rates.

    Raises:
        FreezePlanError: If the plans, the data, the model or its weights are no good, or ``out`` is not free, or holds
            trials of other photos, another model or other settings.
    """
    stdout, stderr = terminal.stdout(), terminal.stderr()
    loaded = load_plans(plans)
    out = out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    if is_taken(out, FILES) and not resume:
        raise OutputError("already holds a comparison", where=str(out), notes=["--resume goes on with it"])
    rates, seeds = list(dict.fromkeys(lr or RATES)), list(dict.fromkeys(seed or [0]))
    found = read_photos(data, seed=seeds[0], data_dir=data_dir, skip_bad=skip_bad)
    chosen = Settings(
        epochs=epochs, batch_size=batch_size, image_size=image_size or default_image_size(model), lr=rates[0],
        optimizer="adamw", skip_bad=skip_bad, device=device_named(device), amp=amp, threads=threads or cores(),
        workers=workers or cores(), cache=cache, cache_dir=None if cache_dir is None else str(cache_dir),
    )  # fmt: skip
    engine = on_ray(address) if ray else one_by_one()
    empty = blank(model, len(found.classes))
    fitting, notes = fit_to(loaded, empty)
    comparison = Comparison(fitting, chosen, model, weights, len(found.classes))
    jobs = [Job(plan, rate, one) for plan in least_frozen_first(fitting, empty) for one in seeds for rate in rates]
    facts = {
        "data": images_of(found),
        **({"split": found.note} if found.note else {}),
        "model": f"{model}; weights: {weights_title(model, weights)}",
        "images": f"{chosen.image_size} pixels, cropped and normalised as {model} expects",
        "training": f"{epochs} epochs of AdamW, constant rate, batch size {batch_size}{f', {amp}' if amp else ''}",
        "rates": ", ".join(f"{rate:g}" for rate in rates),
        "seeds": ", ".join(map(str, seeds)),
        **({"note": "; ".join(notes)} if notes else {}),
    }
    print_facts(stdout, facts)
    same = {key: facts[key] for key in ("data", "model", "images", "training")} | {
        "held-out images": f"seed {seeds[0]}"
    }
    about = out / TRIALS / ABOUT
    texts = _check_same(about, same, fitting)
    size = chosen.image_size
    check_size(build(model, classes=len(found.classes), image_size=size, weights=weights, seed=seeds[0]), model, size)
    with Screen(stderr, len(jobs), epochs) as screen:
        photos = decode_photos(
            found, chosen, seed=seeds[0], transform=eval_transform(model, chosen.image_size), progress=screen.decoded
        )
        left, bad = without_bad(found, photos.train, photos.held_out)
        begin(about, texts)
        given = jobs, comparison, photos, screen
        if halving:
            trials, failed, behind = compare_by_halves(*given, folder=out / TRIALS, engine=engine)
        else:
            (trials, failed), behind = compare(*given, folder=out / TRIALS, engine=engine), []
    if bad:
        facts |= {"data": images_of(left), "left out": bad}
        stdout.print(Text(f"left out: {bad}\n"), soft_wrap=True)
    whole = {plan for plan in fitting if not any(job.plan == plan for job in failed)}
    places = rank([trial for trial in trials if trial.plan in whole])
    sentence = verdict(places, commonest_error(photos.train.labels))
    stopped = [said(trial, epochs) for trial in behind]
    results = {
        "facts": facts,
        "settings": asdict(chosen),
        "trials": [without_images(trial) for trial in trials],
        "skipped": [*photos.train.skipped, *photos.held_out.skipped],
        "stopped": stopped,
        "failed": {job.name: message for job, message in failed.items()},
    }
    if trials:
        write(out, places, results, f"{len(places)} plans on {found.name}, {model}", sentence)
    for job, message in failed.items():
        stderr.print(f"failed: {job.name}: {message}", soft_wrap=True)
    if not trials:
        return 1
    print_ranking(stdout, places, sentence)
    for line in stopped:
        stdout.print(f"stopped: {line}", soft_wrap=True)
    stdout.print(f"\nWritten to {out}: {', '.join(FILES)}", soft_wrap=True)
    return 1 if failed else 0


def images_of(data: VocData) -> str:
    """Say how many images a data set has."""
    counts = f"{len(data.train):,} training and {len(data.val):,} validation images"
    return f"{data.name}: {counts}, {len(data.classes)} classes"


def _check_same(about: Path, facts: Mapping[str, str], plans: Mapping[str, Plan]) -> Mapping[str, str]:
    """Return what the trials of a folder have in common, those there and those to come.

    Raises:
        OutputError: If the trials in the folder are others, or what is written there is damaged.
    """
    texts = {f"plan {name}": plan.model_dump_json(exclude_defaults=True) for name, plan in plans.items()}
    found, now = read_facts(about) if _holds_trials(about.parent) else {}, {**facts, **texts}
    check_same_run(about, found, {name: now.get(name, value) for name, value in found.items()})
    return {**found, **now}


def is_taken(out: Path, files: Sequence[str]) -> bool:
    """Whether a folder for results holds some of these files, or a trial.

    Raises:
        OutputError: If it is a file.

    Examples:
        >>> is_taken(Path("no-such-folder"), FILES)
        False
    """
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, expected a folder", where=str(out), notes=["give another --out"])
    return _holds_trials(out / TRIALS) or any((out / name).exists() for name in files)


def _holds_trials(folder: Path) -> bool:
    """Whether a trial is kept in a folder, or in one below it."""
    return any(file.name != ABOUT for file in folder.rglob("*.json"))


def begin(about: Path, facts: Mapping[str, Any]) -> None:
    """Write down what is asked for, in a folder that is made.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        about.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(about) as temporary:
            temporary.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(about.parent)) from error


def eval_transform(model: str, image_size: int) -> Callable[[Any], Tensor]:
    """Return timm's own evaluation transform of a model, up to uint8: the size, crop and interpolation it expects.

    Args:
        model: A timm model name, or ``package.module:function``; see ``build``.
        image_size: Side in pixels.

    Returns:
        PIL image to uint8, (3, image_size, image_size).
    """
    config = resolve_data_config({"input_size": (3, image_size, image_size)}, dict(image_config(blank(model, 2))))
    transform = create_transform(
        input_size=(3, image_size, image_size), is_training=False, use_prefetcher=True,
        interpolation=config["interpolation"], crop_pct=config["crop_pct"], crop_mode=config["crop_mode"],
    )  # fmt: skip
    return lambda image: torch.as_tensor(transform(image))


def cores() -> int:
    """Return the cores that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_named(name: str) -> str:
    """Return ``cpu`` or ``cuda`` for a device that was named; ``auto`` takes CUDA where there is one.

    Raises:
        FreezePlanError: If CUDA is asked for and not there.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise FreezePlanError("--device cuda: torch finds no CUDA device", notes=["--device cpu or --device auto"])
    return "cuda" if name == "auto" and there else "cpu" if name == "auto" else name


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print facts by name, in two columns."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))
    console.print(table)
    console.print()


class Screen:
    """A live line on a terminal: which job runs, how far it is, the last trials; elsewhere a line a trial.

    Args:
        console: Where it is shown.
        jobs: How many there will be; 0 if that is not known.
        epochs: Of a job.
        error: What the error of a trial is called.
    """

    def __init__(self, console: Console, jobs: int, epochs: int, *, error: str = "validation error"):
        self._console, self._jobs, self._epochs, self._error = console, jobs, epochs, error
        self._done: list[Text] = []
        self._now = "reading images"
        self._live = Live(get_renderable=self._view, console=console, transient=True, redirect_stdout=False)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _view(self) -> Text:
        return Text("\n").join([*self._done[-8:], Text(self._now, "bold")])

    def decoded(self, done: int, images: int) -> None:
        """Say how many images are decoded."""
        self._now = f"reading images {done:,}/{images:,}"

    def started(self, job: Job, images: int) -> None:
        """Name the job."""
        del images
        self._job, self._now = job.name, job.name

    def batch(self, images: int, loss: Tensor) -> None:
        """Show nothing: a step is short."""

    def kept(self, done: int, images: int) -> None:
        """Say how many images have cached features."""
        self._now = f"{self._job}: cached features {done:,}/{images:,}"

    def epoch(self, epoch: Epoch) -> None:
        """Say which epoch is done."""
        self._now = f"{self._job}: epoch {epoch.epoch} of {self._epochs}"

    def finished(self, trial: Trial) -> None:
        """Add the trial's line."""
        text = (
            f"{self._number()} {trial.plan}, lr {trial.lr:g}, seed {trial.seed}: {self._error} "
            f"{percent(trial.val_error)} %, {trial.seconds:.1f} s"
        )
        self._line(Text(text))

    def failed(self, job: Job, error: FreezePlanError) -> None:
        """Add the failure's line."""
        self._line(Text(f"{self._number()} {job.name}: failed: {str(error).splitlines()[0]}", "red"))

    def _number(self) -> str:
        return f"{len(self._done) + 1}/{self._jobs}" if self._jobs else str(len(self._done) + 1)

    def _line(self, text: Text) -> None:
        self._done.append(text)
        if not self._console.is_terminal:
            self._console.print(text, soft_wrap=True)
