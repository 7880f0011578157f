"""What a run found out as plain data, and its files: all of it, a row a run, a row an arm, and the curves."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import compress, cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import freezeplan
from freezeplan.atomic import write_all
from freezeplan.errors import OutputError
from freezeplan.model import describer
from freezeplan.training.compare_report import svg
from freezeplan.training.settings import Settings
from freezeplan.training.train import Run
from freezeplan.training.voc import VocData
from freezeplan.voc_vgg16.arms import PUBLISHED, SOURCE, Outcome
from freezeplan.voc_vgg16.statistics import ERRORS, arm_of, pairs

FILES = ("results.json", "results.csv", "summary.csv", "curves.png")
COLUMNS = ("arm", "seed", *ERRORS, "mean_average_precision", "learned", "epochs", "seconds")
SUMMARY = ("arm", "seeds", *(f"{key}_{what}" for key in ERRORS for what in ("mean", "deviation")), "learned")
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito's, told apart by colour-blind readers too


def summarise(
    outcome: Outcome,
    data: VocData,
    settings: Settings,
    *,
    model: str,
    weights: str,
    sample: bool,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Write down a run as data for JSON: figures are means over the seeds, errors fractions from 0 to 1.

    Args:
        outcome: What was trained.
        data: On what.
        settings: And how.
        model: Name of the model as it was asked for.
        weights: What the weights are called.
        sample: Whether the data are the embedded sample.
        asked: What was typed and is not in the rest: ``data``, ``download``, ``weights``, ``plans``, and the number of
            ``processes``.

    Returns:
        The content of ``results.json``. ``top5_error`` is None for five classes or fewer, ``train_loss`` where it was
        not finite.
    """
    arms = {
        arm: arm_of(
            plan.model_dump(mode="json", exclude_defaults=True),
            [_run(run, data.classes) for run in outcome.runs[arm]],
        )
        for arm, plan in outcome.plans.items()
    }
    return {
        "versions": {
            "freezeplan": freezeplan.__version__,
            "timm": describer.version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "card": card(settings.device),
        },
        "asked": dict(asked),
        "data": {
            "name": data.name,
            "train": outcome.train_images,
            "val": outcome.val_images,
            "classes": list(data.classes),
            "sample": sample,
            "skipped": list(outcome.skipped),
        },
        "val": {"files": [file for file, _ in outcome.val], "labels": [label for _, label in outcome.val]},
        "model": model,
        "weights": weights,
        "label": settings.label,
        "settings": asdict(settings),
        "published": {"source": SOURCE, **{arm: asdict(PUBLISHED[arm]) for arm in outcome.plans if arm in PUBLISHED}},
        "pairs": pairs(arms),
        "arms": arms,
    }


def card(device: str) -> str:
    """Name what a run computed on, and how exact its float32 products are.

    Examples:
        >>> card("cpu").startswith("CPU, ")
        True
    """
    if not device.startswith("cuda"):
        return f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    exact = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = "with TF32 in {}".format(" and ".join(compress(("products", "convolutions"), exact))) if any(exact) else ""
    return f"{torch.cuda.get_device_name(device)}, {tf32 or 'without TF32'}"


def to_csv(results: Mapping[str, Any]) -> str:
    """Write one row an arm and seed, a header first. Empty: there is no such figure.

    Examples:
        >>> to_csv({"arms": {}}).strip().split(",")[:3]
        ['arm', 'seed', 'top1_error']
    """
    return _table(
        COLUMNS,
        (
            {**run, "arm": arm, "epochs": len(run["epochs"])}
            for arm, found in results["arms"].items()
            for run in found["runs"]
        ),
    )


def to_summary(results: Mapping[str, Any]) -> str:
    """Write one row an arm, a header first: means and sample standard deviations over its seeds.

    Examples:
        >>> to_summary({"arms": {}}).strip().split(",")[:4]
        ['arm', 'seeds', 'top1_error_mean', 'top1_error_deviation']
    """
    return _table(
        SUMMARY,
        (
            {
                "arm": arm,
                "seeds": len(found["runs"]),
                **{f"{key}_mean": found[key] for key in ERRORS},
                **{f"{key}_deviation": found["deviation"][key] for key in ERRORS},
                "learned": found["learned"],
            }
            for arm, found in results["arms"].items()
        ),
    )


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_png(results: Mapping[str, Any]) -> bytes:
    """Draw training loss and validation top-1 error over the epochs, one colour an arm, one line a seed."""
    picture = io.BytesIO()
    _curves(results).savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def to_svg(results: Mapping[str, Any]) -> bytes:
    """Draw the same as ``to_png`` as SVG."""
    return svg(_curves(results), "curves")


