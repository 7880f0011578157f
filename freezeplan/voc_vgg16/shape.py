"""What ``results.json`` holds, as a shape that any file is checked against before a report is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from freezeplan.errors import DataError, printable
from freezeplan.plan.location import loc_text
from freezeplan.plan.schema import Plan


def _check_name(text: str) -> str:
    if not text or len(text) > 1000 or not text.isprintable():
        raise PydanticCustomError("bad_name", "expected at most 1,000 printable characters")
    return text


def _check_model(text: str) -> str:
    if ":" in text:  # it would be imported, and called
        raise PydanticCustomError("bad_model", "expected the name of a timm model; a report runs nothing of a file's")
    return text


def _check_setting(value: object) -> object:
    if not isinstance(value, (str, int, float)) and value is not None:
        raise PydanticCustomError("bad_setting", "expected text, a number, true, false or null")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Name = Annotated[str, AfterValidator(_check_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Index = Annotated[int, Field(ge=0)]


class Data(_Part):
    """What was trained on."""

    name: Name
    train: Index
    val: Index
    classes: Annotated[list[Name], Field(min_length=1)]
    sample: bool


class Val(_Part):
    """The validation images: file and index of the class of each."""

    files: list[Name]
    labels: list[Index]


class Asked(_Part):
    """What was typed."""

    data: Name | None
    download: bool
    weights: Name | None
    plans: list[Name]
    processes: Annotated[int, Field(ge=1)]


class Epoch(_Part):
    """One pass over the training images."""

    epoch: Index
    train_loss: float | None
    val_top1_error: Fraction


class Errors(_Part):
    """The errors of a run, or their means over seeds."""

    top1_error: Fraction
    top5_error: Fraction | None
    largest_error: Fraction
    first_error: Fraction
    any_error: Fraction
    train_error: Fraction


class OneRun(Errors):
    """One arm with one seed."""

    seed: int
    learned: bool
    average_precision: dict[Name, Fraction | None]
    predicted: list[Index]
    features: Index
    features_computed: Index
    features_seconds: float
    features_epochs: Index
    features_difference: float = 0.0
    graphed_steps: Index = 0
    graph_reason: str = ""
    epochs: list[Epoch]


class Deviation(_Part):
    """The deviation of each error over seeds."""

    top1_error: float | None
    top5_error: float | None
    largest_error: float | None
    first_error: float | None
    any_error: float | None
    train_error: float | None


class Pair(_Part):
    """The difference between two arms."""

    arm: Name
    base: Name
    seeds: list[int]
    mean: float | None
    deviation: float | None
    reason: Name | None


class Arm(Errors):
    """One arm over its seeds."""

    plan: Plan
    deviation: Deviation
    average_precision: dict[Name, Fraction | None]
    learned: bool
    runs: Annotated[list[OneRun], Field(min_length=1)]


class Results(_Part):
    """All that a report reads of ``results.json``; further keys are let pass."""

    versions: dict[Name, Name]
    asked: Asked
    data: Data
    val: Val
    model: Annotated[Name, AfterValidator(_check_model)]
    weights: Name
    label: Name
    settings: dict[Name, Annotated[Any, AfterValidator(_check_setting)]]
    published: dict[Name, Any]
    pairs: list[Pair]
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Results:
        classes, images = self.data.classes, len(self.val.files)
        lists = {"val.labels": self.val.labels}
        for arm, found in self.arms.items():
            if found.average_precision.keys() != set(classes):
                raise _misfit(f"arms.{arm}: average_precision", "a figure for each class")
            for run in found.runs:
                where = f"arms.{arm}, seed {run.seed}"
                lists[f"{where}: predicted"] = run.predicted
                if run.average_precision.keys() != set(classes):
                    raise _misfit(f"{where}: average_precision", "a figure for each class")
        for name, indices in lists.items():
            if len(indices) != images or any(index >= len(classes) for index in indices):
                raise _misfit(name, f"{images} indices below {len(classes)}, an image and a class each")
        if "source" not in self.published:
            raise _misfit("published", "the source of the published figures")
        return self


def _misfit(where: str, expected: str) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{where}: expected {expected}", {"where": where, "expected": expected})


def check_shape(results: Mapping[str, Any], where: str) -> None:
    """Refuse data that are not what a run writes to ``results.json``.

    Args:
        results: The content of a file.
        where: The file, for the error.

    Raises:
        DataError: Naming the first place that is wrong, and what was expected there.
    """
    try:
        Results.model_validate(dict(results))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = printable(loc_text(first["loc"]))
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        notes = ["it was not written by this version's freezeplan run"]
        raise DataError(f"{place}: {message}" if place else message, where=where, notes=notes) from None
