"""A training step of a model of which only the classifier learns, frozen in the ways that people freeze.

``python benchmarks/step.py --model resnet50`` times one step (forward, backward, SGD), all ways in turns:

- ``everything trained``: preset ``full``;
- ``head in the optimizer``: the usual shortcut; nothing else is changed, so all gradients are computed;
- ``requires_grad=False``: by a loop over ``named_parameters()``; batch norm and dropout stay in train;
- ``timm.utils.freeze``: with its frozen batch norm;
- ``Lightning's freeze``: ``BaseFinetuning.freeze``, which ``BackboneFinetuning`` calls;
- ``plan``: ``apply_plan(model, "linear_probe")``;
- ``plan, kept features``: on ``applied.cached``, from the second epoch on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import timm.utils
import torch
from timing import alternate, show
from torch import nn
from torch.utils.data import TensorDataset

from freezeplan import applied, apply_plan, resolve_plan
from freezeplan.plan.load import PlanLike


def frozen_by(way: str, model: nn.Module, plan: PlanLike = "linear_probe") -> Iterable[nn.Parameter]:
    """Freeze in one way what a plan freezes; return what goes into the optimizer.

    timm's and Lightning's ways freeze the modules at the top of the model that hold nothing trained.
    """
    names = {row.name for row in resolve_plan(plan, model).trained}
    trained = [parameter for name, parameter in model.named_parameters() if name in names]
    body = {name: part for name, part in model.named_children() if names.isdisjoint(below(name, part))}
    if way == "everything trained":
        return apply_plan(model, "full", lr=1e-3).trainable_parameters()
    if way.startswith("plan"):
        return apply_plan(model, plan, lr=1e-3).trainable_parameters()
    if way == "requires_grad=False":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    elif way == "timm.utils.freeze":
        timm.utils.freeze(model, list(body))
    elif way == "Lightning's freeze":
        from lightning.pytorch.callbacks import BaseFinetuning

        BaseFinetuning.freeze(list(body.values()), train_bn=False)
    return trained


def below(name: str, part: nn.Module) -> set[str]:
    """Return the names of a child's parameters."""
    return {f"{name}.{own}" for own, _ in part.named_parameters()}


def make_step(name: str, way: str, batch: int, size: int, folder: str) -> Callable[[], None]:
    """Return one training step of a fresh model on random images of shape (batch, 3, size, size)."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    inputs, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(frozen_by(way, model), lr=1e-3, momentum=0.9)
    run = model
    if way == "plan, kept features":
        features, run = applied(model).cached(TensorDataset(inputs), folder, batch_size=batch)
        inputs = features.batch(torch.arange(batch))

    def step() -> None:
        loss = nn.functional.cross_entropy(run(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


WAYS = (
    "everything trained",
    "head in the optimizer",
    "requires_grad=False",
    "timm.utils.freeze",
    "Lightning's freeze",
    "plan",
    "plan, kept features",
)


def main() -> None:
    """Time all ways in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    size, batch = given.image_size, given.batch_size
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: make_step(given.model, way, batch, size, folder) for way in WAYS}
        seconds = alternate(steps, given.rounds)
    title = f"A step: {given.model}, batch {batch}, {size} pixels, {torch.get_num_threads()} threads"
    show(title, seconds, WAYS[0], given.json)


if __name__ == "__main__":
    main()
