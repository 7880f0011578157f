"""The commands. Results to stdout, problems to stderr; exit 0 done, 1 what was given has a problem, 2 wrong usage."""

from __future__ import annotations

import ast
import json
import sys
from typing import Annotated, Any

import typer

import freezeplan
from freezeplan import render
from freezeplan.errors import FreezePlanError
from freezeplan.load import load_plan, preset_files

app = typer.Typer(
    help="Declarative layer freezing for timm: a plan says what is frozen and what learns how fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PlanArgument = Annotated[
    str, typer.Argument(metavar="PLAN", help="A plan file (.yaml, .toml, .json) or a preset's name.")
]
ModelHelp = "A timm model name, or package.module:function."
NumClasses = Annotated[int | None, typer.Option(min=0, help="Number of classes; the model's own if not given.")]
ModelArg = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="An argument for creating the model; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    """Run the command line; a user's mistake is printed and never a traceback."""
    try:
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help=ModelHelp)],
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate: show each group's effective one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a plan does to a model: frozen, trained at which rate, by which rule. Downloads nothing."""
    resolution = _resolve(plan, model, num_classes, model_arg)
    if as_json:
        from freezeplan.report import as_json as to_json

        _print_json(to_json(resolution))
    else:
        render.print_resolution(resolution, lr)


@app.command()
def check(
    plan: PlanArgument,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=ModelHelp)] = None,
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
        from freezeplan.report import as_json as to_json

        _print_json({key: value for key, value in to_json(resolution).items() if key != "tensors"})
    else:
        render.stdout().print(f"{plan}: fits {resolution.model}", soft_wrap=True)
        render.print_rules(resolution)


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the plans that ship with freezeplan."""
    found = {name: load_plan(name) for name in preset_files()}
    if as_json:
        _print_json({name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in found.items()})
    else:
        render.print_presets(found)


def _resolve(plan: str, model: str, num_classes: int | None, model_arg: list[str] | None) -> Any:
    loaded = load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    from freezeplan.facade import resolve_plan
    from freezeplan.zoo import create_model

    arguments = dict(map(_key_value, model_arg or ()))
    return resolve_plan(loaded, create_model(model, num_classes=num_classes, meta=True, **arguments))


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
