"""The command ``import``: another tool's settings as a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from freezeplan.atomic import whole_file
from freezeplan.cli import completion
from freezeplan.cli.options import AsJson, ModelArg, NumClasses, described_model, one_of
from freezeplan.errors import OutputError
from freezeplan.importers import finetuning_scheduler, mmengine, timm_args
from freezeplan.plan.dump import dump
from freezeplan.report import terminal

Format = Literal["timm", "finetuning-scheduler", "mmengine"]
_SUFFIXES = (".yaml", ".yml", ".json")


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
        Path | None, typer.Option(metavar="FILE", help="Where the plan goes: .yaml or .json.", show_default="stdout")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out is.")] = False,
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
    if out is not None:
        _check_free(out, file, overwrite=overwrite)
    else:
        _only_with("--out", "", {"overwrite": overwrite or None})
    if format == "timm":
        imported = timm_args.read(file)
    elif format == "mmengine":
        if model is None:
            _only_with("--model", "", target)
        imported = mmengine.read(file, None if model is None else described_model(model, num_classes, model_arg))
    else:
        given: dict[str, Any] = {key: value for key, value in stopping.items() if value is not None}
        imported = finetuning_scheduler.read(file, **given)
    data = imported.plan.model_dump(mode="json", exclude_defaults=True)
    as_yaml = dump(imported.plan, comments=imported.notes)
    is_json = as_json or (out is not None and out.suffix.lower() == ".json")
    text = f"{json.dumps(data, indent=2, ensure_ascii=False)}\n" if is_json else as_yaml
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


def _check_free(out: Path, file: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is read, a place that the plan cannot go to."""
    if out.suffix.lower() not in _SUFFIXES:
        notes = [f"--out {out.stem or 'plan'}.yaml"]
        known = f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        raise OutputError(f"a plan is written to a file that ends in {known}", where=str(out), notes=notes)
    if out.resolve() == file.resolve():
        notes = ["give the plan a file of its own"]
        raise OutputError("OUT is FILE itself, which stays as it is", where=str(out), notes=notes)
    if out.exists() and not overwrite:
        notes = ["--overwrite replaces it, or give another file with --out"]
        raise OutputError("is there already", where=str(out), notes=notes)


def _only_with(owner: str, given: str, options: dict[str, Any]) -> None:
    """Refuse options that belong to another format, or to an option that is not given."""
    for name, value in options.items():
        if value is not None and given != owner:
            raise typer.BadParameter(f"only with {owner}", param_hint=f"--{name.replace('_', '-')}")
