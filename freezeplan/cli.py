"""The commands. Results to stdout, problems to stderr; exit 0 done, 1 what was given has a problem, 2 wrong usage."""

from __future__ import annotations

import ast
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import freezeplan
from freezeplan import completion, picture, proof_commands, render, report, store
from freezeplan.description import Description
from freezeplan.difference import compare
from freezeplan.dump import dump
from freezeplan.errors import FreezePlanError, MissingExtraError, OutputError
from freezeplan.explain import explain
from freezeplan.importers import finetuning_scheduler, mmengine, timm_args
from freezeplan.load import load_plan, load_presets
from freezeplan.plan import Plan
from freezeplan.resolution import Resolution
from freezeplan.resolve import resolve
from freezeplan.settings_file import use_settings

app = typer.Typer(
    help="Declarative layer freezing for timm: a plan says what is frozen and what learns how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PlanArgument = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        help="A plan file (.yaml, .toml, .json) or a preset's name.",
        autocompletion=completion.plans,
    ),
]
ModelHelp = "A timm model name, or package.module:function."
NumClasses = Annotated[int | None, typer.Option(min=0, help="Number of classes; the model's own if not given.")]
ModelArg = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument for creating the model; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Experiment = Literal["voc_vgg16"]
Format = Literal["timm", "finetuning-scheduler", "mmengine"]
# Stated here and not imported: the experiment brings torch with it, and --help should not wait for that.
EPOCHS = "20; sample: 25"
BATCH_SIZE = "32; sample: 16"
app.command()(proof_commands.verify)
app.add_typer(proof_commands.delta, name="delta")


def main() -> None:
    """Run the command line; a user's mistake is printed and never a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = render.print_warning
            app()
    except FreezePlanError as error:
        render.print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(freezeplan.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def show(
    plan: PlanArgument,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=ModelHelp, autocompletion=completion.models)],
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate: show each group's effective one.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it: a .png or a .svg, from ice to fire.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a plan does to a model: frozen, trained at which rate, by which rule. Downloads nothing."""
    resolution, described = _resolved(plan, model, num_classes, model_arg)
    if image is not None:
        picture.draw(resolution, described, image)
    if as_json:
        _print_json(report.as_json(resolution))
    else:
        render.print_resolution(resolution, lr)


@app.command()
def check(
    plan: PlanArgument,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help=ModelHelp, autocompletion=completion.models)
    ] = None,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Check a plan file, and whether it fits a model; exit code 1 if not."""
    loaded = load_plan(plan)
    if model is None:
        found = {"plan": loaded.title, "rules": len(loaded.rules)}
        if as_json:
            _print_json(found)
        else:
            render.stdout().print(f"{plan}: a valid plan with {len(loaded.rules)} rules", soft_wrap=True)
        return
    resolution = _resolve(plan, model, num_classes, model_arg)
    if as_json:
        _print_json({key: value for key, value in report.as_json(resolution).items() if key != "tensors"})
    else:
        render.stdout().print(f"{plan}: fits {resolution.model}", soft_wrap=True)
        render.print_rules(resolution)


@app.command()
def why(
    plan: PlanArgument,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=ModelHelp, autocompletion=completion.models)],
    param: Annotated[str, typer.Argument(metavar="PARAM", help="The full name of a parameter.")],
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate: show the effective one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which rule decides about one parameter, where it stands, and which others match."""
    resolution = _resolve(plan, model, num_classes, model_arg)
    found = explain(resolution, param)
    if as_json:
        _print_json(found)
    else:
        render.print_explanation(found, lr)


@app.command()
def diff(
    plan: PlanArgument,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another plan.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help=ModelHelp, autocompletion=completion.models)],
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Say what two plans decide differently; exit code 0: nothing, 1: something, 2: they cannot be compared."""
    try:
        first, second = (_resolve(name, model, num_classes, model_arg) for name in (plan, other))
        changes = compare(first, second)
    except FreezePlanError as error:
        render.print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        _print_json([asdict(change) for change in changes])
    else:
        render.print_changes(changes, equal=first.plan == second.plan)
    raise typer.Exit(1 if changes else 0)


@app.command()
def schema() -> None:
    """Print the JSON schema of a plan, for editors: point the yaml-language-server at it."""
    _print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()})


@app.command("import")
def import_(
    format: Annotated[Format, typer.Argument(metavar="FORMAT", help="timm, finetuning-scheduler or mmengine.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What that tool reads: see docs/importing.md.")],
    lr: Annotated[
        float | None, typer.Option(help="The optimizer's rate; finetuning-scheduler's later depths need it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the plan goes.", show_default="stdout")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's settings into a plan that does the same, or say what a plan cannot say."""
    if lr is not None and (format != "finetuning-scheduler" or not lr > 0):
        raise typer.BadParameter("a number above 0, for finetuning-scheduler alone", param_hint="--lr")
    if format == "timm":
        plan = timm_args.read(file)
    elif format == "mmengine":
        plan = mmengine.read(file)
    else:
        plan = finetuning_scheduler.read(file, lr=lr)
    data = plan.model_dump(mode="json", exclude_defaults=True)
    text = f"{json.dumps(data, indent=2, ensure_ascii=False)}\n" if as_json else dump(plan)
    if out is None:
        typer.echo(text, nl=False)
        return
    temporary = out.with_name(f".{out.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error.strerror}") from None


