"""The commands ``verify`` and ``delta``: whether a freeze held between two files, and what a delta file holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freezeplan.cli.options import AsJson, ModelArg, ModelOption, NumClasses, PlanOption, print_json
from freezeplan.errors import FreezePlanError, OutputError, PlanError, WeightsError
from freezeplan.report import terminal

if TYPE_CHECKING:
    from freezeplan.proof.seal import Verification

DeltaFile = Annotated[Path, typer.Argument(metavar="DELTA", help="A file that applied.save_delta(path) wrote.")]

delta = typer.Typer(help="What a delta file holds; put it on its base; compare two.", no_args_is_help=True)


def verify(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Weights: safetensors or a checkpoint.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The same model's weights later.")],
    plan: PlanOption,
    model: ModelOption,
    num_classes: NumClasses = None,
    model_arg: ModelArg = None,
    as_json: AsJson = False,
) -> None:
    """Say whether what a plan freezes is the same in two files; exit code 0: held, 1: moved, 2: not comparable.

    If a checkpoint also holds averaged weights (EMA), the normal weights are compared, not the average.
    """
    try:
        with terminal.waiting("comparing weights"):
            found = _compared(before, after, plan, model, num_classes, model_arg)
    except FreezePlanError as error:
        terminal.print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        print_json({"held": bool(found), **asdict(found)})
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found else 1)


def _compared(
    before: Path, after: Path, plan: str, model: str, num_classes: int | None, model_arg: list[Any] | None
) -> Verification:
    from freezeplan.api import resolve_plan
    from freezeplan.model.source import load_model
    from freezeplan.plan.load import load_plan
    from freezeplan.proof.seal import compare_states
    from freezeplan.proof.weights_file import read_state

    loaded = load_plan(plan)
    described = load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True)
    resolution = resolve_plan(loaded, described)
    found = compare_states(
        described, resolution, read_state(before), read_state(after), origins=(str(before), str(after))
    )
    if not found.checked:  # nothing moved of nothing: a wrong plan would prove whatever one likes
        throughout = " in all its phases" if loaded.phases else ""
        notes = [f"freezeplan show {plan} {model} says what it does; give the plan that was trained with"]
        raise PlanError(f"plan {loaded.title!r} freezes nothing of {model}{throughout}", notes=notes)
    return found


@delta.command()
def inspect(file: DeltaFile, as_json: AsJson = False) -> None:
    """Say what a delta file holds: plan, phase, model, timm's version, base, tensors."""
    from freezeplan.proof.delta import read

    found = read(file)
    facts = {
        "plan": found.plan.title,
        "phase": found.phase,
        "model": found.model,
        "timm": found.timm,
        "base": found.base,
        "held": len(found.held),
        "bytes": found.bytes,
    }
    if as_json:
        shapes = {name: list(tensor.shape) for name, tensor in found.tensors.items()}
        plan = found.plan.model_dump(mode="json", exclude_defaults=True)
        print_json({**facts, "plan": plan, "tensors": shapes})
        return
    for key, value in facts.items():
        if value != "":
            typer.echo(f"{key:<6} {value:,}" if isinstance(value, int) else f"{key:<6} {value}")
    for name, tensor in found.tensors.items():
        typer.echo(f"  {name}  {' x '.join(map(str, tensor.shape)) or 'scalar'}")


@delta.command("apply")
def apply_(
    file: DeltaFile,
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The base's weights: safetensors or a checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the whole weights go: a .safetensors file.")],
) -> None:
    """Write the weights of the base with the delta in it; another base is refused by the first tensor that differs."""
    from freezeplan.proof.delta import apply_to_state, read, write
    from freezeplan.proof.weights_file import read_state

    if out.suffix.lower() != ".safetensors":
        notes = [f"give {out.stem or 'whole'}.safetensors"]
        raise OutputError("OUT is written as safetensors, and ends in .safetensors", where=str(out), notes=notes)
    for what, path in (("DELTA", file), ("BASE", base)):
        if out.resolve() == path.resolve():
            notes = ["give the whole weights a file of their own"]
            raise OutputError(f"OUT is {what} itself, which stays as it is", where=str(out), notes=notes)
    found = read(file)
    with terminal.waiting("checking the base and writing the weights"):
        write(apply_to_state(found, read_state(base), where=str(file), base=str(base)), None, out)
    typer.echo(f"{out}: {found.model} with {len(found.tensors)} tensors of {file}")


@delta.command()
def diff(
    file: DeltaFile,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another delta file.")],
    as_json: AsJson = False,
) -> None:
    """Say in what two delta files differ; exit code 0: nothing, 1: something, 2: they cannot be compared."""
    from freezeplan.proof.delta import compare, read

    try:
        changes = compare(read(file), read(other))
    except WeightsError as error:
        terminal.print_error(error)
        raise typer.Exit(2) from None
    if as_json:
        print_json([asdict(change) for change in changes])
    else:
        for change in changes:
            typer.echo(f"{change.name}: {change.text}")
        if not changes:
            typer.echo("the same delta")
    raise typer.Exit(1 if changes else 0)
