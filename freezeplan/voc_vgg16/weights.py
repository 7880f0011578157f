"""What the lecture's models start from: VGG16 with its head, and its own file of weights, ``vgg16.npy``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from freezeplan.training import weights as any_model
from freezeplan.training.pixels import MEAN, STD
from freezeplan.training.settings import Flatten
from freezeplan.training.weights import Base
from freezeplan.voc_vgg16 import model as _registered  # noqa: F401  # timm knows the lecture's VGG16 from then on
from freezeplan.voc_vgg16.npy import read_npy

LECTURE = {"vgg16": "vgg16_fc256", "vgg16_fc256": "vgg16_fc256", "vgg16_slim_fc256": "vgg16_slim_fc256"}
"""Models with the lecture's head: name -> the architecture that is built. They take ``features.*`` from weights."""

SAMPLE_MODEL = "vgg16_slim_fc256"
"""What the embedded sample is run with."""


def default_image_size(name: str) -> int:
    """Return the width in pixels of the images that a model was trained on, as timm knows it. Downloads nothing.

    Raises:
        ModelError: If timm has no such model.

    Examples:
        >>> default_image_size("vgg16"), default_image_size("tf_efficientnet_lite1")
        (224, 240)
    """
    return any_model.default_image_size(LECTURE.get(name, name))


def build(
    name: str, *, classes: int, image_size: int, weights: str | Path | None, seed: int, flatten: Flatten = "chw"
) -> nn.Module:
    """Build a model as ``training.weights.build`` does; ``vgg16`` gets the lecture's head.

    ``vgg16`` takes ``features.*``, nothing else, from the weights. With ``vgg16.npy`` a model has the normalisation of
    that file.

    Args:
        name: A timm model name.
        classes: Number of classes.
        image_size: Side of the square images in pixels.
        weights: Also the lecture's ``vgg16.npy``.
        seed: Seed of the initialisation.
        flatten: Order in which the lecture's head gets its features; other models have no such layer.

    Raises:
        ModelError: If there is no such model, it has no classifier, or it does not take images of this size.
        WeightsError: If the weights are missing, damaged or another architecture's.

    Examples:
        >>> build("vgg16_slim_fc256", classes=3, image_size=64, weights="random", seed=0).num_classes
        3
    """
    arguments: dict[str, Any] = {"flatten": flatten} if name in LECTURE else {}
    config = {"mean": MEAN, "std": STD} if weights is not None and Path(weights).suffix == ".npy" else {}
    base = Base(LECTURE.get(name, name), arguments, "features" if name in LECTURE else "", config)
    return any_model.build(
        name, classes=classes, image_size=image_size, weights=weights, seed=seed, base=base, read=read_weights
    )


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read what a model starts from: also the lecture's ``vgg16.npy``. Nothing in a file is executed.

    Raises:
        WeightsError: If there is no such file or it cannot be read as weights.
    """
    if path.suffix == ".npy" and path.is_file():
        return read_npy(path)
    return any_model.read_weights(path)
