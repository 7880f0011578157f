"""A run's results as one page of HTML that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import io
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from freezeplan import zoo
from freezeplan.errors import DataError, OutputError
from freezeplan.experiment import statistics
from freezeplan.experiment.arms import ARMS, PUBLISHED
from freezeplan.experiment.results import COLOURS, to_svg
from freezeplan.experiment.screen import LABELS, percent
from freezeplan.experiment.weights import LECTURE
from freezeplan.load import load_plan
from freezeplan.picture import draw
from freezeplan.resolve import resolve

NAME = "report.html"
SIDE = 96
"""Of a photo in the gallery, in pixels."""
DECISIVE = (
    "epochs", "batch_size", "image_size", "lr", "optimizer", "label", "augment", "normalise", "flatten", "resize",
    "clip", "warmup", "amp",
)  # fmt: skip
"""Settings that a command has to name to repeat a run."""
PHOTOS = 8
"""In the gallery of an arm."""


def gallery(results: Mapping[str, Any], read: Callable[[str], bytes]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each arm, a few images that it gets wrong and another arm right, as small pictures.

    Args:
        results: What ``results.summarise`` returned.
        read: Name of an image in the data set to its bytes.
    """
    return {
        arm: [
            {**asdict(found), "image": _thumbnail(read(found.file))}
            for found in statistics.mistakes(results, arm, PHOTOS)
        ]
        for arm in results["arms"]
    }


def to_html(results: Mapping[str, Any], photos: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> str:
    """Write the page. Whatever comes from data, plans or file names is escaped.

    Args:
        results: What ``results.summarise`` or ``statistics.merge`` returned.
        photos: What ``gallery`` returned; None if the images are not at hand.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("freezeplan.experiment", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "spread": spread_text, "points": _points}
    arms = list(results["arms"])
    base = "scratch" if "scratch" in arms else arms[0]
    other = "first" if results["label"] == "largest" else "largest"
    seeds = max(len(found["runs"]) for found in results["arms"].values())
    return environment.get_template(f"{NAME}.jinja").render(
        results=results,
        seeds=seeds,
        other=other,
        labels=LABELS,
        base=base,
        colours=dict(zip(arms, cycle(COLOURS), strict=False)),
        published={arm: PUBLISHED[arm] for arm in arms if arm in PUBLISHED},
        errors={
            arm: [
                statistics.error_spread(results, arm, f"{key}_error") for key in ("top1", "top5", other, "any", "train")
            ]
            for arm in arms
        },
        paired={arm: statistics.paired(results, arm, base) for arm in arms if arm != base} if seeds > 1 else {},
        class_errors={arm: statistics.class_errors(results, arm) for arm in arms},
        precision={arm: found["runs"][0]["average_precision"] for arm, found in results["arms"].items()},
        confusions={arm: statistics.confusion(results, arm) for arm in arms},
        curves=_uri(to_svg(results), "image/svg+xml"),
        plans={arm: _uri(content, "image/svg+xml") for arm, content in plan_pictures(results).items()},
        photos=photos,
        command=repeat(results),
    )


def plan_pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the plan of each arm on the model, as SVG."""
    name = results["model"]
    model = zoo.create_model(LECTURE.get(name, name), num_classes=len(results["data"]["classes"]), meta=True)
    description = zoo.describe(model)
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.svg")
        for arm, found in results["arms"].items():
            draw(resolve(load_plan(found["plan"]), description), description, path)
            drawn[arm] = path.read_bytes()
    return drawn


def repeat(results: Mapping[str, Any]) -> str:
    """Return a command that repeats a run, with all that decides its figures.

    Examples:
        >>> settings = {"epochs": 2, "batch_size": 8, "image_size": 64, "lr": 0.1, "optimizer": "rmsprop"}
        >>> arms = {"scratch": {"runs": [{"seed": 0}]}}
        >>> repeat({"data": {"name": "my photos", "sample": False}, "model": "resnet18", "weights": "random",
        ...         "settings": settings, "arms": arms})  # doctest: +NORMALIZE_WHITESPACE
        "freezeplan run voc_vgg16 --data 'my photos' --model resnet18 --arm scratch --seed 0 --epochs 2 --batch-size 8
        --image-size 64 --lr 0.1 --optimizer rmsprop"
    """
    words = ["freezeplan", "run", "voc_vgg16"]
    if not results["data"]["sample"]:
        words += ["--data", results["data"]["name"]]
    if results["model"] != "vgg16_slim_fc256":
        words += ["--model", results["model"]]
    for arm in results["arms"]:
        words += ["--arm", arm] if arm in ARMS else ["--plan", arm]
    for seed in sorted({run["seed"] for found in results["arms"].values() for run in found["runs"]}):
        words += ["--seed", str(seed)]
    for name in DECISIVE:
        value = results["settings"].get(name)
        if value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def spread_text(found: statistics.Spread | None) -> str:
    """Write a spread of fractions in per cent.

    Examples:
        >>> spread_text(statistics.Spread(0.191, 0.012, 3)), spread_text(statistics.Spread(0.191, None, 1))
        ('19.1 ± 1.2', '19.1')
    """
    if found is None:
        return "-"
    return percent(found.mean) + ("" if found.deviation is None else f" ± {100 * found.deviation:.1f}")


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a run.

    Raises:
        DataError: If there is none, or it was written before reports were.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        notes = ["expected the folder of a finished run: freezeplan run voc_vgg16 --out DIR"]
        raise DataError(f"holds no results.json ({error.strerror})", where=str(folder), notes=notes) from None
    except ValueError as error:
        raise DataError(f"is no JSON ({error})", where=str(path)) from None
    wanted = ("data", "val", "model", "weights", "label", "settings", "published", "arms")
    missing = [key for key in wanted if not isinstance(found, dict) or key not in found]
    if missing:
        notes = ["it was not written by this version's freezeplan run"]
        raise DataError(f"has no {missing[0]!r}", where=str(path), notes=notes)
    return dict(found)


def write_report(path: Path, html: str) -> None:
    """Write the page under a temporary name, then rename it.

    Raises:
        OutputError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _points(found: statistics.Spread) -> str:
    """A difference of fractions in points, with its sign."""
    deviation = "" if found.deviation is None else f" ± {100 * found.deviation:.1f}"
    return f"{100 * found.mean:+.1f}{deviation}".replace("-", "\N{MINUS SIGN}")


def _thumbnail(content: bytes) -> str:
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as picture:
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return _uri(buffer.getvalue(), "image/jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
