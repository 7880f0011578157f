"""The command ``suggest``: one plan for one's own photos, with its evidence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from freezeplan.cli.options import (
    BatchSizeOption,
    CacheDirOption,
    DataDirOption,
    DataOption,
    DeviceOption,
    ImageSizeOption,
    ModelOption,
    SkipBadOption,
    ThreadsOption,
    WeightsOption,
    WorkersOption,
)
from freezeplan.errors import MissingExtraError


def seconds(text: str) -> float:
    """Read a time, in seconds where no unit is given.

    Raises:
        typer.BadParameter: If it is none.

    Examples:
        >>> seconds("2m"), seconds("90s"), seconds("1.5h"), seconds("30")
        (120.0, 90.0, 5400.0, 30.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"expected a time such as 90s, 2m or 1h, found {text!r}", param_hint="--budget")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def suggest(
    data: DataOption,
    model: ModelOption,
    weights: WeightsOption = None,
    data_dir: DataDirOption = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for everything, about: 90s, 2m, 1h. Longer steps are skipped.")
    ] = "2m",
    images: Annotated[int, typer.Option(min=4, help="Training images that are used, at most.")] = 1000,
    epochs: Annotated[int, typer.Option(min=1, help="Of a trial.")] = 3,
    batch_size: BatchSizeOption = 32,
    image_size: ImageSizeOption = None,
    seed: Annotated[int, typer.Option(help="Of images, folds, heads and trials.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the plan goes.", show_default="runs/suggest-DATE-TIME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take the finished trials in --out; they need no budget.")
    ] = False,
    skip_bad: SkipBadOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    cache_dir: CacheDirOption = None,
) -> None:
    """Suggest a plan for your photos: a probe at each stage, gradients of each stage, short trials.

    It writes a plan file whose comments say what was measured. The validation images are not read.
    """
    limit = seconds(budget)
    try:
        from freezeplan.training.suggest_command import suggest_plan
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "run") from None
    suggest_plan(
        model=model, data=data, weights=weights, data_dir=data_dir, budget=limit, images=images, epochs=epochs,
        batch_size=batch_size, image_size=image_size, seed=seed, out=out, resume=resume, skip_bad=skip_bad,
        device=device, threads=threads, workers=workers, cache_dir=cache_dir,
    )  # fmt: skip
