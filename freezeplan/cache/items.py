"""Items that are mappings, as transformers and datasets give them: ``{"pixel_values": image, "labels": 3}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from freezeplan.cache.reader import own_random_state
from freezeplan.errors import ApplyError


class Pairs(Dataset[Any]):
    """The items of a data set of mappings as pairs: the image, and the mapping without it.

    Args:
        dataset: Gives mappings.
        image: The key of the image.
    """

    def __init__(self, dataset: Dataset[Any], image: str):
        self.dataset, self.image = dataset, image

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        others = dict(self.dataset[index])
        if self.image not in others:
            raise ApplyError(f"item {index} has no {self.image!r}, as the first one has; it has {_listed(others)}")
        return others.pop(self.image), others


def joined(item: Any, image: str | None) -> Any:
    """Return an item as the data set gave it.

    Args:
        item: A pair of ``Pairs``, or with ``image=None`` any item.
        image: The key of the image.

    Examples:
        >>> joined(("features", {"labels": 3}), "pixel_values")
        {'pixel_values': 'features', 'labels': 3}
        >>> joined(("features", 3), None)
        ('features', 3)
    """
    return item if image is None else {image: item[0], **item[1]}


def image_key(dataset: Dataset[Any], image: str | None, *, raw: bool) -> str | None:
    """Return the key of the image in a data set's items; None where they are no mappings.

    Args:
        dataset: Of at least one item. The first is read; random states are as before.
        image: The key, if it is known. Otherwise it is the only one with a floating-point tensor of three dimensions.
        raw: Whether images may be of any type.

    Raises:
        ApplyError: If there is no such key, or none or several can be the image, or the items are no mappings and a
            key was given.
    """
    with own_random_state():
        item = dataset[0]
    if not isinstance(item, Mapping):
        if image is not None:
            raise ApplyError(f"image={image!r} is a key of items that are mappings; found a {type(item).__name__}")
        return None
    if image is not None:
        if image not in item:
            raise ApplyError(f"the items have no {image!r}; they have {_listed(item)}")
        return image
    found = [
        key
        for key, value in item.items()
        if isinstance(value, Tensor) and value.ndim == 3 and (raw or value.is_floating_point())
    ]
    if len(found) != 1:
        which = f"{len(found)} of its values are" if found else "none of its values is"
        raise ApplyError(
            f"an item is a mapping, and {which} a floating-point tensor (C, H, W); it has {_listed(item)}",
            notes=[
                "say which is the image: applied.cached(..., image='pixel_values')"
                if found
                else "let the data set's transform end in ToTensor and Normalize, as for training"
            ],
        )
    return str(found[0])


def _listed(item: Mapping[str, Any]) -> str:
    shown = (
        f"{key!r} ({value.dtype} of shape {tuple(value.shape)})" if isinstance(value, Tensor) else
        f"{key!r} ({type(value).__name__})"
        for key, value in item.items()
    )  # fmt: skip
    return ", ".join(shown) or "nothing"
