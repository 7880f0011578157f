"""Training images in parts of which one is held out: each image is held out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from freezeplan.training.compare_command import eval_transform
from freezeplan.training.photos import split_each_class
from freezeplan.training.settings import Settings
from freezeplan.training.trials import Photos
from freezeplan.training.voc import Split, VocData, load_split

PARTS = 3
"""A third of each class's training images is held out at a time."""


@dataclass(frozen=True)
class Parts:
    """Decoded training images, and the rows of each part."""

    images: Split
    rows: tuple[Tensor, ...]
    """int64, one tensor a part; together they are all rows."""

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.rows)

    def holding_out(self, part: int) -> Photos:
        """Return the images with a part held out, as copies.

        Args:
            part: Its number, from 0 on.
        """
        others = [rows for number, rows in enumerate(self.rows) if number != part]
        return Photos(self.images.at(torch.cat(others)), self.images.at(self.rows[part]), 0)


def in_parts(data: VocData, settings: Settings, seed: int, model: str, progress: Callable[[int, int], None]) -> Parts:
    """Decode the training images alone, and deal each class's out to parts.

    A class with fewer images than parts is in some of them only.

    Args:
        data: With training images; its validation images are not read.
        settings: Of the trials.
        seed: Of the parts.
        model: Whose transform is used.
        progress: Is told how many images are done.

    Returns:
        Three parts; two where no class has three images.

    Raises:
        DataError: If an image does not decode and ``settings.skip_bad`` is off.
    """
    images = load_split(
        data, "train", image_size=settings.image_size, rule=settings.label,
        transform=eval_transform(model, settings.image_size), workers=settings.workers, skip_bad=settings.skip_bad,
        progress=progress,
    ).to(torch.device(settings.device))  # fmt: skip
    bad = set(images.skipped)
    left = [photo for photo in data.train if photo.file not in bad]
    row = {photo.file: number for number, photo in enumerate(left)}
    parts = []
    for others in range(PARTS - 1, 0, -1):
        left, part = split_each_class(left, seed, 1 / (others + 1))
        parts.append(part)
    rows = [torch.tensor([row[photo.file] for photo in part]) for part in (*parts, left) if part]
    return Parts(images, tuple(rows))
