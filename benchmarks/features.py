"""Training on kept features against the plain loop with ``requires_grad=False``: an epoch, and a whole run.

``python benchmarks/features.py --model vgg16`` (the lecture's head, RMSProp) or ``--model resnet50`` (head only, SGD).

- ``plain epoch``: frozen by ``requires_grad=False``, ``model.train()``, every image through the whole model;
- ``head in the optimizer``: nothing frozen, the optimizer gets what is to be trained, so all gradients are computed;
- ``timm.utils.freeze``: of all that holds nothing trained, with its frozen batch norm;
- ``features epoch``: the second epoch and every later one after ``applied.cached``, through an ordinary ``DataLoader``;
- ``rest in memory``: the same module on features in one tensor, without a loader;
- ``bare head``: the trained modules alone, one after the other, on the same tensor: the limit.

Then a run of 10 epochs, each with an evaluation on validation images: plain, and with features, the first pass over all
images, the comparison before it and all writing included.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm.optim
import torch
from step import below, frozen_by
from timing import alternate, show
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import freezeplan.voc_vgg16.model  # noqa: F401  # registers the lecture's head
from freezeplan import apply_plan
from freezeplan.voc_vgg16.weights import build

PLANS = {"vgg16": "voc_vgg16/frozen_convs"}


def optimizer_of(name: str, groups: object) -> torch.optim.Optimizer:
    """Return the same optimizer on every side."""
    if name == "vgg16":
        return timm.optim.RMSpropTF(groups, lr=5e-4, alpha=0.9, eps=1e-10)
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def epoch(run: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """Train for one epoch."""
    run.train()
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(run(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(run: nn.Module, loader: DataLoader) -> float:
    """Return the error."""
    run.eval()
    wrong = [(run(inputs).argmax(1) != labels).sum() for inputs, labels in loader]
    return float(torch.stack(wrong).sum()) / len(loader.dataset)


def main() -> None:
    """Time both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    size, batch = given.image_size, given.batch_size
    title = f"{given.model}, {given.images} images of {size} pixels, batch {batch}, {torch.get_num_threads()} threads"

    start = build(given.model, classes=20, image_size=size, weights="random", seed=0)
    plan = PLANS.get(given.model, "linear_probe")
    train = TensorDataset(torch.randn(given.images, 3, size, size), torch.randint(0, 20, (given.images,)))
    val = TensorDataset(torch.randn(given.images // 2, 3, size, size), torch.randint(0, 20, (given.images // 2,)))

    def plain_side(way: str = "requires_grad=False") -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(start)
        return model, optimizer_of(given.model, frozen_by(way, model, plan))

    def loader(data: object, shuffle: bool = True) -> DataLoader:
        return DataLoader(data, batch, shuffle=shuffle)

    with tempfile.TemporaryDirectory() as folder:
        live = apply_plan(copy.deepcopy(start), plan, lr=5e-4)
        features, rest = live.cached(train, folder, batch_size=batch)
        optimizer = optimizer_of(given.model, live.trainable_parameters())
        memory = TensorDataset(features.batch(range(len(train))), train.tensors[1])
        bare, bare_memory, bare_optimizer = bare_head(start, plan, given.model, memory, train.tensors[0][:2])
        blocks = {"plain epoch": plain_epoch(*plain_side(), loader(train))}
        for way in ("head in the optimizer", "timm.utils.freeze"):
            blocks[way] = plain_epoch(*plain_side(way), loader(train))
        blocks["features epoch"] = lambda: epoch(rest, loader(features), optimizer)
        blocks["rest in memory"] = lambda: epoch_in_memory(rest, memory, batch, optimizer)
        blocks["bare head"] = lambda: epoch_in_memory(bare, bare_memory, batch, bare_optimizer)
        show(f"One epoch: {title}", alternate(blocks, given.rounds), "plain epoch", given.json)
        many = {way: blocks[way] for way in ("bare head", "rest in memory", "features epoch")}
        show(f"What reading costs: {title}", alternate(many, 5 * given.rounds), "bare head", given.json)

    def whole_plain() -> None:
        model, optimizer = plain_side()
        for _ in range(given.epochs):
            epoch(model, loader(train), optimizer)
            evaluate(model, loader(val, False))

    def whole_features() -> None:
        with tempfile.TemporaryDirectory() as folder:
            live = apply_plan(copy.deepcopy(start), plan, lr=5e-4)
            features, rest = live.cached(train, folder, batch_size=batch)
            held_out, _ = live.cached(val, folder, batch_size=batch)
            optimizer = optimizer_of(given.model, live.trainable_parameters())
            for _ in range(given.epochs):
                epoch(rest, loader(features), optimizer)
                evaluate(rest, loader(held_out, False))

    seconds: dict[str, list[float]] = {"plain run": [], "run on features": []}
    for _ in range(max(3, given.rounds // 3)):
        for way, run in (("plain run", whole_plain), ("run on features", whole_features)):
            began = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - began)
    show(f"{given.epochs} epochs with evaluation: {title}", seconds, "plain run", given.json)


def plain_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> Callable[[], None]:
    """Return an epoch of a model on images."""
    return lambda: epoch(model, loader, optimizer)


def bare_head(
    start: nn.Module, plan: str, name: str, memory: TensorDataset, sample: torch.Tensor
) -> tuple[nn.Module, TensorDataset, torch.optim.Optimizer]:
    """Return what is trained as a module of its own, what it takes, as it lies in a plain pass, and its optimizer."""
    model = copy.deepcopy(start)
    live = apply_plan(model, plan, lr=5e-4)
    ((output,),) = (tuple(o for o in call.outputs if o.read) for call in live.prefix(sample).stored)
    frozen = {row.name for row in live.resolution.frozen}
    head = nn.Sequential(*(part for at, part in model.named_children() if below(at, part) and
                           frozen.isdisjoint(below(at, part))))  # fmt: skip
    rows, labels = memory.tensors
    lying = rows.view(len(rows), *(output.shape[axis] for axis in output.order[1:]))
    inputs = lying.permute([output.order.index(axis) for axis in range(len(output.shape))]).contiguous()
    return head, TensorDataset(inputs, labels), optimizer_of(name, live.trainable_parameters())


def epoch_in_memory(run: nn.Module, data: TensorDataset, batch: int, optimizer: torch.optim.Optimizer) -> None:
    """Train for one epoch on shuffled rows of one tensor, without a loader."""
    run.train()
    inputs, labels = data.tensors
    for rows in torch.randperm(len(inputs)).split(batch):
        loss = nn.functional.cross_entropy(run(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
