"""Where a plan cuts the passes of a model into what is kept and what is trained, in this phase and in later ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from freezeplan.apply import freeze
from freezeplan.cache import key as cache
from freezeplan.cache import replay
from freezeplan.cache.calls import given_together
from freezeplan.cache.prefix import Prefix
from freezeplan.cache.replay_proof import prove
from freezeplan.cache.watch import watch
from freezeplan.cache.weights import digest_of
from freezeplan.errors import ApplyError, FreezePlanWarning
from freezeplan.model import describer, names
from freezeplan.resolve.resolution import Resolution


class Cut(NamedTuple):
    """A phase, and what of a pass can be cached in it."""

    part: Resolution
    prefix: Prefix


@dataclass(frozen=True)
class Cuts:
    """What one pass over the images can keep."""

    kept: tuple[Cut, ...]
    """The phase that holds now, then those after it as far as what they need is frozen until then."""
    before: Cut | None
    """An earlier phase, all of whose frozen part is still frozen: its features may lead to these without an image."""
    rest: replay.Rest
    """What is left of a pass now, proved against the plain one."""
    repeat_difference: float
    """By how much two equal passes differ on this device, as ``prove`` measured it."""


def prefix_of(model: nn.Module, *samples: torch.Tensor) -> Prefix:
    """Say what of a pass can be cached as the model is now; see ``AppliedPlan.prefix``."""
    random = {module.name: module.random for module in describer.describe(model).modules}
    with given_together(model, len(samples)):
        return watch(model, samples[0] if len(samples) == 1 else torch.stack(samples, 1), random)


def find_cuts(model: nn.Module, resolution: Resolution, index: int, sample: torch.Tensor, together: int) -> Cuts:
    """Find and prove what can be kept. The model is put into other phases for it, and is in this one afterwards.

    Args:
        model: The model, with the plan applied.
        resolution: What the plan means for it.
        index: Number of the phase that holds now.
        sample: A batch of at least two images, (N, C, H, W), on the model's device.
        together: Images that the model takes at a time; with several the sample is (N, K, C, H, W).

    Raises:
        ApplyError: If nothing can be cached, or the pass over features is not the plain one.

    Warns:
        FreezePlanWarning: Where keeping gains little.
    """
    here = resolution.parts[index]
    now = prefix_of(model, sample)
    if not now.stored:
        raise ApplyError(f"there is nothing to cache: {now}", notes=["train on images, with the same plan"])
    if now.advice:
        warnings.warn(now.advice, FreezePlanWarning, stacklevel=4)
    rest = replay.Rest(model, now, together)
    difference = prove(model, rest, now, sample)
    kept, live = [Cut(here, now)], names.survey(model)
    still = frozen = _frozen(here)
    before: Cut | None = None
    try:
        for part in resolution.parts[index + 1 :]:
            if not _frozen(part) <= still:
                break  # what is trained until then and frozen again is not known yet
            still = _frozen(part)
            freeze.enter(live, part)
            ahead = prefix_of(model, sample)
            if ahead.stored and not ahead.advice:
                kept.append(Cut(part, ahead))
        for part in reversed(resolution.parts[:index]):
            if _frozen(part) < frozen:
                freeze.enter(live, part)
                before = Cut(part, prefix_of(model, sample))
                break
    finally:
        if resolution.phases:
            freeze.enter(live, here)
    return Cuts(tuple(kept), before, rest, difference)


def _frozen(part: Resolution) -> set[str]:
    return {row.name for row in part.frozen}


def places(
    model: nn.Module,
    resolution: Resolution,
    cuts: Cuts,
    after: Cut | None,
    directory: Path,
    dtype: cache.FeatureDtype,
    device: torch.device,
) -> tuple[list[cache.Boundary], cache.Boundary | None]:
    """Say where the features of each phase lie, and those of the earlier one if these may lead to them.

    Args:
        model: The model; what is frozen is read for the keys.
        resolution: What the plan means for it.
        cuts: What ``find_cuts`` found.
        after: A cut of another plan, which counts where that plan freezes less.
        directory: Holds a folder for each key.
        dtype: Of the numbers on disk.
        device: Where they are computed.

    Returns:
        Those of the phase that holds now come first; phases that keep the same share a folder.
    """

    def boundary(cut: Cut) -> cache.Boundary:
        weights = digest_of(model, cut.part)
        key = cache.key(model, weights, cut.prefix, dtype, device)
        return cache.Boundary(cut.prefix, directory / key, weights, _about(resolution, cut, dtype))

    found = {one.folder: one for one in map(boundary, cuts.kept)}
    other = after is not None and _frozen(after.part) < _frozen(cuts.kept[0].part)
    before = cuts.before or (after if other else None)
    # half the digits, run through more layers, are less than half the digits
    earlier = boundary(before) if before is not None and dtype == "float32" else None
    return list(found.values()), earlier


def _about(resolution: Resolution, cut: Cut, dtype: str) -> dict[str, Any]:
    """What ``freezeplan cache ls`` says of the features."""
    return {
        "model": resolution.model,
        "plan": resolution.plan.title + (f", phase {cut.part.phase}" if cut.part.phase else ""),
        "memoised": list(dict.fromkeys(call.module for call in cut.prefix.stored)),
        "dtype": dtype,
        "image": list(cut.prefix.image_shape),
        "bytes": cut.prefix.elements * getattr(torch, dtype).itemsize,
    }
