"""The commands ``run`` and ``report``: the experiment, and pages of several runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from freezeplan.cli import completion
from freezeplan.cli.options import AsJson, one_of, print_json
from freezeplan.cli.settings_file import use_settings
from freezeplan.errors import MissingExtraError
from freezeplan.report import terminal
from freezeplan.training.settings import (
    Amp,
    Augment,
    Device,
    Flatten,
    LabelRule,
    Normalise,
    OptimizerName,
    Resize,
)  # fmt: skip

Experiment = Literal["voc_vgg16"]
# Stated here and not imported: the experiment brings torch with it, and --help should not wait for that.
EPOCHS = "20; sample: 25"
BATCH_SIZE = "32; sample: 16"


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page; replaced if it is there.")] = Path("report.html"),
    data: Annotated[Path | None, typer.Option(help="The runs' data, for a gallery of mistakes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge runs of one experiment, of other arms or seeds, into one page of HTML."""
    try:
        from freezeplan.voc_vgg16.command import report as merge_runs
        from freezeplan.voc_vgg16.screen import print_results
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "run") from None
    with terminal.waiting("reading runs and drawing the page"):
        merged = merge_runs(folders, out=out, data=data)
    if as_json:
        print_json(merged)
    else:
        print_results(terminal.stdout(), merged)
        terminal.stdout().print(f"\nWritten to {out}", soft_wrap=True)


def run(
    experiment: Annotated[
        Experiment, typer.Argument(help="voc_vgg16, the only one.", **one_of(Experiment, "EXPERIMENT"))
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="VOCdevkit folder, its VOC2012 folder, or a tar of either.", show_default="embedded sample"),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch VOC 2012 (2 GB) to the folder --data, or the cache folder.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="A mirror for --download; same checksum.", show_default="official")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A timm model name; vgg16 gets the lecture's head.",
            show_default="vgg16; sample: slim",
            autocompletion=completion.models,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|random",
            help="safetensors or a checkpoint; random: none, for timing.",
            show_default="timm's pretrained weights; the sample's own",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="scratch, frozen_convs, low_conv_lr or same_lr; repeatable.",
            show_default="all four",
            autocompletion=completion.arms,
        ),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN", help="A plan file or preset as one more arm; repeatable.", autocompletion=completion.plans
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default=EPOCHS)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images.", show_default=BATCH_SIZE)] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels.", show_default="the model's: 224 for vgg16; sample: 64")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.", show_default="0.0005")] = None,
    optimizer: Annotated[
        OptimizerName | None,
        typer.Option(
            **one_of(OptimizerName),
            help="RMSProp as TensorFlow 1 computes it, or torch's; AdamW or SGD, fused.",
            show_default="rmsprop-tf1 for vgg16 and the sample, else rmsprop",
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(metavar="NORM", help="Clip the gradient's norm.", show_default="off")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Linear warm-up.", show_default="off")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable.", show_default="0")] = None,
    device: Annotated[Device, typer.Option(**one_of(Device), help="auto: CUDA where there is one.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode images.", show_default="one a core")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads inside torch.", show_default="one a core; sample: 1")
    ] = None,
    label: Annotated[
        LabelRule | None,
        typer.Option(
            **one_of(LabelRule),
            help="An image's class: of its largest box or its first object.",
            show_default="largest",
        ),
    ] = None,
    augment: Annotated[
        Augment | None,
        typer.Option(**one_of(Augment), help="Change training images at random, on the device.", show_default="none"),
    ] = None,
    normalise: Annotated[
        Normalise | None,
        typer.Option(
            **one_of(Normalise), help="Normalisation of the input.", show_default="weights: as they were trained"
        ),
    ] = None,
    flatten: Annotated[
        Flatten | None,
        typer.Option(**one_of(Flatten), help="Order in which VGG16's pool5 is flattened.", show_default="chw"),
    ] = None,
    resize: Annotated[
        Resize | None,
        typer.Option(
            **one_of(Resize), help="How an image becomes square: all of it, or its middle.", show_default="squash"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go.", show_default="runs/voc_vgg16-DATE-TIME")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that --out holds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that do not decode.")] = False,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Run frozen layers once an image and keep the features on disk."),
    ] = True,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where features are.", show_default="the user's cache folder")
    ] = None,
    cache_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What it may hold, such as 20G.", show_default="the disk")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last/--no-channels-last", help="Order in memory: convolutions run faster on it.")
    ] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: pays where an epoch takes minutes.")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Launch a step behind cached features as one CUDA graph.")
    ] = False,
    amp: Annotated[
        Amp | None, typer.Option(**one_of(Amp), help="Autocast; fp16 with a scaled loss.", show_default="float32")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="These options from a file (.yaml, .toml, .json); what is typed wins.",
            callback=use_settings,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Train the four arms of the experiment and print their errors beside the published ones."""
    given = {name: value for name, value in locals().items() if name not in ("experiment", "settings")}
    try:
        from freezeplan.voc_vgg16.command import voc_vgg16
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "run") from None
    voc_vgg16(**given)
