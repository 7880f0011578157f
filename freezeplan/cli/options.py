"""What several commands take and give alike: plans, models, photos, JSON."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from freezeplan.cli import completion
from freezeplan.errors import did_you_mean
from freezeplan.model.description import Description
from freezeplan.training.settings import Device

_PLAN = "A plan file (.yaml, .toml, .json) or a preset's name."
_MODEL = "A timm model name, or package.module:function."


def key_value(text: str) -> tuple[str, Any]:
    """Read an argument for creating a model.

    Raises:
        typer.BadParameter: If it is not a name, an equals sign, and a value.

    Examples:
        >>> key_value("img_size=32"), key_value("pos_embed=none")
        (('img_size', 32), ('pos_embed', 'none'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"expected KEY=VALUE, found {text!r}", param_hint="--model-arg")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def one_of(words: Any, metavar: str | None = None) -> dict[str, Any]:
    """Return what makes an option or argument one of the words of a ``Literal``: parsed, completed, in the help.

    The parser raises ``typer.BadParameter`` for another word, with the nearest of them.

    Examples:
        >>> from typing import Literal
        >>> one_of(Literal["cpu", "cuda"])["parser"]("cpu")
        'cpu'
    """
    known = get_args(words)

    def parse(given: object) -> str:
        word = str(given)  # a settings file may hold a number
        if word not in known:
            found = f"{word!r} is not one of {', '.join(map(repr, known))}"
            raise typer.BadParameter("; ".join([found, *did_you_mean(word, known)]))
        return word

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return {"parser": parse, "metavar": metavar or f"<{'|'.join(known)}>", "autocompletion": complete}


PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help=_PLAN, autocompletion=completion.plans)]
PlanOption = Annotated[str, typer.Option(metavar="PLAN", help=_PLAN, autocompletion=completion.plans)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, autocompletion=completion.models)]
OptionalModel = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL, autocompletion=completion.models)]
ModelOption = Annotated[str, typer.Option(metavar="MODEL", help=_MODEL, autocompletion=completion.models)]
NumClasses = Annotated[int | None, typer.Option(min=0, help="Number of classes; the model's own if not given.")]
ModelArg = Annotated[
    list[Any] | None,
    typer.Option(metavar="KEY=VALUE", parser=key_value, help="An argument for creating the model; repeatable."),
]
DataOption = Annotated[
    str,
    typer.Option(metavar="DATA", help="Class folders, a tar of them, a table, VOC's layout, or hfds/NAME."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE|random", help="safetensors or a checkpoint.", show_default="timm's pretrained"),
]
DataDirOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Where a data set that timm reads is kept.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images a step.")]
ImageSizeOption = Annotated[int | None, typer.Option(min=1, help="Side in pixels.", show_default="the model's own")]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out broken images, and classes that are in one split only.")
]
DeviceOption = Annotated[Device, typer.Option(**one_of(Device), help="auto: CUDA where there is one.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads inside torch.", show_default="one a core")]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode images.", show_default="one a core")
]
CacheDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where features are.", show_default="the user's cache folder")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def described_model(model: str, num_classes: int | None, model_arg: list[Any] | None) -> Description:
    """Describe a model that was named on the command line; it is made without memory for its weights."""
    from freezeplan.model.describer import describe
    from freezeplan.model.source import load_model

    return describe(load_model(model, dict(model_arg or ()), num_classes=num_classes, meta=True))


def print_json(data: object) -> None:
    """Print data as JSON, names as they are written; what is no number, which JSON cannot say, is null."""
    typer.echo(json.dumps(_numbers(data), indent=2, ensure_ascii=False, allow_nan=False))


def _numbers(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _numbers(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_numbers(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
