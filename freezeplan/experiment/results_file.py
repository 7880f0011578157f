"""The shape of ``results.json``, and reading one that somebody may have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from freezeplan.errors import DataError
from freezeplan.experiment.voc import LabelRule
from freezeplan.plan import Plan

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
_EXPECTED = dict.fromkeys(("model_type", "dict_type"), "should be a mapping")
_EXPECTED |= dict.fromkeys(("list_type", "tuple_type"), "should be a list") | {"too_short": "should not be empty"}


NOTE = "it is damaged, or was not written by this version's freezeplan run"


def _plain(value: object) -> object:
    if not isinstance(value, str | int | float | None):
        raise ValueError("should be text, a number, true, false or null")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Epoch(_Part):
    epoch: int
    train_loss: float | None
    val_top1_error: Fraction


class _Run(_Part):
    seed: int
    top1_error: Fraction
    top5_error: Fraction | None
    any_error: Fraction
    train_error: Fraction
    learned: bool
    mean_average_precision: Fraction | None
    average_precision: dict[str, Fraction | None]
    predicted: list[Count]
    seconds: float
    features: Count
    features_computed: Count
    features_seconds: float
    epochs: Annotated[list[_Epoch], Field(min_length=1)]


class _Deviations(_Part):
    top1_error: float | None
    top5_error: float | None
    any_error: float | None
    train_error: float | None


class _Arm(_Part):
    plan: Plan
    top1_error: Fraction
    top5_error: Fraction | None
    any_error: Fraction
    train_error: Fraction
    deviation: _Deviations
    learned: bool
    runs: Annotated[list[_Run], Field(min_length=1)]


class _Data(_Part):
    name: str
    train: Count
    val: Count
    classes: Annotated[list[str], Field(min_length=1)]
    sample: bool
    skipped: list[str]


class _Val(_Part):
    files: list[str]
    labels: list[Count]


class _Asked(_Part):
    data: str | None
    download: bool
    weights: str | None
    plans: list[str]
    processes: Annotated[int, Field(ge=1)]


class _Published(_Part):
    source: str


class _Results(_Part):
    versions: dict[str, str]
    asked: _Asked
    data: _Data
    val: _Val
    model: str
    weights: str
    label: LabelRule
    settings: dict[str, Annotated[Any, AfterValidator(_plain)]]
    published: _Published
    arms: Annotated[dict[str, _Arm], Field(min_length=1)]


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a run.

    Raises:
        DataError: If there is none, it is damaged, or another version wrote it; with the first field that is wrong.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        checked = _Results.model_validate(found)
    except OSError as error:
        notes = ["expected the folder of a finished run: freezeplan run voc_vgg16 --out DIR"]
        raise DataError(f"holds no results.json ({error.strerror})", where=str(folder), notes=notes) from None
    except ValidationError as error:
        raise DataError(_sentence(error), where=str(path), notes=[NOTE]) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", where=str(path)) from None
    wrong = next(_disagreements(checked), None)
    if wrong is not None:
        raise DataError(wrong, where=str(path), notes=[NOTE])
    return dict(found)


def _sentence(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False)
    *parents, last = map(str, first["loc"]) if first["loc"] else ("the file",)
    if first["type"] == "missing":
        message = f"{'.'.join(parents) + ' ' if parents else ''}has no {last!r}"
    else:
        what = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        found = repr(first["input"])
        message = f"{'.'.join((*parents, last))} {what}, found {found if len(found) <= 60 else found[:57] + '...'}"
    return message + (f"; and {len(others)} more" if others else "")


def _disagreements(results: _Results) -> Iterator[str]:
    """Yield what is right by itself and does not go with the rest."""
    classes, images = len(results.data.classes), len(results.val.labels)
    if len(results.val.files) != images:
        yield f"val.files has {len(results.val.files)} entries, val.labels {images}"
    if any(label >= classes for label in results.val.labels):
        yield f"val.labels holds {max(results.val.labels)}, data.classes has {classes} entries"
    for arm, found in results.arms.items():
        for number, run in enumerate(found.runs):
            place = f"arms.{arm}.runs.{number}"
            if len(run.predicted) != images:
                yield f"{place}.predicted has {len(run.predicted)} entries, val.labels {images}"
            if any(guess >= classes for guess in run.predicted):
                yield f"{place}.predicted holds {max(run.predicted)}, data.classes has {classes} entries"
            if list(run.average_precision) != results.data.classes:
                yield f"{place}.average_precision is of other classes than data.classes"
