"""How much faster is a training step when only the classifier learns? Ratios, all sides measured in one run.

``python benchmarks/step.py`` times one step (forward, backward, optimizer) of a timm model three ways, in turns:

- ``full``: everything learns (preset ``full``);
- ``optimizer only``: the usual shortcut, only the classifier is given to the optimizer, nothing else is changed;
- ``plan``: ``apply_plan(model, "linear_probe")``.

It prints each way's speed relative to ``full``: the ratio of the fastest steps, and the median of the ratios of the
rounds. Absolute times are printed for context only; they depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch

from freezeplan import apply_plan


def make_step(name: str, way: str, batch: int, size: int) -> Callable[[], None]:
    """Return one training step of a fresh model on random images of shape (batch, 3, size, size)."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    if way == "optimizer only":
        groups = list(model.get_classifier().parameters())
    else:
        groups = apply_plan(model, {"full": "full", "plan": "linear_probe"}[way], lr=1e-3).trainable_parameters()
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Time the three ways in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    ways = ("full", "optimizer only", "plan")
    steps = {way: make_step(arguments.model, way, arguments.batch_size, arguments.image_size) for way in ways}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)

    size = f"batch {arguments.batch_size}, {arguments.image_size} pixels"
    print(f"{arguments.model}, {size}, {arguments.threads} thread(s)")
    print(f"{'':16}{'fastest':>10}{'of fastest':>12}{'median ratio':>14}")
    for way in ways:
        ratios = [full / own for full, own in zip(seconds["full"], seconds[way], strict=True)]
        fastest = min(seconds[way])
        ratio = min(seconds["full"]) / fastest
        print(f"{way:16}{fastest * 1000:8.1f}ms{ratio:11.2f}x{statistics.median(ratios):13.2f}x")


if __name__ == "__main__":
    main()
