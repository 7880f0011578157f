"""The images of a data set, read once and in order, in whole batches; and the refusal of images that change."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from freezeplan.cache.memory import FeatureDtype, Keep, to_host
from freezeplan.errors import ApplyError, FreezePlanError
from freezeplan.model.digest import digest as digest_of


def image_of(item: Any, prepare: nn.Module | None = None) -> Tensor:
    """Return the image of a data set's item: the item itself, or its first part.

    Args:
        item: Of the data set.
        prepare: Makes of raw images what the model gets; with it, images may be of any type.

    Raises:
        ApplyError: If there is no image.
    """
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor) or not (prepare is not None or image.is_floating_point()):
        found = f"{image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
        raise ApplyError(
            f"an item of the data set is an image, or begins with one, as a floating-point tensor; found a {found}",
            notes=[
                "let the data set's transform end in ToTensor and Normalize, as for training",
                "of bytes: prepare=module, which takes a batch of them and gives what the model gets",
            ],
        )
    return image


def check_arguments(dataset: Any, *, views: int, batch_size: int, dtype: str, keep: str, prepare: Any) -> None:
    """Refuse what features cannot be kept of, or in.

    Raises:
        ApplyError: If the data set has no length or no index, is empty, or another argument has no possible value.
    """
    if isinstance(dataset, DataLoader):
        raise ApplyError(
            "features are kept of a data set, image by image; found a DataLoader",
            notes=["applied.cached(loader.dataset, ...), and a DataLoader of what it gives"],
        )
    counted = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not counted or isinstance(dataset, (IterableDataset, Tensor)):
        raise ApplyError(
            f"features are kept of a data set with len(dataset) and dataset[index]; found a {type(dataset).__name__}",
            notes=["torch.utils.data.TensorDataset(images, labels) makes one of tensors"],
        )
    for name, value, possible in (("dtype", dtype, get_args(FeatureDtype)), ("keep", keep, get_args(Keep))):
        if value not in possible:
            raise ApplyError(f"{name} is {', '.join(map(repr, possible))}, found {value!r}")
    if prepare is not None and not isinstance(prepare, nn.Module):
        raise ApplyError(
            f"prepare is a torch.nn.Module, whose class, settings and tensors say what it does; found a "
            f"{type(prepare).__name__}",
            notes=["torchvision.transforms.v2.Compose([...]) is one"],
        )
    for name, number in (("views", views), ("batch_size", batch_size)):
        if not hasattr(number, "__index__"):
            raise ApplyError(f"{name} is a whole number > 0, found {number!r}")
    if views < 1 or batch_size < 1 or not len(dataset):
        raise ApplyError(
            f"features need at least one image, one view and one image a pass, found {len(dataset)}, {views} and "
            f"{batch_size}"
        )


def check_fixed(dataset: Dataset[Any], views: int, seed: int, prepare: nn.Module | None = None) -> None:
    """Refuse images that are not the same each time.

    Sixteen of them are read twice, from two random states. A transform that seldom acts shows too: reading its image
    moves one of the global random states.

    Raises:
        ApplyError: If the data set augments at random and no views were asked for, or in a way that no seed reaches.
    """
    count = len(dataset)  # type: ignore[arg-type]
    for index in sorted({at * count // 16 for at in range(16)}):
        seeds = (2 * index + 1, 2 * index + 2) if views == 1 else (seed + index, seed + index)
        (one, drawn), (two, _) = (_seeded(dataset, index, chosen) for chosen in seeds)
        same = digest([image_of(one, prepare)]) == digest([image_of(two, prepare)])
        if views == 1 and (drawn or not same):
            raise ApplyError(
                f"image {index} is not the same each time: the data set augments at random, and features are computed "
                "once",
                notes=["views=4 keeps four fixed augmented versions of each image; or take the augmentation out"],
            )
        if not same:
            raise ApplyError(
                f"image {index} is not the same twice for the same seed: its augmentation draws from a random "
                "state of its own",
                notes=["let it draw from torch's, NumPy's or Python's global random state"],
            )


@contextmanager
def own_random_state() -> Iterator[None]:
    """Whatever is drawn or seeded here, the caller's random states stay as they are."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seeded(dataset: Dataset[Any], index: int, seed: int) -> tuple[Any, bool]:
    """An item as it is drawn from a seed, and whether anything was drawn for it."""
    with own_random_state():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        before = _random_states()
        item = dataset[index]
        return item, _random_states() != before


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.random.get_rng_state().numpy().tobytes()


