"""What a plan adds to ``optimizer.step()``: its checks, and the multiplier of ``scheduler="any"``.

``python benchmarks/guarded_step.py --model vit_base_patch16_224`` times AdamW's step on the same model, in turns:

- ``no plan``: groups of one rate and decay each, made by hand as the plan makes them;
- ``guard=False``, ``guard=True``: ``apply_plan`` with ``lr``;
- ``any``: ``apply_plan(..., scheduler="any")`` and ``attach``.

It uses the public interface alone, so it also times an older version: put that first on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timing import alternate, show

from freezeplan import apply_plan

WAYS = ("no plan", "guard=False", "guard=True", "any")


def make_step(name: str, plan: str, way: str, steps: int) -> Callable[[], None]:
    """Return several steps of AdamW on a fresh model, with gradients of ones."""
    model = timm.create_model(name, num_classes=10)
    live = apply_plan(
        model,
        plan,
        lr=1e-3,
        weight_decay=0.05,
        scheduler="any" if way == "any" else "torch",
        guard=way != "guard=False",
    )
    groups = live.param_groups
    if way == "no plan":
        live.undo()
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)
    if way == "any":
        live.attach(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)

    def run() -> None:
        for _ in range(steps):
            optimizer.step()

    run.live = live  # type: ignore[attr-defined]  # the plan lives as long as its handle
    return run


def main() -> None:
    """Time all ways in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--plan", default="llrd")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    steps = {way: make_step(given.model, given.plan, way, given.steps) for way in WAYS}
    title = f"{given.steps} steps of AdamW: {given.model}, {given.plan}, {torch.get_num_threads()} threads"
    show(title, alternate(steps, given.rounds), WAYS[0], given.json)


if __name__ == "__main__":
    main()
