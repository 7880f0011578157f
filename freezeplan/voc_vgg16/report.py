"""A run's results as one page of HTML that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import io
import json
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from freezeplan.atomic import whole_file
from freezeplan.errors import DataError, OutputError
from freezeplan.model import describer
from freezeplan.plan.load import load_plan
from freezeplan.report.picture import draw
from freezeplan.resolve.resolver import resolve
from freezeplan.training.settings import Settings
from freezeplan.training.voc import FORMATS, to_rgb
from freezeplan.voc_vgg16 import statistics
from freezeplan.voc_vgg16.arms import ARMS, PUBLISHED
from freezeplan.voc_vgg16.results import COLOURS, to_svg
from freezeplan.voc_vgg16.screen import LABELS, percent
from freezeplan.voc_vgg16.shape import check_shape
from freezeplan.voc_vgg16.weights import LECTURE, SAMPLE_MODEL

NAME = "report.html"
SIDE = 96
"""Of a photo in the gallery, in pixels."""
PHOTOS = 8
"""In the gallery of an arm."""


def gallery(results: Mapping[str, Any], read: Callable[[str], bytes]) -> dict[str, list[dict[str, Any]]]:
    """Return, for each arm, a few images that it gets wrong and another arm right, as small pictures.

    Args:
        results: What ``results.summarise`` returned.
        read: Name of an image in the data set to its bytes.

    Raises:
        DataError: If an image is missing or does not decode: these are the results of another data set.
    """
    return {
        arm: [
            {**asdict(found), "image": _thumbnail(found.file, read(found.file))}
            for found in statistics.mistakes(results, arm)[:PHOTOS]
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
        loader=PackageLoader("freezeplan.voc_vgg16", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "spread": spread_text, "points": _points}
    arms = list(results["arms"])
    origins = results.get("origins", {"": results})
    other = "first" if results["label"] == "largest" else "largest"
    return environment.get_template(f"{NAME}.jinja").render(
        results=results,
        seeds=max(len(found["runs"]) for found in results["arms"].values()),
        other=other,
        labels=LABELS,
        errors=[f"{key}_error" for key in ("top1", "top5", other, "any", "train")],
        colours=dict(zip(arms, cycle(COLOURS), strict=False)),
        published={arm: PUBLISHED[arm] for arm in arms if arm in PUBLISHED},
        class_errors={arm: statistics.class_errors(results, arm) for arm in arms},
        confusions={arm: statistics.confusion(results, arm) for arm in arms},
        curves=_uri(to_svg(results), "image/svg+xml"),
        plans={arm: _uri(content, "image/svg+xml") for arm, content in plan_pictures(results).items()},
        photos=photos,
        warnings=statistics.rates_too_high(results),
        savings={arm: text for arm, found in results["arms"].items() if (text := statistics.saving(found["runs"]))},
        mistakes={arm: len(statistics.mistakes(results, arm)) for arm in arms},
        settings=_by_origin(origins, "settings") | _by_origin(origins, "versions"),
        commands={where: repeat(one) for where, one in origins.items()},
    )


def _by_origin(origins: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """Return what stands in a part of each run: name -> where -> value; one nameless place where all have the same."""
    names = dict.fromkeys(name for one in origins.values() for name in one[part])
    found = {name: {where: one[part].get(name) for where, one in origins.items()} for name in names}
    return {
        name: values if any(value != first for value in values.values()) else {"": first}
        for name, values in found.items()
        for first in [next(iter(values.values()))]
    }


def plan_pictures(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the plan of each arm on the model, as SVG."""
    name = results["model"]
    model = describer.create_model(LECTURE.get(name, name), num_classes=len(results["data"]["classes"]), meta=True)
    description = describer.describe(model)
    drawn = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.svg")
        for arm, found in results["arms"].items():
            draw(resolve(load_plan(found["plan"]), description), description, path)
            drawn[arm] = path.read_bytes()
    return drawn


def repeat(results: Mapping[str, Any]) -> str:
    """Return a command that repeats a run, with all that decides its figures. It is typed where the run was.

    Args:
        results: What ``results.summarise`` returned; a merge has one for each of its ``origins``.

    Examples:
        >>> asked = {"data": "my photos", "download": False, "weights": "random", "plans": ["a.yaml"], "processes": 2}
        >>> repeat({"asked": asked, "data": {"sample": False}, "model": "resnet18",
        ...         "arms": {"scratch": {"runs": [{"seed": 0}]}, "a": {"runs": [{"seed": 0}]}},
        ...         "settings": {"epochs": 2, "clip": None, "cache": False}})  # doctest: +NORMALIZE_WHITESPACE
        "torchrun --nproc-per-node 2 -m freezeplan run voc_vgg16 --data 'my photos' --model resnet18 --weights random
        --arm scratch --plan a.yaml --seed 0 --epochs 2 --no-cache"
    """
    asked = results["asked"]
    many = ["torchrun", "--nproc-per-node", str(asked["processes"]), "-m"] if asked["processes"] > 1 else []
    words = [*many, "freezeplan", "run", "voc_vgg16"]
    words += ["--download"] if asked["download"] else []
    words += ["--data", asked["data"]] if asked["data"] is not None else []
    words += [] if results["data"]["sample"] and results["model"] == SAMPLE_MODEL else ["--model", results["model"]]
    words += ["--weights", asked["weights"]] if asked["weights"] is not None else []
    for arm in results["arms"]:
        words += ["--arm", arm] if arm in ARMS else []
    for plan in asked["plans"]:
        words += ["--plan", plan]
    for run in next(iter(results["arms"].values()))["runs"]:
        words += ["--seed", str(run["seed"])]
    for field in fields(Settings):
        value, option = results["settings"].get(field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            words += [] if value == field.default else [f"--{option}" if value else f"--no-{option}"]
        elif value is not None and field.name != "workers":  # how many threads decode decides nothing
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def spread_text(mean: float | None, deviation: float | None) -> str:
    """Write a mean and a deviation, fractions, in per cent.

    Examples:
        >>> spread_text(0.191, 0.012), spread_text(0.191, None), spread_text(None, None)
        ('19.1 ± 1.2', '19.1', '-')
    """
    return percent(mean) + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a run.

    Raises:
        DataError: If there is none, or it is not what a run of this version writes.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        notes = ["expected the folder of a finished run: freezeplan run voc_vgg16 --out DIR"]
        raise DataError(f"holds no results.json ({error.strerror})", where=str(folder), notes=notes) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", where=str(path)) from None
    wanted = ("versions", "asked", "data", "val", "model", "weights", "label", "settings", "published", "pairs", "arms")
    missing = [key for key in wanted if not isinstance(found, dict) or key not in found]
    if missing:
        notes = ["it was not written by this version's freezeplan run"]
        raise DataError(f"has no {missing[0]!r}", where=str(path), notes=notes)
    check_shape(found, str(path))
    return dict(found)


def write_report(path: Path, html: str) -> None:
    """Write the page under a temporary name, then rename it.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        with whole_file(path) as temporary:
            temporary.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(path)) from None


def _points(mean: float, deviation: float | None) -> str:
    """A difference of fractions in points, with its sign."""
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return f"{100 * mean:+.1f}{spread}".replace("-", "\N{MINUS SIGN}")


def _thumbnail(name: str, content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            small = to_rgb(picture)
            small.thumbnail((SIDE, SIDE))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        notes = ["the results are of another data set, or it is damaged"]
        raise DataError("is neither a JPEG nor a PNG that decodes", where=name, notes=notes) from None
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return _uri(buffer.getvalue(), "image/jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