class Reader(Dataset[Any]):
    """Every view of every image, view by view; each view is drawn from a seed of its own."""

    def __init__(self, dataset: Dataset[Any], views: int, seed: int):
        self.dataset, self.views, self.seed = dataset, views, seed

    def __len__(self) -> int:
        return self.views * len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> Any:
        view, index = divmod(row, len(self.dataset))  # type: ignore[arg-type]
        if self.views == 1:
            return self.dataset[index]
        digest = hashlib.sha256(f"{self.seed} {view} {index}".encode()).digest()
        return _seeded(self.dataset, index, int.from_bytes(digest[:7], "big"))[0]


def digest(batches: Sequence[Tensor], ready: torch.cuda.Event | None = None, prepared: str = "") -> str:
    """Return a digest of images, batch by batch, and of what makes of them what the model gets.

    Args:
        batches: Images, on any device; they are hashed as the bytes that they are.
        ready: When images on a GPU are there, to another thread.
        prepared: What ``prepared_by`` says.
    """
    found = hashlib.sha256(prepared.encode())
    for batch in batches:
        found.update(f"{batch.dtype}{tuple(batch.shape)}".encode())
        found.update(to_host(batch, ready).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


Targets = tuple[Any, ...] | None
"""What stands beside an image; None where the data set gives images alone."""


@dataclass(frozen=True)
class Batches:
    """Some images in a row of a data set, in batches, and what stands beside each."""

    batches: list[Tensor]
    targets: list[Targets]

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def read(
    reader: Reader, rows: range, batch_size: int, most: int, workers: int, prepare: nn.Module | None
) -> Iterator[Batches]:
    """Read some rows of a data set in order.

    A ``TensorDataset`` is cut into batches that share its memory; of other data sets each item is read.

    Args:
        reader: Of the data set.
        rows: Which rows, one after the other.
        batch_size: Images a batch.
        most: Batches that are given at once.
        workers: Processes that read.
        prepare: See ``image_of``.

    Raises:
        ApplyError: If an item is no image.
        FreezePlanError: If an image has another shape or type than the first.
    """
    if reader.views == 1 and type(reader.dataset) is TensorDataset:
        images, *others = reader.dataset.tensors
        if len(images):
            image_of(images[0], prepare)
        for at in range(rows.start, rows.stop, most * batch_size):
            part = slice(at, min(at + most * batch_size, rows.stop))
            beside: Iterable[Targets] = zip(*(tensor[part].unbind() for tensor in others), strict=True)
            yield Batches(
                list(torch.split(images[part], batch_size)), list(beside) if others else [()] * len(images[part])
            )
        return
    collate: Callable[[list[Any]], list[Any]] = list
    loader = DataLoader(reader, batch_size=batch_size, sampler=rows, num_workers=workers, collate_fn=collate)
    lists, row = iter(loader), rows.start
    first: Tensor | None = None
    while shard := list(islice(lists, most)):
        batches = []
        targets: list[Targets] = []
        for items in shard:
            found = [image_of(item, prepare) for item in items]
            first = found[0] if first is None else first
            batches.append(stacked(found, first, row))
            row += len(found)
            targets += [targets_of(item) for item in items]
        yield Batches(batches, targets)


def targets_of(item: Any) -> Targets:
    """Return what stands beside the image of an item."""
    return tuple(item[1:]) if isinstance(item, (tuple, list)) else None


def stacked(images: Sequence[Tensor], first: Tensor, row: int) -> Tensor:
    """Return images as one batch, (N, ...).

    Args:
        images: Images of one shape and type, N of them.
        first: The first image of the data set.
        row: Number of the first of ``images``.

    Raises:
        FreezePlanError: If one has another shape or type than ``first``.
    """
    for at, image in enumerate(images, row):
        if image.shape != first.shape or image.dtype != first.dtype:
            raise FreezePlanError(
                f"row {at} is {image.dtype} of shape {tuple(image.shape)}, the first image "
                f"{first.dtype} of shape {tuple(first.shape)}",
                notes=["features are kept of images of one size: resize and crop them in the transform"],
            )
    return torch.stack(list(images))


def first_images(dataset: Dataset[Any], views: int, seed: int, prepare: nn.Module | None = None) -> Tensor:
    """Return the first three images, of their first view; (3, C, H, W), some of them twice where there are fewer.

    Raises:
        FreezePlanError: If they differ in shape or type.
    """
    reader = Reader(dataset, views, seed)
    with own_random_state():
        count = len(dataset)  # type: ignore[arg-type]
        images = [image_of(reader[row % count], prepare) for row in range(3)]
    return stacked(images, images[0], 0)


def first_batch(dataset: Dataset[Any], views: int, seed: int, batch_size: int, prepare: nn.Module | None) -> Tensor:
    """Return the first batch that ``read`` gives, (N, ...), on the CPU or where the data set keeps its images."""
    reader = Reader(dataset, views, seed)
    with own_random_state():
        return next(read(reader, range(min(batch_size, len(reader))), batch_size, 1, 0, prepare)).batches[0]


def prepared(images: Tensor, prepare: nn.Module | None) -> Tensor:
    """Return what the model gets for a batch of images, without gradients."""
    if prepare is None:
        return images
    with torch.no_grad():
        found: Tensor = prepare(images)
    return found


def prepared_by(prepare: nn.Module | None) -> str:
    """Say what a module does to images: the class, settings and text of it and its parts, and their tensors' digest.

    Examples:
        >>> prepared_by(None)
        ''
        >>> prepared_by(nn.Flatten(1)) == prepared_by(nn.Flatten(2))
        False
    """
    if prepare is None:
        return ""
    parts = [
        (name, type(part).__module__, type(part).__qualname__, repr(part), _settings(part))
        for name, part in prepare.named_modules()
    ]
    tensors = [*prepare.named_parameters(), *prepare.named_buffers()]
    return json.dumps([parts, [(name, digest_of([tensor])) for name, tensor in tensors]])


def _settings(part: nn.Module) -> list[tuple[str, str]]:
    plain = (int, float, str, bytes, tuple, list, torch.dtype, torch.memory_format, type(None))
    return sorted((name, repr(value)) for name, value in vars(part).items() if isinstance(value, plain))


def check_prepare(prepare: nn.Module | None, images: Tensor) -> None:
    """Refuse a preparation that draws at random, or gives no images.

    Args:
        prepare: What is tried.
        images: Some raw images.

    Raises:
        ApplyError: If it gives no floating-point batch of as many images, or something else the second time.
    """
    if prepare is None:
        return
    with own_random_state():
        one, two = (prepared(images, prepare) for _ in range(2))
    if one.ndim < 2 or len(one) != len(images) or not one.is_floating_point():
        found = f"{one.dtype} of shape {tuple(one.shape)}"
        raise ApplyError(
            f"prepare makes of a batch of {len(images)} images one of as many, floating-point; found {found}",
            notes=["prepare takes (N, ...), as the data set's images are, and gives what the model gets"],
        )
    if not torch.equal(one.nan_to_num(), two.nan_to_num()):
        raise ApplyError(
            "prepare is not the same each time, and features are computed once",
            notes=["augment in the data set's transform, with views=4; prepare normalises"],
        )
