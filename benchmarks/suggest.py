"""Is a suggestion any good? Its regret against the best preset, beside that of fixed choices, on several settings.

``python benchmarks/suggest.py DATA... --weights tf_efficientnet_lite0.safetensors --json suggest.json``

A setting is a data set in VOC's layout, as it is or shifted: grey, inverted with noise, blurred. In each, every preset
is trained by ``freezeplan compare`` at three rates; then ``freezeplan suggest`` gets the training images alone and a
share of the seconds that this took. Its plan is then as good as that plan, at the suggested rate, is on the validation
images. The regret is its error less the best preset's, in points; the best preset is the best on the same validation
images, so every regret is a little too high. Presets have the rate that ``compare`` chose, the suggestion has its own,
so its regret can be below 0: "its plan at compare's rate" and "linear_probe at suggest's rate" show what the rates do.
The static preset is the one with the lowest mean error over the settings of the other data sets. Settings that are in
the JSON file already are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import vgg16_convs
from PIL import Image, ImageFilter, ImageOps
from timing import machine

from freezeplan.training.compare import RATES
from freezeplan.training.compare_command import compare_plans
from freezeplan.training.photos import split_each_class
from freezeplan.training.suggest_command import suggest_plan
from freezeplan.training.voc import Photo, open_image, read_voc

PRESETS = (
    "linear_probe", "surgical_last", "frozen_stages_2", "discriminative", "llrd", "norm_and_head", "lp_ft", "full"
)  # fmt: skip
NOISE = 40.0
"""Standard deviation of the noise, of 255."""
BLUR = 3.0
"""Radius of the blur in pixels, for an image of 128 pixels; larger ones are blurred as much in proportion."""


def grey(image: Image.Image, seed: int) -> Image.Image:
    """Take the colours out."""
    del seed
    return ImageOps.grayscale(image).convert("RGB")


def inverted(image: Image.Image, seed: int) -> Image.Image:
    """Invert the colours, and add noise that the seed decides."""
    pixels = 255 - np.asarray(image, dtype=np.float64)
    pixels += np.random.default_rng(seed).normal(0, NOISE, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image, seed: int) -> Image.Image:
    """Blur it."""
    del seed
    return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size) / 128))


SHIFTS: Mapping[str, Callable[[Image.Image, int], Image.Image] | None] = {
    "as it is": None, "inverted and noisy": inverted, "grey": grey, "blurred": blurred
}  # fmt: skip


def write_photos(data: Path, shift: str, folder: Path, images: int) -> tuple[int, int]:
    """Write at most ``images`` photos of each split as class folders, shifted; return how many there are."""
    voc = read_voc(data)
    change = SHIFTS[shift]
    counts = []
    for name, photos in (("train", voc.train), ("val", voc.val)):
        chosen = some(photos, images)
        counts.append(len(chosen))
        for photo in chosen:
            image = open_image(voc.files.read(photo.file))
            if change is not None:
                image = change(image, int(hashlib.sha256(photo.file.encode()).hexdigest()[:8], 16))
            place = folder / name / photo.objects[0].name / f"{photo.id}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            image.save(content, "PNG", compress_level=1)
            place.write_bytes(content.getvalue())
    return counts[0], counts[1]


def some(photos: Sequence[Photo], images: int) -> Sequence[Photo]:
    """Return at most about ``images`` photos, of each class its share."""
    if len(photos) <= images:
        return photos
    return split_each_class(photos, 0, images / len(photos))[1]


def run(
    data: Path, shift: str, seed: int, given: argparse.Namespace, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Run one setting: all presets, then the suggestion, then the suggested plan if it is no preset.

    Args:
        data: The data set.
        shift: How its photos are changed.
        seed: Of everything but the choice of photos.
        given: What was typed.
        known: A record of this setting, whose presets are not trained again; None: there is none.
    """
    folder, weights = Path(tempfile.mkdtemp()), given.weights
    photos = folder / name_of(data)
    if weights and weights.endswith(".npy"):
        weights = str(vgg16_convs.written(Path(weights), folder))
    shared: dict[str, Any] = {
        "model": given.model, "data": str(photos), "weights": weights, "epochs": given.epochs,
        "image_size": given.image_size, "batch_size": given.batch_size, "threads": given.threads,
    }  # fmt: skip
    try:
        record = {
            "data": photos.name, "shift": shift, "seed": seed, "images": write_photos(data, shift, photos, given.images)
        }  # fmt: skip
        if known is None:
            compare_plans(PRESETS, seed=[seed], out=folder / "all", cache_dir=folder / "cache-all", **shared)
            found = json.loads((folder / "all" / "results.json").read_text(encoding="utf-8"))
            seconds = sum(trial["seconds"] for trial in found["trials"])
            record |= {"all_seconds": seconds, "ranking": found["ranking"], "trials": found["trials"]}
        else:
            own = [trial for trial in known["trials"] if trial["plan"] in PRESETS]
            record |= {"all_seconds": known["all_seconds"], "ranking": known["ranking"], "trials": own}
        return {**record, **suggested(record, given.budget_share, folder, shared)}
    finally:
        shutil.rmtree(folder)


