"""Where the images of an item are: its first value, under a key of a mapping, or several of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from freezeplan.cache.reader import own_random_state
from freezeplan.errors import ApplyError

ImageKeys = str | Sequence[str] | Sequence[int]
"""The key of the image, or keys or places of all images that the model takes, in its order."""


@dataclass(frozen=True)
class Layout:
    """Where the images are in the items of a data set that are mappings, or hold several images."""

    keys: tuple[Any, ...]
    """Keys of mappings, or places in tuples, in the order in which the model takes the images."""
    mapping: bool

    @property
    def images(self) -> int:
        """Images of an item."""
        return len(self.keys)

    def parted(self, item: Any) -> tuple[Any, Any]:
        """Return the images of an item, and what stands beside them.

        Returns:
            The image, (C, H, W), or with K images all of them as one tensor, (K, C, H, W); then the rest of the item, a
            mapping or a tuple.

        Raises:
            ApplyError: If images of one item differ in shape or type.

        Examples:
            >>> Layout(("pixel_values",), True).parted({"pixel_values": "image", "labels": 3})
            ('image', {'labels': 3})
        """
        found = [item[key] for key in self.keys]
        if self.mapping:
            others: Any = {key: value for key, value in item.items() if key not in self.keys}
        else:
            others = tuple(value for at, value in enumerate(item) if at not in self.keys)
        if len(found) == 1:
            return found[0], others
        kinds = {f"{v.dtype} of shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in found}
        if len(kinds) > 1 or not isinstance(found[0], Tensor):
            raise ApplyError(
                f"the images of an item are {', '.join(sorted(kinds))}; they have to be tensors of one shape and type",
                notes=["resize, crop and convert them in the transform"],
            )
        return torch.stack(found), others

    def with_features(self, features: Any, others: Any) -> Any:
        """Return an item with features in the place of its images, under the first key.

        Examples:
            >>> Layout(("left", "right"), True).with_features("features", {"labels": 3})
            {'left': 'features', 'labels': 3}
        """
        return {self.keys[0]: features, **others} if self.mapping else (features, *others)

    def with_images(self, images: Tensor, others: Any) -> Any:
        """Return an item as the data set gave it; mappings begin with the images.

        Examples:
            >>> Layout((0, 1), False).with_images(torch.zeros(2, 3, 8, 8), ("label",))[2]
            'label'
        """
        found = images.unbind() if self.images > 1 else (images,)
        if self.mapping:
            return {**dict(zip(self.keys, found, strict=True)), **others}
        values = list(others)
        for at, image in sorted(zip(self.keys, found, strict=True)):
            values.insert(at, image)
        return tuple(values)


class Parted(Dataset[Any]):
    """The items of a data set as pairs: the image, or all images of an item as one tensor, and the rest.

    Args:
        dataset: The data set.
        layout: Where the images are in an item.
    """

    def __init__(self, dataset: Dataset[Any], layout: Layout):
        self.dataset, self.layout = dataset, layout

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        for key in self.layout.keys:
            if not _has(item, key):
                raise ApplyError(f"item {index} has no {key!r}, as the first one has; it has {_listed(item)}")
        return self.layout.parted(item)


def find_layout(dataset: Dataset[Any], image: ImageKeys | None, *, raw: bool) -> Layout | None:
    """Return where the images are in a data set's items; None where an item begins with its only image.

    Args:
        dataset: Of at least one item. The first is read; random states are as before.
        image: The key of the image in mappings, if it is known. Otherwise it is the only one with a floating-point
            tensor of three dimensions. Several keys, or places in tuples, where the model takes several images.
        raw: Whether images may be of any type.

    Raises:
        ApplyError: If there is no such key, or none or several can be the image, or the items are no mappings and a
            key was given.
    """
    with own_random_state():
        item = dataset[0]
    mapping = isinstance(item, Mapping)
    if image is not None:
        keys: tuple[Any, ...] = (image,) if isinstance(image, (str, int)) else tuple(image)
        if not mapping and (not isinstance(item, (tuple, list)) or any(isinstance(key, str) for key in keys)):
            raise ApplyError(f"image={image!r} is a key of items that are mappings; found a {type(item).__name__}")
        for key in keys:
            if not _has(item, key):
                raise ApplyError(f"the items have no {key!r}; they have {_listed(item)}")
        return Layout(keys, mapping)
    if not mapping:
        return None
    found = [
        key
        for key, value in item.items()
        if isinstance(value, Tensor) and value.ndim == 3 and (raw or value.is_floating_point())
    ]
    if len(found) != 1:
        which = f"{len(found)} of its values are" if found else "none of its values is"
        keys_found = ", ".join(map(repr, found))
        raise ApplyError(
            f"an item is a mapping, and {which} a {'' if raw else 'floating-point '}tensor (C, H, W); "
            f"it has {_listed(item)}",
            notes=[
                "say which is the image: applied.cached(..., image='pixel_values')",
                f"or if the model takes all of them: image=({keys_found})",
            ]
            if found
            else ["let the data set's transform end in ToTensor and Normalize, as for training"],
        )
    return Layout((found[0],), mapping=True)


def _has(item: Any, key: Any) -> bool:
    return key in item if isinstance(item, Mapping) else isinstance(key, int) and 0 <= key < len(item)


def _listed(item: Any) -> str:
    pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
    shown = (
        f"{key!r} ({value.dtype} of shape {tuple(value.shape)})" if isinstance(value, Tensor) else
        f"{key!r} ({type(value).__name__})"
        for key, value in pairs
    )  # fmt: skip
    return ", ".join(shown) or "nothing"