def _curves(results: Mapping[str, Any]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, error = figure.subplots(1, 2)
    for (arm, found), colour in zip(results["arms"].items(), cycle(COLOURS), strict=False):
        label = _legend(arm, found)
        for number, run in enumerate(found["runs"]):
            epochs = [epoch["epoch"] for epoch in run["epochs"]]
            losses = [math.nan if epoch["train_loss"] is None else epoch["train_loss"] for epoch in run["epochs"]]
            errors = [100 * epoch["val_top1_error"] for epoch in run["epochs"]]
            # A floor keeps a loss of exactly zero on the logarithmic axis.
            for axes, values in ((loss, [max(value, 1e-8) for value in losses]), (error, errors)):
                axes.plot(epochs, values, color=colour, marker="o", markersize=3, label=None if number else label)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    error.set(title="Validation top-1 error", xlabel="epoch", ylabel="%", ylim=(0, 100))
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    kind = "embedded sample, not VOC" if results["data"]["sample"] else results["data"]["name"]
    figure.suptitle(f"{results['model']} on {kind}".replace("$", r"\$"))
    return figure


def finished(out: Path) -> bool:
    """Return whether a folder holds all files of a run."""
    return all((out / name).exists() for name in FILES)


def ran_with(out: Path) -> dict[str, Any]:
    """Return all that decided the figures of a finished run, as its ``results.json`` says.

    Raises:
        OutputError: If the file does not say so: it is damaged, or of an earlier version.
    """
    path = out / FILES[0]
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["facts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        notes = ["--overwrite starts anew, or give another --out"]
        raise OutputError("does not say what the run was begun with", where=str(path), notes=notes) from None


def check_free(out: Path, *, overwrite: bool) -> None:
    """Make sure, before anything is trained, that results can be written to a folder. Changes nothing.

    Raises:
        OutputError: If the folder holds results that may not be overwritten, is a file, or cannot be written.
    """
    held = [name for name in FILES if (out / name).exists()] if out.is_dir() else []
    if held and not overwrite:
        notes = ["--overwrite replaces them, or give another folder with --out"]
        raise OutputError(f"already holds {', '.join(held)}", where=str(out), notes=notes)
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not place.is_dir():
        raise OutputError(f"{place} is a file, expected a folder", where=str(out))
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place} cannot be written to", where=str(out))


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Write the files to a folder, which is made if need be: all of them or, where that fails, none.

    Args:
        out: The folder; files of an earlier run in it are replaced.
        results: What ``summarise`` returned.

    Raises:
        OutputError: If they cannot be written, for example because the disk is full. Nothing half-written stays.
    """
    json_text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    made = json_text.encode(), to_csv(results).encode(), to_summary(results).encode(), to_png(results)
    contents = dict(zip(FILES, made, strict=True))
    try:
        write_all(out, contents)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        notes = ["nothing half-written was left behind; the figures are above"]
        raise OutputError(f"results cannot be written: {reason}", where=str(out), notes=notes) from error


def _run(run: Run, classes: tuple[str, ...]) -> dict[str, Any]:
    """All fields of a run under their own names, those of its validation errors among them."""
    found = asdict(run)
    errors = found.pop("val")
    precision = dict(zip(classes, errors.pop("average_precision"), strict=True))
    known = [value for value in precision.values() if value is not None]
    for epoch in found["epochs"]:
        epoch["train_loss"] = epoch["train_loss"] if math.isfinite(epoch["train_loss"]) else None
    return {
        "seed": found.pop("seed"),
        **errors,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in found.items()},
        "mean_average_precision": fmean(known) if known else None,
        "average_precision": precision,
    }


def _legend(arm: str, found: Mapping[str, Any]) -> str:
    return f"{arm} ({100 * found['top1_error']:.1f} %{'' if found['learned'] else ', did not learn'})"