def suggested(record: Mapping[str, Any], share: float, folder: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Run the suggestion within its share of the time, and train its plan if that is no preset."""
    seed, budget = record["seed"], share * record["all_seconds"]
    began = time.perf_counter()
    suggest_plan(seed=seed, out=folder / "one", cache_dir=folder / "cache-one", budget=budget, **shared)
    seconds = time.perf_counter() - began
    found = json.loads((folder / "one" / "suggestion.json").read_text(encoding="utf-8"))
    trials = record["trials"]
    if found["plan"] not in PRESETS:
        own = {"seed": [seed], "lr": [found["lr"]], "out": folder / "own", "cache_dir": folder / "cache-one"}
        compare_plans([str(folder / "one" / "suggested.yaml")], **own, **shared)
        (trial,) = json.loads((folder / "own" / "results.json").read_text(encoding="utf-8"))["trials"]
        trials = [*trials, {**trial, "plan": found["plan"]}]
    return {"trials": trials, "suggest_seconds": seconds, "suggested": found}


def name_of(data: Path) -> str:
    """Return what a data set is called: ``flowers5`` for ``flowers5_voc.tar``."""
    return data.name.partition("_")[0].partition(".")[0]


def choices(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return each way of choosing -> its regret in points and its share of the cost of trying all, one a record."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        errors = {row["plan"]: 100 * row["val_error"] for row in record["ranking"]}
        best = min(errors.values())
        share = {
            plan: sum(t["seconds"] for t in record["trials"] if t["plan"] == plan) / record["all_seconds"]
            for plan in errors
        }
        cost = record["suggest_seconds"] / record["all_seconds"]
        plan, ranking = record["suggested"]["plan"], record["suggested"]["ranking"]
        found.setdefault("suggest", []).append((suggested_error(record) - best, cost))
        if plan in errors:
            found.setdefault("its plan at compare's rate", []).append((errors[plan] - best, cost))
        if ranking and ranking[0]["plan"] in errors:
            error = at_rate(record, ranking[0]["plan"], ranking[0]["lr"])
            found.setdefault("first of its trials, noise or not", []).append((error - best, cost))
        probe = next((row for row in ranking if row["plan"] == "linear_probe"), None)
        if probe is not None:
            error = at_rate(record, "linear_probe", probe["lr"])
            found.setdefault("linear_probe at suggest's rate", []).append((error - best, share["linear_probe"]))
        for plan in ("linear_probe", "surgical_last", "full", "llrd"):
            found.setdefault(f"always {plan}", []).append((errors[plan] - best, share[plan]))
        others = [other for other in records if other["data"] != record["data"]]
        if others:
            static = best_static(others)
            found.setdefault("best static preset", []).append((errors[static] - best, share[static]))
    return found


def best_static(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the preset with the lowest mean error over some settings."""
    errors: dict[str, list[float]] = {}
    for record in records:
        for row in record["ranking"]:
            errors.setdefault(row["plan"], []).append(row["val_error"])
    return min(errors, key=lambda plan: fmean(errors[plan]))


def suggested_error(record: Mapping[str, Any]) -> float:
    """Return the validation error, in %, of the suggested plan at the suggested rate."""
    return at_rate(record, record["suggested"]["plan"], record["suggested"]["lr"])


def at_rate(record: Mapping[str, Any], plan: str, lr: float | None) -> float:
    """Return the validation error of a plan in %, at a rate; without one at the rate that ``compare`` chose."""
    if lr is None:
        return next(100 * row["val_error"] for row in record["ranking"] if row["plan"] == plan)
    return next(100 * trial["val_error"] for trial in record["trials"] if (trial["plan"], trial["lr"]) == (plan, lr))


def show(records: Sequence[Mapping[str, Any]]) -> None:
    """Print errors of all presets by setting, then regret and cost of every way of choosing, as tables in Markdown."""
    print("| setting | seed | " + " | ".join(PRESETS) + " | suggested | its error | its seconds, of all |")
    print("|---|---|" + "---|" * (len(PRESETS) + 3))
    for record in records:
        errors = {row["plan"]: 100 * row["val_error"] for row in record["ranking"]}
        best = min(errors.values())
        cells = [f"**{errors[plan]:.1f}**" if errors[plan] == best else f"{errors[plan]:.1f}" for plan in PRESETS]
        suggested, own = record["suggested"], suggested_error(record)
        plan = suggested["plan"] + (f", {suggested['lr']:g}" if suggested["lr"] else "")
        time_of = f"{record['suggest_seconds']:.0f} of {record['all_seconds']:.0f}"
        name = f"{record['data']}, {record['shift']}"
        print(f"| {name} | {record['seed']} | {' | '.join(cells)} | {plan} | {own:.1f} | {time_of} |")
    print()
    print(
        "| choice | settings | mean regret, points | deviation | worst | best or as good | mean share of the cost ",
        end="",
    )
    print("| suggest's regret less its |")
    print("|---|---|---|---|---|---|---|---|")
    chosen = choices(records)
    ours = [regret for regret, _ in chosen["suggest"]]
    for name, found in chosen.items():
        regrets, shares = zip(*found, strict=True)
        spread = f"{stdev(regrets):.1f}" if len(regrets) > 1 else ""
        wins = sum(regret <= 0 for regret in regrets)
        row = [name, str(len(regrets)), f"{fmean(regrets):.1f}", spread, f"{max(regrets):.1f}", f"{wins}"]
        row.append(f"{100 * fmean(shares):.0f} %")
        row.append(difference(ours, regrets) if name != "suggest" and 1 < len(regrets) == len(ours) else "")
        print(f"| {' | '.join(row)} |")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the mean of paired differences, with its 95 % bootstrap interval over the settings."""
    found = np.subtract(ours, theirs)
    means = np.random.default_rng(0).choice(found, (10_000, len(found))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{found.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Run the settings that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folders or archives in VOC's layout, named NAME_voc.tar")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", help="a file of weights, or vgg16_convs.npy; timm's pretrained ones if not given")
    parser.add_argument("--shift", action="append", choices=SHIFTS, help="may be given several times; by default all")
    parser.add_argument("--images", type=int, default=400, help="photos of each split, at most")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times; by default 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-share", type=float, default=0.15, help="of the seconds of trying all, for suggest")
    parser.add_argument("--json", type=Path, help="keeps the results; those in it are not computed again")
    parser.add_argument("--again", action="store_true", help="suggest anew where the file has a setting's presets")
    given = parser.parse_args()
    asked = ("model", "weights", "images", "epochs", "image_size", "batch_size", "threads", "budget_share")
    options = {key: getattr(given, key) for key in asked} | {"rates": list(RATES), "presets": list(PRESETS)}
    options["weights"] = given.weights and Path(given.weights).name
    kept: dict[str, Any] = {"options": options, "machine": {**machine(), "python": platform.python_version()}}
    records: list[dict[str, Any]] = []
    if given.json and given.json.exists():
        kept = json.loads(given.json.read_text(encoding="utf-8"))
        records = kept.pop("records")
        if kept["options"] != options:
            sys.exit(f"{given.json} has other options: {kept['options']}")
    known = {(record["data"], record["shift"], record["seed"]): record for record in records}
    for setting in itertools.product(given.seed or [0], given.shift or SHIFTS, given.data):
        seed, shift, data = setting
        key = (name_of(data), shift, seed)
        if key not in known or given.again:
            print(*key, sep=", ", file=sys.stderr)
            known[key] = run(data, shift, seed, given, known.get(key))
        if given.json:
            text = json.dumps({**kept, "records": list(known.values())})
            given.json.write_text(text, encoding="utf-8")
    records = list(known.values())
    show(records)


if __name__ == "__main__":
    main()
