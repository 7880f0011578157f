"""About how long a short trial takes, by what was measured and what a plan computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from freezeplan import Plan, resolve_plan
from freezeplan.cache.calls import undisturbed
from freezeplan.model.describer import describe
from freezeplan.training.evidence import Evidence
from freezeplan.training.probe import stage_modules
from freezeplan.training.trials import Comparison, Photos
from freezeplan.training.weights import blank


def costs(plans: Mapping[str, Plan], photos: Photos, comparison: Comparison, evidence: Evidence) -> Mapping[str, float]:
    """Return plan -> about how many seconds its first trial takes; 0 where nothing was measured.

    What is frozen ahead of all that is trained is computed once for each image, the rest in each epoch.

    Args:
        plans: By name; all fit the model.
        photos: How many images.
        comparison: Epochs, sizes, the model.
        evidence: Seconds an image.
    """
    train, held, settings = len(photos.train.labels), len(photos.held_out.labels), comparison.settings
    once = (train + held) * evidence.forward
    steps = settings.epochs * train * (evidence.step or 3 * evidence.forward)
    evaluations = ((1 + settings.epochs) * held + train) * evidence.forward
    model = blank(comparison.model, comparison.classes)
    flops = flops_by_stage(model, settings.image_size)
    found = {}
    for name, plan in plans.items():
        ahead = _frozen_ahead(plan, model, flops) if settings.cache else 0.0
        found[name] = once * (ahead > 0) + (1 - ahead) * (steps + evaluations)
    return found


def flops_by_stage(model: nn.Module, image_size: int) -> Mapping[int, int]:
    """Return stage -> FLOPs of one image in the forward pass, in the order of the stages.

    Args:
        model: On the meta device, so that nothing is computed; it is left as it was.
        image_size: Side in pixels.

    Returns:
        Empty where the model cannot be run without values.

    Examples:
        >>> found = flops_by_stage(blank("test_resnet", 3), 64)
        >>> list(found), found[1]
        ([0, 1, 2, 3, 4], 9437184)
    """
    description, counter = describe(model), FlopCounterMode(display=False)
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        with undisturbed(model), torch.no_grad(), counter:
            model.eval()(images)
    except (RuntimeError, NotImplementedError, ValueError, AssertionError):
        return {}
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    found: dict[int, int] = {}

    whole = stage_modules(model, description)

    def add(name: str, module: nn.Module) -> None:
        stage = whole.get(id(module))
        if stage is not None:
            found[stage] = found.get(stage, 0) + counts.get(f"{type(model).__name__}.{name}", 0)
            return
        for child, below in module.named_children():
            add(f"{name}.{child}".lstrip("."), below)

    add("", model)
    return dict(sorted(found.items()))


def _frozen_ahead(plan: Plan, model: nn.Module, flops: Mapping[int, int]) -> float:
    """The share of the forward pass in the stages that are all frozen ahead of the first that is not."""
    stages, resolution = describe(model).stages, resolve_plan(plan, model)
    frozen = {row.name for row in resolution.always_frozen}
    first = min((stage for name, stage in stages.items() if name not in frozen), default=None)
    ahead = sum(count for stage, count in flops.items() if first is None or stage < first)
    return ahead / max(1, sum(flops.values()))
