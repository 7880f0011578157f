"""Freezing the first k stages, without a cache: does a step cost what the remaining arithmetic predicts?

``python benchmarks/partial.py --model resnet50``. For each k one step, forward and backward without an optimizer, in
turns with the step that trains everything. Predicted is the ratio of FLOPs, of both passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import alternate, show
from torch import nn

from freezeplan import apply_plan
from freezeplan.cache.replay import Rest, capture
from freezeplan.model.describer import create_model
from freezeplan.report.forecast import forecast


def main() -> None:
    """Time every k in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    size, batch = given.image_size, given.batch_size
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))

    def step(plan: object) -> Callable[[], None]:
        model = create_model(given.model, num_classes=10)
        apply_plan(model, plan, lr=1.0)
        model.train()

        def run() -> None:
            model.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()

        return run

    everything = {"match": ".*", "lr_mult": 1}
    plans = {"everything trained": {"version": 1, "rules": [everything]}}
    for k in range(1, 6 if given.model.startswith("vgg") else 5):
        plans[f"stages ..{k} frozen"] = {"version": 1, "rules": [{"stage": f"..{k}", "frozen": True}, everything]}
    predicted = {}
    for way, plan in plans.items():
        found = forecast(
            lambda: create_model(given.model, num_classes=10, meta=True), plan, image_size=size, batch_size=batch
        )
        predicted[way] = found.ratio
    seconds = alternate({way: step(plan) for way, plan in plans.items()}, given.rounds)
    title = f"{given.model}, batch {batch}, {size} pixels, {torch.get_num_threads()} threads"
    medians = show(title, seconds, "everything trained", given.json)
    print(f"{'':32}{'FLOPs':>8}{'time':>8}{'time / predicted':>19}")
    for way, share in predicted.items():
        print(f"{way:32}{share:8.2f}{1 / medians[way]:8.2f}{1 / medians[way] / share:19.2f}")
    print_behind(given.model, plans[way], images, labels, min(seconds["everything trained"]), given.rounds)


def print_behind(
    name: str, plan: object, images: torch.Tensor, labels: torch.Tensor, whole: float, rounds: int
) -> None:
    """Print what the part behind all stages costs, beside what its arithmetic predicts: a reason for a shortfall."""
    model = create_model(name, num_classes=10)
    live = apply_plan(model, plan, lr=1.0)
    prefix = live.prefix(images)
    rest, features = Rest(model, prefix).train(), capture(model.train(), [prefix], images)[0]

    def run() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(rest(features), labels).backward()

    seconds = min(alternate({"rest": run}, rounds)["rest"])
    found = forecast(
        lambda: create_model(name, num_classes=10, meta=True), plan, image_size=images.shape[-1], batch_size=len(images)
    )
    share = found.cached_ratio or 0.0
    print(f"behind all stages: {seconds / whole:.3f} of the time, {share:.3f} of the FLOPs of everything")


if __name__ == "__main__":
    main()
