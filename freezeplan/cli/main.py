"""The commands. Results to stdout, problems to stderr; exit 0 done, 1 what was given has a problem, 2 wrong usage."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import freezeplan
from freezeplan.atomic import whole_file
from freezeplan.cache import store
from freezeplan.cli import compare as compare_commands
from freezeplan.cli import completion, proof, run
from freezeplan.cli.options import (
    AsJson,
    ModelArg,
    ModelArgument,
    ModelOption,
    NumClasses,
    OptionalModel,
    PlanArgument,
    one_of,
    print_json,
)
from freezeplan.errors import FreezePlanError, OutputError
from freezeplan.importers import finetuning_scheduler, mmengine, timm_args
from freezeplan.model.description import Description
from freezeplan.plan.dump import dump
from freezeplan.plan.load import load_plan, load_presets
from freezeplan.plan.schema import Plan
from freezeplan.report import picture, rows, terminal
from freezeplan.report.diff import compare
from freezeplan.report.explain import explain
from freezeplan.resolve.resolution import Resolution
from freezeplan.resolve.resolver import resolve

app = typer.Typer(
    help="Declarative layer freezing for timm: a plan says what is frozen and what learns how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Format = Literal["timm", "finetuning-scheduler", "mmengine"]


def main() -> None:
    """Run the command line; a user's mistake is printed and never a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = terminal.print_warning
            app()
    except FreezePlanError as error:
        terminal.print_error(error)
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
    model: ModelArgument,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Base learning rate: show each group's own.")] = None,
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
        print_json(rows.as_json(resolution, lr))
    else:
        terminal.print_resolution(resolution, lr)


