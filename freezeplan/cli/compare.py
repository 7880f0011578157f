"""The command ``compare``: which of several plans suits one's own photos."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from freezeplan.cli import completion
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
    one_of,
)
from freezeplan.errors import MissingExtraError
from freezeplan.training.settings import Amp

On = Literal["here", "ray"]


def compare(
    plans: Annotated[
        list[str],
        typer.Argument(
            metavar="PLAN...", help="Presets, plan files, folders of them.", autocompletion=completion.plans
        ),
    ],
    data: DataOption,
    model: ModelOption,
    weights: WeightsOption = None,
    data_dir: DataDirOption = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Base learning rate; repeatable.", show_default="0.0003, 0.001 and 0.003"),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="0")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="The same for every plan.")] = 10,
    batch_size: BatchSizeOption = 32,
    image_size: ImageSizeOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go.", show_default="runs/compare-DATE-TIME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take the trials that --out holds; train the others.")
    ] = False,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving", help="Stop the worse half of plans and rates after a part of the epochs, several times."
        ),
    ] = False,
    skip_bad: SkipBadOption = False,
    device: DeviceOption = "auto",
    amp: Annotated[Amp | None, typer.Option(**one_of(Amp), help="Autocast.", show_default="float32")] = None,
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Compute the features of frozen layers once, for all trials.")
    ] = True,
    cache_dir: CacheDirOption = None,
    on: Annotated[On, typer.Option(**one_of(On), help="ray: each trial is a Ray task.")] = "here",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to join.", show_default="Ray is started on this machine")
    ] = None,
) -> None:
    """Train each plan on your photos, at a few rates, and rank the plans by error and cost.

    The rate of each plan is chosen on training images that are held out. The error is measured on validation images.
    """
    if address is not None and on != "ray":
        raise typer.BadParameter("it is for --on ray alone", param_hint="--address")
    if not all(0 < rate < math.inf for rate in lr or ()):
        raise typer.BadParameter("a number above 0", param_hint="--lr")
    try:
        from freezeplan.training.compare_command import compare_plans
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "run") from None
    code = compare_plans(
        plans, data=data, model=model, weights=weights, data_dir=data_dir, lr=lr or (), seed=seed or (), epochs=epochs,
        batch_size=batch_size, image_size=image_size, out=out, resume=resume, halving=halving, skip_bad=skip_bad,
        device=device, amp=amp, threads=threads, workers=workers, cache=cache, cache_dir=cache_dir,
        ray=on == "ray", address=address,
    )  # fmt: skip
    if code:
        raise typer.Exit(code)
