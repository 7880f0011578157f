"""What a model is trained on: kept features of a data set's images, or where nothing can be kept, the images."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from freezeplan.cache.items import Layout
from freezeplan.cache.memory import to_device, to_host
from freezeplan.cache.reader import Reader, Targets, image_of, prepared, stacked, targets_of
from freezeplan.cache.writer import Writer, load
from freezeplan.errors import ApplyError

if TYPE_CHECKING:
    from freezeplan.cache.boundaries import Cut


class Features(Dataset[Any]):
    """Features of a data set's images, in their order, each with what the data set gives beside the image.

    An item is ``(features, *targets)``, features of shape (E,) in host memory; features alone where the data set gives
    images alone; a mapping with features under the (first) image's key where it gives mappings. With K views an item is
    one of an image's K, drawn by torch's random state. ``batch`` gives features on the device.

    Args:
        shards: The files, in order.
        rows: Rows of each of them but the last.
        targets: What stands beside each row, view by view; None: nothing.
        count: Number of images.
        views: Number of views of each.
        computed: Rows that were computed and not found on disk.
        seconds: That computing them took.
        device: Where ``batch`` gives features.
        kept: Where they are kept.
        memory: All of them, (views * count, E), on that device or in host memory; None: they are on disk alone.
        writer: What still writes them to disk.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        rows: int,
        targets: Sequence[Targets],
        *,
        count: int,
        views: int,
        computed: int = 0,
        seconds: float = 0.0,
        device: torch.device | None = None,
        kept: Literal["device", "host", "disk"] = "disk",
        memory: Tensor | None = None,
        writer: Writer | None = None,
    ):
        self._shards, self._rows, self._targets = tuple(shards), rows, list(targets)
        self._count, self.views = count, views
        self.computed = computed
        self.seconds = seconds
        self._device = device or torch.device("cpu")
        self._memory, self._writer, self._process = memory, writer, os.getpid()
        self.kept = kept
        """Where they are: on the ``device``, in memory of the ``host``, or on ``disk``."""
        self.difference = 0.0
        """By how much these features differ from those of a plain training step, relative to the largest; measured.
        A device rounds differently for other numbers of images, other orders in memory, and where autograd records."""
        self.repeat_difference = 0.0
        """By how much two equal passes differ on this device, relative to the largest number; measured. Where it is not
        0, some sums have no fixed order, and the pass over features was not compared with the plain one there."""
        self.layout: Layout | None = None
        """Where the images are in an item; None where they are its first value."""
        self.cut: Cut | None = None
        """Where the pass was cut, for ``applied.cached(..., after=features.cut)`` of a plan that freezes more."""
        self._open: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def device(self) -> torch.device:
        """Where ``batch`` gives features."""
        return self._device

    def __getitem__(self, index: int) -> Any:
        try:
            index = operator.index(index)
        except TypeError:
            raise ApplyError(
                f"an item is one image's, by its number; found a {type(index).__name__}",
                notes=["features.batch([0, 1, 2]) gives several images' features in one tensor"],
            ) from None
        row = self._row(index)
        return self._item(row, self._features(row).clone())

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several items, as a loader asks for them; a collate function may write into them."""
        rows = [self._row(index) for index in indices]
        copied = torch.stack([self._features(row) for row in rows]) if rows else ()
        return [self._item(row, features) for row, features in zip(rows, copied, strict=True)]

    def batch(self, indices: Sequence[int] | Tensor, view: int = 0) -> Tensor:
        """Return the features of some images.

        With features and indices on the device this is one ``index_select`` there, and nobody waits for the device; so
        these indices cannot be checked here, and the device stops at one that is too large.

        Args:
            indices: Which images, N of them, on any device.
            view: Which view of them.

        Returns:
            (N, E), on ``device``.

        Raises:
            IndexError: If there is no such image, or no such view.
        """
        if isinstance(indices, Tensor) and indices.device.type != "cpu" and self.kept == "device":
            assert self._memory is not None
            return self._memory.index_select(0, indices + view * self._count if view else indices)
        found = indices.tolist() if isinstance(indices, Tensor) else indices
        if not all(0 <= index < self._count for index in found) or not 0 <= view < self.views:
            raise IndexError(f"images {found} of {self._count}, view {view} of {self.views}")
        rows = [view * self._count + index for index in found]
        if self._memory is None or self._forked:
            return to_device(torch.stack([self._features(row) for row in rows]), self._device)
        at = torch.tensor(rows, dtype=torch.int64)
        if self._memory.device.type != "cpu":
            return self._memory.index_select(0, to_device(at, self._memory.device))
        if self._device.type != "cuda":
            return self._memory.index_select(0, at).to(self._device)
        shape = (len(rows), self._memory.shape[1])
        picked = torch.empty(shape, dtype=self._memory.dtype, pin_memory=True)  # not given away until it is copied
        return torch.index_select(self._memory, 0, at, out=picked).to(self._device, non_blocking=True)

    @property
    def _forked(self) -> bool:
        """Whether this is a copy in a process that was forked, which can use no memory of a GPU."""
        return self._device.type != "cpu" and os.getpid() != self._process

    def _row(self, index: int) -> int:
        if not -self._count <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        return view * self._count + index % self._count

    def _features(self, row: int) -> Tensor:
        """A row, in host memory."""
        if self._memory is not None and self._memory.device.type == "cpu":
            return self._memory[row]
        number, at = divmod(row, self._rows)
        if number not in self._open:
            self._open[number] = self._shard(number)
        return self._open[number][at]

    def _shard(self, number: int) -> Tensor:
        if self._memory is not None and not self._forked and self._writer is not None:
            self._writer.wait()
            if self._writer.error is not None:  # they are on the device alone
                return to_host(self._memory[number * self._rows : (number + 1) * self._rows])
        return load(self._shards[number])

    def _item(self, row: int, features: Tensor) -> Any:
        targets = self._targets[row]
        if self.layout is not None and targets is not None:
            return self.layout.with_features(features, targets[0])
        return features if targets is None else (features, *targets)

    def __str__(self) -> str:
        where = {"device": f"on {self._device}", "host": "in host memory", "disk": "on disk"}[self.kept]
        views = f", {self.views} views each" if self.views > 1 else ""
        return f"features of {self._count:,} images{views}, {where}; {self.computed:,} computed in {self.seconds:.1f} s"

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself. It gets what is on disk, so that has to be there.
        if self._writer is not None:
            self._writer.wait()
            if self._writer.error is not None:
                raise self._writer.error
        return {**self.__dict__, "_open": {}, "_memory": None, "_writer": None, "kept": "disk"}


class Images(Dataset[Any]):
    """A data set's own images, in the shape of ``Features``, for a phase in which no features can be kept.

    An item is what the data set gives, with the image as the model gets it, and of K views one.

    Args:
        dataset: The images.
        views: Number of views of each.
        seed: Decides the views.
        prepare: Makes of raw images what the model gets.
        device: Where ``batch`` gives images.
        reason: Why they are no features.
    """

    computed = 0
    seconds = 0.0
    difference = 0.0
    repeat_difference = 0.0
    kept = "nowhere"

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        views: int,
        seed: int,
        prepare: nn.Module | None,
        device: torch.device,
        reason: str,
    ):
        self._reader, self.views, self._prepare = Reader(dataset, views, seed), views, prepare
        self.device, self.reason = device, reason
        self._count = len(self._reader) // views
        self.layout: Layout | None = None
        """Where the images are in an item; None where they are its first value."""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not -self._count <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        item = self._reader[view * self._count + index % self._count]
        if self._prepare is not None:
            image = image_of(item, self._prepare)
            home = next((tensor.device for tensor in self._prepare.buffers()), image.device)
            image = prepared(image[None].to(home), self._prepare)[0].to(image.device)
            targets = targets_of(item)
            item = image if targets is None else (image, *targets)
        return item if self.layout is None else self.layout.with_images(*item)

    def batch(self, indices: Sequence[int] | Tensor, view: int = 0) -> Tensor:
        """Return some images as the model gets them, (N, C, H, W), on ``device``; K of each item, (N, K, C, H, W).

        Args:
            indices: Which images, N of them.
            view: Which view of them.

        Raises:
            IndexError: If there is no such image, or no such view.
        """
        found = indices.tolist() if isinstance(indices, Tensor) else indices
        if not all(0 <= index < self._count for index in found) or not 0 <= view < self.views:
            raise IndexError(f"images {found} of {self._count}, view {view} of {self.views}")
        images = [image_of(self._reader[view * self._count + index], self._prepare) for index in found]
        return prepared(to_device(stacked(images, images[0], 0), self.device), self._prepare)

    def __str__(self) -> str:
        return f"{self._count:,} images, no features of them: {self.reason}"