@app.command()
def check(
    plan: PlanArgument,
    model: OptionalModel = None,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Check a plan file, and whether it fits a model; exit code 1 if not."""
    loaded = load_plan(plan)
    if model is None:
        found = {"plan": loaded.title, "rules": len(loaded.rules)}
        if as_json:
            print_json(found)
        else:
            terminal.stdout().print(f"{plan}: a valid plan with {len(loaded.rules)} rules", soft_wrap=True)
        return
    resolution = _resolve(plan, model, num_classes, model_arg)
    if as_json:
        print_json({key: value for key, value in rows.as_json(resolution).items() if key != "tensors"})
    else:
        terminal.stdout().print(f"{plan}: fits {resolution.model}", soft_wrap=True)
        terminal.print_rules(resolution)


@app.command()
def why(
    plan: PlanArgument,
    model: ModelArgument,
    param: Annotated[
        str,
        typer.Argument(metavar="PARAM", help="The full name of a parameter.", autocompletion=completion.parameters),
    ],
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Base learning rate: show the effective one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which rule decides about one parameter, where it stands, and which others match."""
    found = explain(_resolve(plan, model, num_classes, model_arg), param, lr)
    if as_json:
        print_json(found)
    else:
        terminal.print_explanation(found)


@app.command()
def diff(
    plan: PlanArgument,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another plan.", autocompletion=completion.plans)],
    model: ModelOption,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Say what two plans decide differently; exit code 0: nothing, 1: something, 2: they cannot be compared."""
    try:
        first, second = (_resolve(name, model, num_classes, model_arg) for name in (plan, other))
        changes = compare(first, second)
    except FreezePlanError as error:
        terminal.print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        print_json([asdict(change) for change in changes])
    else:
        terminal.print_changes(changes, equal=first.plan == second.plan)
    raise typer.Exit(1 if changes else 0)


@app.command()
def schema() -> None:
    """Print the JSON schema of a plan, for editors: point the yaml-language-server at it."""
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()})


@app.command("import")
def import_(
    format: Annotated[
        Format, typer.Argument(help="timm, finetuning-scheduler or mmengine.", **one_of(Format, "FORMAT"))
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What that tool reads: see docs/importing.md.")],
    lr: Annotated[
        float | None, typer.Option(help="finetuning-scheduler: the optimizer's learning rate, for later depths.")
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="finetuning-scheduler: what its early stopping looks at.",
            show_default=finetuning_scheduler.MONITOR,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="finetuning-scheduler: epochs that its early stopping waits.",
            show_default=str(finetuning_scheduler.PATIENCE),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="mmengine: write rules with the exact factors for this model.",
            autocompletion=completion.models,
        ),
    ] = None,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the plan goes.", show_default="stdout")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn another tool's settings into a plan that does the same, or say what a plan cannot say.

    Differences are comments of the plan. Where the plan is JSON or a file they are printed to stderr too.
    """
    if lr is not None and not lr > 0:
        raise typer.BadParameter("a number above 0", param_hint="--lr")
    stopping = {"lr": lr, "monitor": monitor, "patience": patience}
    target = {"model": model, "num_classes": num_classes, "model_arg": model_arg}
    _only_with("finetuning-scheduler", format, stopping)
    _only_with("mmengine", format, target)
    if format == "timm":
        imported = timm_args.read(file)
    elif format == "mmengine":
        if model is None:
            _only_with("--model", "", target)
        imported = mmengine.read(file, None if model is None else _described(model, num_classes, model_arg))
    else:
        given: dict[str, Any] = {key: value for key, value in stopping.items() if value is not None}
        imported = finetuning_scheduler.read(file, **given)
    data = imported.plan.model_dump(mode="json", exclude_defaults=True)
    as_yaml = dump(imported.plan, comments=imported.notes)
    text = f"{json.dumps(data, indent=2, ensure_ascii=False)}\n" if as_json else as_yaml
    if as_json or out is not None:
        for note in imported.notes:
            terminal.print_warning(note)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with whole_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error.strerror}") from None


def _only_with(owner: str, given: str, options: dict[str, Any]) -> None:
    """Refuse options that belong to another format, or to an option that is not given."""
    for name, value in options.items():
        if value is not None and given != owner:
            raise typer.BadParameter(f"only with {owner}", param_hint=f"--{name.replace('_', '-')}")


@app.command("forecast")
def forecast_(
    plan: PlanArgument,
    model: ModelArgument,
    image_size: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Side of the images.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Say what training under a plan will cost: memory, arithmetic, a cache of features. Needs no data."""
    load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    from freezeplan.model.source import load_model
    from freezeplan.report.forecast import forecast

    found = forecast(
        lambda: load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True),
        plan, image_size=image_size, batch_size=batch_size,
    ).as_json()  # fmt: skip
    if as_json:
        print_json(found)
    else:
        terminal.print_forecast(found)


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
        print_json([asdict(entry) for entry in found])
    else:
        terminal.print_entries(directory or store.default_directory(), found)


@cache_app.command("rm")
def cache_rm(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys of entries, or how they begin.", autocompletion=completion.keys),
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
    terminal.stdout().print(f"{where}: removed {count}, {freed:,} bytes", soft_wrap=True)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the plans that ship with freezeplan, and those that installed packages add."""
    found = load_presets()
    if as_json:
        print_json({name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in found.items()})
    else:
        terminal.print_presets(found)


app.command()(proof.verify)
app.add_typer(proof.delta, name="delta")
app.command()(compare_commands.compare)
app.command()(run.run)
app.command()(run.report)


def _resolve(plan: str, model: str, num_classes: int | None, model_arg: list[Any] | None) -> Resolution:
    return _resolved(plan, model, num_classes, model_arg)[0]


def _resolved(
    plan: str, model: str, num_classes: int | None, model_arg: list[Any] | None
) -> tuple[Resolution, Description]:
    loaded = load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    described = _described(model, num_classes, model_arg)
    return resolve(loaded, described), described


def _described(model: str, num_classes: int | None, model_arg: list[Any] | None) -> Description:
    from freezeplan.model.describer import describe
    from freezeplan.model.source import load_model

    return describe(load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True))


if __name__ == "__main__":
    main()
