"""Features of a data set, from the first image to the module that is trained on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from freezeplan.cache import boundaries, fill, items, key, reader, replay, store, weights
from freezeplan.cache.calls import given_together, undisturbed
from freezeplan.cache.features import Features, Images
from freezeplan.cache.memory import FeatureDtype, Keep
from freezeplan.resolve.resolution import Resolution

Found = tuple[Any, boundaries.Cuts]
"""What was found of a model in one phase, for one kind of images: facts that it depends on, and the cuts."""


def cached(
    model: nn.Module,
    resolution: Resolution,
    phase: int,
    known: Found | None,
    dataset: Dataset[Any],
    directory: str | Path | None,
    *,
    image: items.ImageKeys | None,
    after: boundaries.Cut | None,
    views: int,
    dtype: FeatureDtype,
    keep: Keep,
    prepare: nn.Module | None,
    batch_size: int,
    device: torch.device | str | None,
    workers: int,
    limit: int | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Features | Images, nn.Module, Found | None]:
    """Compute features where they are not on disk, prove them, and return them with the module to train on them.

    The model runs on the device and is back where it was afterwards. Modes, buffers and random states are as before.
    The features of later phases are cached in the same pass where they are no larger than the images.

    Args:
        model: With the plan applied.
        resolution: What the plan means for it.
        phase: Number of the phase that holds now.
        known: What an earlier call in this phase found.
        dataset: Gives images, (C, H, W) and floating-point, tuples that begin with one, or mappings that hold one; the
            same each time.
        directory: Where features are kept; the user's cache folder if not given. It may be shared by plans, models
            and data sets, and by processes, which then share the work.
        image: The key of the image where the data set gives mappings; found by itself where one image is in them. Keys,
            or in tuples places such as ``(0, 1)``, of all images where the model takes several of one size, in its
            order; their features are one row, in the place of the first.
        after: Where the features of another plan were cut, which freezes less of the model. Where these are on disk and
            lead to the new ones, bit by bit, the model goes on from them, and not from the images.
        views: Number of fixed augmented versions of each image; then the data set may augment at random.
        dtype: Of the numbers that are kept. float32 keeps results; the others take half the room.
        keep: Where features are while a model is trained on them. ``device``: where the model is; ``host``: in host
            memory, which a GPU copies batches from by itself; ``disk``: in memory-mapped files. What is larger
            than half of the memory that is free goes to the next of these, with a warning. ``auto``: ``device``
            where that is a CUDA device, else ``disk``. The files are written in any case: with ``disk`` before
            this returns, otherwise by a thread, beside the training.
        prepare: Takes a batch of raw images, (N, ...) of any type, on the device, and gives what the model gets,
            (N, C, H, W) and floating-point. Then the data set gives raw images, for example bytes, and these are
            read, hashed and copied to the device. What it does goes into the names of the files: its class,
            settings, text (``repr``) and tensors. It is moved to the model's device.
        batch_size: Images a pass.
        device: Where the passes run, there and back again; where the model is if not given.
        workers: Processes that read images.
        limit: Bytes that the directory may hold at most; None: what the disk has.
        seed: Decides the views.
        progress: Is told how many rows have features, and of how many: ``views * len(dataset)``.

    Returns:
        The features, or the images where the phase caches nothing; the module to train on them; what was found.

    Raises:
        ApplyError: If an argument has no possible value, nothing can be cached and the plan has no phases, the images
            are not the same each time, or the comparison fails.
        FreezePlanError: If the features do not fit, the directory cannot be used, or an image has another shape than
            the first.
    """
    reader.check_arguments(dataset, views=views, batch_size=batch_size, dtype=dtype, keep=keep, prepare=prepare)
    layout = items.find_layout(dataset, image, raw=prepare is not None)
    dataset = dataset if layout is None else items.Parted(dataset, layout)
    together = 1 if layout is None else layout.images
    home = next(model.parameters()).device
    there = home if device is None else torch.device(device)
    reader.check_fixed(dataset, views, seed, prepare)
    where = store.default_directory() if directory is None else Path(directory)
    with undisturbed(model), given_together(model, together):
        model.to(there)
        try:
            raw = reader.first_images(dataset, views, seed, prepare).to(there)
            prepare = prepare if prepare is None else prepare.to(there)
            reader.check_prepare(prepare, raw)
            sample = reader.prepared(raw, prepare)
            if resolution.plan.phases and (obstacle := boundaries.prefix_of(model, sample).obstacle):
                images = Images(dataset, views=views, seed=seed, prepare=prepare, device=home, reason=obstacle)
                images.layout = layout
                return images, model, known
            facts = (together, sample.shape, sample.dtype, repr(key.arithmetic(sample.device)))
            if known is None or known[0] != facts:
                known = facts, boundaries.find_cuts(model, resolution, phase, sample, together)
            cuts = known[1]
            found, earlier = boundaries.places(model, resolution, cuts, after, where, dtype, there)
            model.train()
            prefixes = [one.prefix for one in found]
            (plain,) = replay.capture(model, prefixes[:1], sample, gradients=True)
            with replay.channels_last(model, prefixes, sample):

                @functools.cache
                def batch() -> torch.Tensor:
                    first = reader.first_batch(dataset, views, seed, batch_size, prepare).to(there)
                    return reader.prepared(first, prepare)

                if earlier is not None:
                    leading = replay.leading(model, earlier.prefix, prefixes, batch())
                    earlier = None if leading is None else replace(earlier, prefix=leading)
                features, fresh = fill.fill(
                    model, found, dataset, views=views, seed=seed, dtype=dtype, batch_size=batch_size, device=there,
                    home=home, workers=workers, limit=limit, progress=progress, earlier=earlier, keep=keep,
                    prepare=prepare,
                )  # fmt: skip
                if fresh is None or there.type != "cpu":
                    (fresh,) = replay.capture(model, prefixes[:1], batch())
                features.difference = key.check_stored(features, fresh, plain)
                features.repeat_difference = cuts.repeat_difference
                features.layout, features.cut = layout, cuts.kept[0]
        finally:
            model.to(home)
            if prepare is not None:
                prepare.to(home)
    cuts.rest.watch(weights.Weights(model, cuts.kept[0].part, found[0].weights))  # where nothing is written any more
    return features, cuts.rest, known
