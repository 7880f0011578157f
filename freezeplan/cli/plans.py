"""The commands about one plan or two: what it decides about a model, and whether it is right."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from freezeplan.cli import completion
from freezeplan.cli.options import (
    AsJson,
    ModelArg,
    ModelArgument,
    ModelOption,
    NumClasses,
    OptionalModel,
    PlanArgument,
    described_model,
    print_json,
)
from freezeplan.errors import FreezePlanError
from freezeplan.model.description import Description
from freezeplan.plan.load import load_plan, load_presets
from freezeplan.plan.schema import Plan
from freezeplan.report import diff as differences
from freezeplan.report import picture, rows, terminal
from freezeplan.report.explain import explain
from freezeplan.resolve.resolution import Resolution
from freezeplan.resolve.resolver import resolve


def show(
    plan: PlanArgument,
    model: ModelArgument,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Base learning rate: show each group's own.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it, as a .png or .svg; colour shows the rate.")
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
        changes = differences.compare(first, second)
    except FreezePlanError as error:
        terminal.print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        print_json([asdict(change) for change in changes])
    else:
        terminal.print_changes(changes, equal=first.plan == second.plan)
    raise typer.Exit(1 if changes else 0)


def presets(as_json: AsJson = False) -> None:
    """List the plans that ship with freezeplan, and those that installed packages add."""
    found = load_presets()
    if as_json:
        print_json({name: plan.model_dump(mode="json", exclude_defaults=True) for name, plan in found.items()})
    else:
        terminal.print_presets(found)


def schema() -> None:
    """Print the JSON schema of a plan, for editors: point the yaml-language-server at it."""
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()})


def forecast(
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
    from freezeplan.report import forecast as costs

    found = costs.forecast(
        lambda: load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True),
        plan, image_size=image_size, batch_size=batch_size,
    ).as_json()  # fmt: skip
    if as_json:
        print_json(found)
    else:
        terminal.print_forecast(found)


def _resolve(plan: str, model: str, num_classes: int | None, model_arg: list[Any] | None) -> Resolution:
    return _resolved(plan, model, num_classes, model_arg)[0]


def _resolved(
    plan: str, model: str, num_classes: int | None, model_arg: list[Any] | None
) -> tuple[Resolution, Description]:
    loaded = load_plan(plan)  # before the imports: a mistake in the file need not wait for torch
    described = described_model(model, num_classes, model_arg)
    return resolve(loaded, described), described
