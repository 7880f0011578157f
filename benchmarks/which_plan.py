"""The error that each plan reaches on one data set, at the best of a few learning rates, and the time that it takes.

``python benchmarks/which_plan.py flowers5_voc.tar --weights tf_efficientnet_lite0.safetensors``

Each plan starts from the same weights and the same new classifier, and trains with AdamW for a few epochs. A plan with
a frozen prefix trains on cached features; its time includes computing them, for training and validation images. The
rate is chosen on the validation images whose error is reported, so every error is a little too low.
Compare times by their ratio: plans take turns, so other work on the machine slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from features import epoch, evaluate
from timing import machine
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import apply_plan
from freezeplan.training.pixels import normalisation
from freezeplan.training.voc import Split, load_split, read_voc
from freezeplan.voc_vgg16.weights import build

PLANS = ("linear_probe", "surgical_last", "frozen_stages_2", "full")
RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Result:
    """One training."""

    rate: float
    """The base learning rate."""
    error: float
    """Top-1 error on the validation images, in %."""
    seconds: float
    """Wall-clock time of caching, training and the last evaluation."""


def train(
    start: torch.nn.Module,
    plan: str,
    rate: float,
    data: tuple[TensorDataset, TensorDataset],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Result:
    """Train one plan at one rate, on cached features where the plan has a frozen prefix."""
    model = copy.deepcopy(start)
    torch.manual_seed(seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        applied = apply_plan(model, plan, lr=rate)
        run: torch.nn.Module = model
        train_set, val_set = data
        if applied.prefix(train_set.tensors[0][:2]).stored:
            train_set, run = applied.cached(train_set, folder, batch_size=batch_size)
            val_set, _ = applied.cached(val_set, folder, batch_size=batch_size)
        optimizer = torch.optim.AdamW(applied, weight_decay=0.05)
        for _ in range(epochs):
            epoch(run, DataLoader(train_set, batch_size, shuffle=True, drop_last=True), optimizer)
        error = 100 * evaluate(run, DataLoader(val_set, batch_size))
    return Result(rate, error, time.perf_counter() - began)


def images_of(split: Split, model: torch.nn.Module) -> TensorDataset:
    """Return the normalised images, float32 (N, 3, S, S), and their labels, int64 (N,)."""
    how = normalisation(model.pretrained_cfg, "weights")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (how.mean, how.std))
    return TensorDataset((split.images.float() / 255 - mean) / std, split.labels)


def main() -> None:
    """Train every plan at every rate and print the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder or archive in VOC's layout")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", help="a file of weights; timm's pretrained ones if not given")
    parser.add_argument("--plan", action="append", help=f"a preset or a file; by default {', '.join(PLANS)}")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times; by default 0")
    given = parser.parse_args()
    seeds = given.seed or [0]
    plans = given.plan or PLANS

    voc = read_voc(given.data)
    splits = [load_split(voc, name, image_size=given.image_size, rule="largest") for name in ("train", "val")]
    results: dict[str, dict[float, list[Result]]] = {plan: {rate: [] for rate in RATES} for plan in plans}
    for seed in seeds:
        start = build(
            given.model, classes=len(voc.classes), image_size=given.image_size, weights=given.weights, seed=seed
        )
        data = (images_of(splits[0], start), images_of(splits[1], start))
        for rate in RATES:
            for plan in plans:
                result = train(start, plan, rate, data, epochs=given.epochs, batch_size=given.batch_size, seed=seed)
                print(f"{plan}, {rate:g}, seed {seed}: {result.error:.1f} %, {result.seconds:.1f} s", file=sys.stderr)
                results[plan][rate].append(result)

    sizes = f"{len(splits[0].labels):,} training and {len(splits[1].labels):,} validation images"
    print(f"{given.model}, {sizes} of {given.image_size} pixels, {given.epochs} epochs of AdamW, ", end="")
    print(f"batch {given.batch_size}, seeds {', '.join(map(str, seeds))}, {machine()['threads']} threads")
    print(f"{'':20}{'best rate':>10}{'error':>9}{'seconds':>9}{'times faster':>14}")
    best = {
        plan: min(by_rate.values(), key=lambda runs: sum(run.error for run in runs))
        for plan, by_rate in results.items()
    }
    slowest = max(mean_seconds(runs) for runs in best.values())
    for plan, runs in best.items():
        error, seconds = sum(run.error for run in runs) / len(runs), mean_seconds(runs)
        print(f"{plan:20}{runs[0].rate:>10g}{error:>7.1f} %{seconds:>9.1f}{slowest / seconds:>13.1f}x")


def mean_seconds(runs: list[Result]) -> float:
    """Return the mean time of some trainings."""
    return sum(run.seconds for run in runs) / len(runs)


if __name__ == "__main__":
    main()
