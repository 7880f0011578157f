"""How far a pretrained representation carries: pooled features of every stage, and a ridge probe on each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freezeplan.cache.calls import intercepted, named, tensors, undisturbed
from freezeplan.model.description import Description

FOLDS = 5
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01)
"""Ridge penalties that are tried, for features whose Gram matrix has a mean diagonal of 1; the largest first."""


@dataclass(frozen=True)
class Features:
    """What a model makes of some images, in float32 on the CPU."""

    stages: Mapping[int, Tensor]
    """Stage, the stem 0 -> (N, C): what it returns, averaged over positions. Stages that were not seen are missing."""
    head: Tensor | None
    """(N, D): what the classifier gets; None where it is not one linear layer that gets a row an image."""


@dataclass(frozen=True)
class Depth:
    """How well a ridge probe tells the classes apart at one stage."""

    stage: int
    channels: int
    """Features an image."""
    error: float
    """Top-1 error under cross-validation, a fraction."""
    spread: float
    """Standard error of it."""
    penalty: float
    """The ridge penalty that was best."""


def stage_features(model: nn.Module, description: Description, batches: Iterable[Tensor]) -> Features:
    """Run images through a model and keep what each stage returns, averaged over positions.

    A stage ends with the last call of a module that is all in it, and of modules without parameters that follow
    (activations, pooling). Several tensors of a stage are put side by side. The model runs in eval, without gradients,
    and is left as it was.

    Args:
        model: On the device of the images.
        description: Of the model.
        batches: Images as the model gets them, (B, 3, S, S).

    Returns:
        Features in the order of the images.

    Examples:
        >>> from freezeplan.model import create_model, describe
        >>> model = create_model("test_resnet", num_classes=3)
        >>> found = stage_features(model, describe(model), [torch.zeros(2, 3, 32, 32)])
        >>> {stage: tuple(features.shape) for stage, features in found.stages.items()}
        {0: (2, 32), 1: (2, 32), 2: (2, 48), 3: (2, 192), 4: (2, 96)}
        >>> tuple(found.head.shape)
        (2, 96)
    """
    ends, classifier = stage_modules(model, description), linear_head(model, description)
    nhwc = any(getattr(model.get_submodule(part.name), "output_fmt", "") == "NHWC" for part in description.parts)
    stages: dict[int, list[Tensor]] = {}
    head: list[Tensor] = []
    now: dict[int, Any] = {}
    inside, current = False, None

    def around(module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside, current
        if module is classifier and args and args[0].ndim == 2:
            head.append(args[0].float().cpu())
        if inside:
            return forward(*args, **kwargs)
        inside = True
        try:
            value = forward(*args, **kwargs)
        finally:
            inside = False
        current = ends.get(id(module), current)
        if current is not None:
            now[current] = value
        return value

    watched = [module for module in model.modules() if module is not model and not _mixed(module, ends)]
    images = 0
    with undisturbed(model), torch.no_grad():
        model.eval()
        with intercepted(watched, around):
            for batch in batches:
                now.clear()
                current = None
                images += len(batch)
                model(batch)
                for stage, value in now.items():
                    if (row := _pooled(value, len(batch), nhwc)) is not None:
                        stages.setdefault(stage, []).append(row)
    whole = {stage: torch.cat(rows) for stage, rows in sorted(stages.items())}
    kept = torch.cat(head) if head else None
    return Features(whole, kept if kept is not None and len(kept) == images else None)


def stage_modules(model: nn.Module, description: Description) -> dict[int, int | None]:
    """``id`` of each module whose tensors are all in one stage -> that stage; None for what has none (the head).

    Modules without parameters are not in it: they follow what came before. Nor are those that hold several stages.
    """
    found: dict[int, int | None] = {}
    for key, name in named(model).items():
        held = {description.stages.get(tensor) for tensor in description.below.get(name, ())}
        if len(held) == 1:
            found[key] = held.pop()
    return found


def _mixed(module: nn.Module, ends: Mapping[int, int | None]) -> bool:
    return id(module) not in ends and any(True for _ in module.parameters())


def linear_head(model: nn.Module, description: Description) -> nn.Linear | None:
    """Return the classifier where it is one linear layer with a bias."""
    owners = {name.rpartition(".")[0] for name in description.roles.get("head", ())}
    if len(owners) != 1:
        return None
    module = model.get_submodule(owners.pop())
    return module if isinstance(module, nn.Linear) and module.bias is not None else None


def _pooled(value: Any, images: int, nhwc: bool) -> Tensor | None:
    rows = []
    for tensor in tensors(value):
        if tensor.is_floating_point() and 2 <= tensor.ndim <= 4 and len(tensor) == images:
            axes: list[int] = {2: [], 3: [1], 4: [1, 2] if nhwc else [2, 3]}[tensor.ndim]
            rows.append(tensor.float().mean(axes).cpu() if axes else tensor.float().cpu())
    return torch.cat(rows, 1) if rows else None


def depth_profile(features: Mapping[int, Tensor], labels: Tensor, *, seed: int) -> tuple[Depth, ...]:
    """Measure at every stage how well a ridge probe tells the classes apart.

    Args:
        features: Stage to (N, C).
        labels: int64, (N,).
        seed: Of the folds.

    Returns:
        One figure a stage, in their order.

    Examples:
        >>> labels = torch.arange(20) % 2
        >>> [(depth.stage, depth.error) for depth in depth_profile({1: labels[:, None].float()}, labels, seed=0)]
        [(1, 0.0)]
    """
    folds = folds_of(labels, seed)
    found = []
    for stage, rows in sorted(features.items()):
        error, penalty = ridge_error(rows, labels, folds)
        spread = math.sqrt(error * (1 - error) / len(labels))
        found.append(Depth(stage, rows.shape[1], error, spread, penalty))
    return tuple(found)


def ridge_error(features: Tensor, labels: Tensor, folds: Tensor) -> tuple[float, float]:
    """Return the cross-validated top-1 error of ridge regression onto the classes, and the best penalty.

    Closed form (Hoerl and Kennard, Ridge Regression, 1970), in its dual: one system of N equations a fold and penalty.
    Features are standardised over all images, which needs no label. The penalty with the lowest error is taken, so the
    error is a little too low; of equal ones the largest.

    Args:
        features: (N, C).
        labels: int64, (N,).
        folds: int64, (N,): the part that each image is left out with.
    """
    rows = features.double()
    spread = rows.std(0, correction=0)
    rows = (rows - rows.mean(0)) / torch.where(spread > 1e-8, spread, 1.0)
    gram = rows @ rows.T / rows.shape[1]
    classes = int(labels.max()) + 1
    wrong = dict.fromkeys(PENALTIES, 0)
    for fold in range(FOLDS):
        out = folds == fold
        if out.all() or not out.any():  # fewer images than folds
            continue
        targets = F.one_hot(labels[~out], classes).double()
        centre = targets.mean(0)
        inner, outer = gram[~out][:, ~out], gram[out][:, ~out]
        for penalty in PENALTIES:
            system = torch.linalg.cholesky(inner + penalty * torch.eye(len(inner), dtype=inner.dtype))
            answers = outer @ torch.cholesky_solve(targets - centre, system) + centre
            wrong[penalty] += int((answers.argmax(1) != labels[out]).sum())
    best = min(PENALTIES, key=lambda penalty: wrong[penalty])
    return wrong[best] / len(labels), best


def folds_of(labels: Tensor, seed: int) -> Tensor:
    """Deal the images of each class out to ``FOLDS`` parts.

    Examples:
        >>> sorted(folds_of(torch.zeros(5, dtype=torch.int64), seed=0).tolist())
        [0, 1, 2, 3, 4]
    """
    random = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(labels)
    start = 0
    for name in sorted(set(labels.tolist())):
        rows = (labels == name).nonzero().flatten()
        folds[rows[torch.randperm(len(rows), generator=random)]] = (start + torch.arange(len(rows))) % FOLDS
        start += len(rows)
    return folds


def carries_to(depths: Sequence[Depth]) -> tuple[Depth, Depth]:
    """Return the best stage, and the first one that is within a standard error of it.

    The rule of one standard error: Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.

    Examples:
        >>> one, two = Depth(0, 8, 0.30, 0.02, 1.0), Depth(1, 8, 0.29, 0.02, 1.0)
        >>> [depth.stage for depth in carries_to([one, two])]
        [1, 0]
    """
    best = min(depths, key=lambda depth: (depth.error, depth.stage))
    return best, next(depth for depth in depths if depth.error <= best.error + best.spread)