@app.command("forecast")
def forecast_(
    plan: PlanArgument,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=ModelHelp, autocompletion=completion.models)],
    image_size: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Side of the images.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Say what training under a plan will cost: memory, arithmetic, a cache of features. Needs no data."""
    load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    from freezeplan.forecast import forecast
    from freezeplan.zoo import create_model

    arguments = dict(map(_key_value, model_arg or ()))
    found = forecast(
        lambda: create_model(model, num_classes=num_classes, meta=True, **arguments),
        plan, image_size=image_size, batch_size=batch_size,
    ).as_json()  # fmt: skip
    if as_json:
        _print_json(found)
    else:
        render.print_forecast(found)


cache_app = typer.Typer(help="Features of frozen parts on disk: what is kept, and how it goes.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
CacheDirectory = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="Where they are.", show_default="the user's cache folder")
]


@cache_app.command("ls")
def cache_ls(directory: CacheDirectory = None, as_json: AsJson = False) -> None:
    """List the features that are kept: of which model and plan, how much, last used when."""
    found = store.entries(directory or store.default_directory())
    if as_json:
        _print_json([asdict(entry) for entry in found])
    else:
        render.print_entries(directory or store.default_directory(), found)


@cache_app.command("rm")
def cache_rm(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY...", help="Keys of entries, or how they begin.")
    ] = None,
    directory: CacheDirectory = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
) -> None:
    """Remove features that are kept; they are computed again when they are needed."""
    if bool(keys) == everything:
        raise typer.BadParameter("keys, or --all", param_hint="KEY")
    where = directory or store.default_directory()
    wanted = [entry.key for entry in store.entries(where)] if everything else keys or []
    freed = store.remove(where, wanted)
    count = "1 entry" if len(set(wanted)) == 1 else f"{len(set(wanted))} entries"
    render.stdout().print(f"{where}: removed {count}, {freed:,} bytes", soft_wrap=True)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the plans that ship with freezeplan, and those that installed packages add."""
    found = load_presets()
    if as_json:
        _print_json({name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in found.items()})
    else:
        render.print_presets(found)


@app.command("report")
def merged_report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page; replaced if it is there.")] = Path("report.html"),
    data: Annotated[Path | None, typer.Option(help="The runs' data, for a gallery of mistakes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge runs of one experiment, of other arms or seeds, into one page of HTML."""
    try:
        from freezeplan.experiment.command import report as merge_runs
        from freezeplan.experiment.screen import print_results
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "run") from None
    merged = merge_runs(folders, out=out, data=data)
    if as_json:
        _print_json(merged)
    else:
        print_results(render.stdout(), merged)
        render.stdout().print(f"\nWritten to {out}", soft_wrap=True)


@app.command()
def run(
    experiment: Annotated[Experiment, typer.Argument(metavar="EXPERIMENT", help="voc_vgg16, the only one.")],
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
        typer.Option(help="A timm model name; vgg16 gets the lecture's head.", show_default="vgg16; sample: slim"),
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
        typer.Option(help="scratch, frozen_convs, low_conv_lr or same_lr; repeatable.", show_default="all four"),
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(metavar="PLAN", help="A plan file or preset as one more arm; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default=EPOCHS)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images.", show_default=BATCH_SIZE)] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels.", show_default="the model's: 224 for vgg16; sample: 64")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.", show_default="0.0005")] = None,
    optimizer: Annotated[
        Literal["rmsprop-tf1", "rmsprop", "adamw", "sgd"] | None,
        typer.Option(
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
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode images.", show_default="one a core")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads inside torch.", show_default="one a core; sample: 1")
    ] = None,
    label: Annotated[
        Literal["largest", "first"] | None,
        typer.Option(help="An image's class: of its largest box or its first object.", show_default="largest"),
    ] = None,
    augment: Annotated[
        Literal["none", "flip", "crop-flip"] | None,
        typer.Option(help="Change training images at random, on the device.", show_default="none"),
    ] = None,
    normalise: Annotated[
        Literal["weights", "imagenet", "half", "bgr-mean"] | None,
        typer.Option(help="Normalisation of the input.", show_default="weights: as they were trained"),
    ] = None,
    flatten: Annotated[
        Literal["chw", "hwc"] | None,
        typer.Option(help="Order in which VGG16's pool5 is flattened.", show_default="chw"),
    ] = None,
    resize: Annotated[
        Literal["squash", "center-crop"] | None,
        typer.Option(help="How an image becomes square: all of it, or its middle.", show_default="squash"),
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
    amp: Annotated[
        Literal["bf16", "fp16"] | None,
        typer.Option(help="Autocast; fp16 with a scaled loss.", show_default="float32"),
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
    del experiment, settings
    try:
        from freezeplan.experiment.command import voc_vgg16
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "a package", "run") from None
    voc_vgg16(
        data=data,
        download=download,
        url=url,
        model=model,
        weights=weights,
        arm=arm,
        plan=plan,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        lr=lr,
        optimizer=optimizer,
        clip=clip,
        warmup=warmup,
        seed=seed,
        device=device,
        workers=workers,
        threads=threads,
        label=label,
        augment=augment,
        normalise=normalise,
        flatten=flatten,
        resize=resize,
        out=out,
        overwrite=overwrite,
        resume=resume,
        skip_bad=skip_bad,
        cache=cache,
        cache_dir=cache_dir,
        cache_limit=cache_limit,
        channels_last=channels_last,
        compile=compile,
        amp=amp,
    )


def _resolve(plan: str, model: str, num_classes: int | None, model_arg: list[str] | None) -> Resolution:
    return _resolved(plan, model, num_classes, model_arg)[0]


def _resolved(
    plan: str, model: str, num_classes: int | None, model_arg: list[str] | None
) -> tuple[Resolution, Description]:
    loaded = load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    from freezeplan.zoo import create_model, describe

    arguments = dict(map(_key_value, model_arg or ()))
    described = describe(create_model(model, num_classes=num_classes, meta=True, **arguments))
    return resolve(loaded, described), described


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"expected KEY=VALUE, found {text!r}", param_hint="--model-arg")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
