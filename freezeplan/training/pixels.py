"""Images as bytes to what a model gets: moved while it learns, then normalised; on the device where the bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import Dataset

from freezeplan.model.image_config import image_config
from freezeplan.training.settings import Augment, Normalise
from freezeplan.training.voc import Split

MEAN, STD = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)
"""The normalisation of files from Caffe, for images from 0 to 1, red first."""
SHIFT = 8
"""A crop is shifted by up to this part of the side, one in eight."""


@dataclass(frozen=True)
class Normalisation:
    """What is taken off a colour from 0 to 1 and what the rest is divided by, red first.

    Examples:
        >>> print(Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
        RGB, less 0.5, 0.5, 0.5, by 0.25, 0.25, 0.25
        >>> print(Normalisation(MEAN, STD, turned=True))
        BGR, 0 to 255, less 103.939, 116.779, 123.68
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    turned: bool = False
    """Whether the model gets blue first."""

    def __str__(self) -> str:
        order, step = ("BGR", -1) if self.turned else ("RGB", 1)
        if self.std == STD:
            return f"{order}, 0 to 255, less {', '.join(f'{255 * value:g}' for value in self.mean[::step])}"
        mean, std = (", ".join(f"{value:g}" for value in values[::step]) for values in (self.mean, self.std))
        return f"{order}, less {mean}, by {std}"


def normalisation(config: Any, how: Normalise) -> Normalisation:
    """Return how images are normalised for a model.

    Args:
        config: timm's configuration of the model, or any object with ``mean`` and ``std`` by name.
        how: ``weights``: as its weights expect; ``imagenet``: ImageNet's mean and deviation; ``half``: 0.5 and 0.5;
            ``bgr-mean``: blue first, 0 to 255, less ImageNet's mean, as files from Caffe expect it. The filters of
            ``vgg16.npy`` are turned when it is read, so for them that is what ``weights`` is, red first.

    Examples:
        >>> normalisation({"mean": (0.5,) * 3, "std": (0.25,) * 3}, "half").std
        (0.5, 0.5, 0.5)
    """
    own = Normalisation(tuple(config["mean"]), tuple(config["std"]))
    if how == "weights" or (how == "bgr-mean" and (own.mean, own.std) == (MEAN, STD)):
        return own
    if how == "imagenet":
        return Normalisation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Normalisation((0.5,) * 3, (0.5,) * 3) if how == "half" else Normalisation(MEAN, STD, turned=True)


def draw(how: Augment, count: int, side: int, random: torch.Generator) -> Tensor | None:
    """Draw how far each of some images is moved, and whether it is mirrored.

    Args:
        how: ``flip``: one image in two is mirrored; ``crop-flip``: a window is also shifted by up to an eighth of the
            side, down and right, where what lies beyond the edge is mirrored; ``none``: nothing is drawn.
        count: Number of images, N.
        side: Of the images in pixels.
        random: On the CPU, so that every device gets the same; it is advanced.

    Returns:
        int64, (N, 3): pixels down, pixels to the right, 1 where mirrored; None: as they are.
    """
    if how == "none":
        return None
    moves = torch.zeros(count, 3, dtype=torch.int64)
    if how == "crop-flip":
        most = side // SHIFT
        moves[:, :2] = torch.randint(-most, most + 1, (count, 2), generator=random)
    moves[:, 2] = torch.randint(2, (count,), generator=random)
    return moves


def moved(images: Tensor, moves: Tensor) -> Tensor:
    """Return images moved as ``draw`` says.

    Args:
        images: (N, 3, S, S), of any type.
        moves: (N, 3).

    Examples:
        >>> image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
        >>> moved(image, torch.tensor([[1, 0, 0]]))[0, 0].tolist(), moved(image, torch.tensor([[0, 0, 1]]))[0, 0, 0]
        ([[3, 4, 5], [6, 7, 8], [3, 4, 5]], tensor([2, 1, 0], dtype=torch.uint8))
    """
    last = images.shape[-1] - 1
    pixels, (down, right, mirrored) = torch.arange(last + 1, device=images.device), moves.to(images.device).T
    across = torch.where(mirrored[:, None] == 1, last - pixels, pixels)
    rows, columns = ((last - (last - at.abs()).abs()) for at in (pixels + down[:, None], across + right[:, None]))
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Prepare(nn.Module):
    """Bytes to what a model gets.

    Args:
        how: How they are normalised.
        channels_last: Order of the numbers in memory.

    Examples:
        >>> Prepare(Normalisation((0.5,) * 3, (0.25,) * 3), channels_last=False)
        Prepare(RGB, less 0.5, 0.5, 0.5, by 0.25, 0.25, 0.25)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, how: Normalisation, *, channels_last: bool):
        super().__init__()
        self.register_buffer("mean", torch.tensor(how.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(how.std).view(-1, 1, 1))
        self.turned = how.turned
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._how = str(how)

    def forward(self, images: Tensor) -> Tensor:
        """Return images (N, 3, S, S) of bytes as float32, normalised."""
        images = images.float().div(255).sub(self.mean).div(self.std)
        return (images.flip(1) if self.turned else images).contiguous(memory_format=self.memory_format)

    def extra_repr(self) -> str:
        """Say it in words."""
        return self._how


class Pixels(Dataset[Tensor]):
    """A split's images as a model expects them.

    Args:
        model: Timm's, or one that holds a timm model.
        split: The images.
        normalise: See ``normalisation``.
        channels_last: Order of the numbers in memory.
    """

    def __init__(self, model: nn.Module, split: Split, *, normalise: Normalise, channels_last: bool):
        self.images = split.images
        """Bytes, (N, 3, S, S)."""
        self.prepare = Prepare(normalisation(image_config(model), normalise), channels_last=channels_last)
        self.prepare.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self(torch.tensor([row]))[0]

    def __call__(self, rows: Tensor, moves: Tensor | None = None) -> Tensor:
        """Return the images of some rows, (N, 3, S, S), float32, on the split's device; moved if asked for."""
        images = self.images[rows.to(self.device, non_blocking=True)]
        found: Tensor = self.prepare(images if moves is None else moved(images, moves))
        return found
