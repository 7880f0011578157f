"""The frozen prefix as data: which calls of a forward pass can be cached, their outputs, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten


@dataclass(frozen=True)
class Output:
    """A tensor that a cached call gives, as it is for one image."""

    shape: tuple[int, ...]
    """Its rows for one image on the first axis (1 where the first axis is the images), then its other axes."""
    dtype: torch.dtype
    order: tuple[int, ...]
    """Its axes as they lie in memory, the outermost first: (0, 2, 3, 1) is channels-last."""
    read: bool
    """Whether the rest of the pass reads its values."""
    written: bool
    """Whether the rest of the pass changes it in place."""

    @property
    def elements(self) -> int:
        """Its elements for one image."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Call:
    """A call of a module that can be cached."""

    module: str
    number: int
    """Which call of this module within one forward pass, from 0; calls inside cached calls do not count."""
    outputs: tuple[Output, ...]
    flops: int
    """For one image."""
    structure: TreeSpec = field(repr=False, compare=False)
    constants: tuple[Any, ...] = field(repr=False, compare=False)
    """The leaves of the answer that are no tensors; None where the tensors stand."""

    @property
    def bytes(self) -> int:
        """Of its outputs that are read, for one image."""
        return sum(output.elements * output.dtype.itemsize for output in self.outputs if output.read)

    def answer(self, tensors: Iterable[Tensor]) -> Any:
        """Return what the call gives, around these tensors."""
        found = iter(tensors)
        leaves = [next(found) if constant is TENSOR else constant for constant in self.constants]
        return tree_unflatten(leaves, self.structure)


BEHIND = "behind what is trained"
TENSOR = torch.Tensor
"""Stands among the constants where a tensor is."""


@dataclass(frozen=True)
class Prefix:
    """What of a forward pass can be cached under the plan that is live on a model."""

    calls: tuple[Call, ...]
    """In the order of the pass; only the outermost of nested calls."""
    reasons: Mapping[str, str]
    """Frozen module whose calls cannot be cached -> why; the outermost ones."""
    image_shape: tuple[int, ...]
    """Of one image as the model gets it."""
    image_dtype: torch.dtype
    total_flops: int
    """Of the whole pass, for one image forward; a multiplication and an addition are two."""
    behind_flops: int = 0
    """Of the frozen calls behind what is trained, for one image forward. They run each step, and the gradient of their
    inputs costs as much again."""
    size_difference: float = 0.0
    """By how much the features of an image change with the number of images in its batch, relative to the largest
    feature. A GPU chooses its kernels by shape, so their rounding differs. It is measured, and only reported."""
    autocast: str = ""
    """The type that autocast computed in when the model was watched; empty outside of autocast."""
    channels_last: bool = False
    """Whether its outputs are handed on channels-last, in whatever order they are stored."""

    @property
    def needs_autocast(self) -> bool:
        """Whether what is stored has autocast's type, which modules outside of autocast do not take."""
        return any(str(output.dtype) == self.autocast for call in self.stored for output in call.outputs if output.read)

    @property
    def stored(self) -> tuple[Call, ...]:
        """The calls whose outputs the rest of the pass reads."""
        return tuple(call for call in self.calls if call.bytes)

    @property
    def bytes(self) -> int:
        """What has to be kept for one image."""
        return sum(call.bytes for call in self.calls)

    @property
    def elements(self) -> int:
        """What has to be kept for one image, in numbers."""
        return sum(output.elements for call in self.calls for output in call.outputs if output.read)

    @property
    def image_bytes(self) -> int:
        """Of one image as the model gets it."""
        return torch.Size(self.image_shape).numel() * self.image_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the cached calls, for one image forward."""
        return sum(call.flops for call in self.calls)

    @property
    def obstacle(self) -> str:
        """Why nothing can be kept; empty where something can."""
        if self.stored:
            return ""
        found = (f"{name or 'the model'}: {why}" for name, why in self.reasons.items() if why != BEHIND)
        return next(found, "no frozen module runs ahead of what is trained")

    @property
    def advice(self) -> str:
        """Why a cache is no good idea; empty where it is."""
        if self.bytes > self.image_bytes:
            return "the features are larger than the images; a cache costs more than it reads"
        if self.flops < 0.1 * self.total_flops:
            return "little is computed ahead of what is trained; a cache gains little"
        return ""

    def __str__(self) -> str:
        if not self.stored:
            lines = ["no frozen layer before the first trained one can be cached"]
        else:
            share = self.flops / self.total_flops if self.total_flops else 0.0
            ratio = self.bytes / self.image_bytes
            lines = [
                f"cached: {', '.join(dict.fromkeys(call.module for call in self.stored))}",
                f"{self.bytes:,} bytes an image, {ratio:.2g} times the image's {self.image_bytes:,}",
                f"{self.flops:,} of {self.total_flops:,} forward FLOPs an image ({share:.1%})",
            ]
            if self.advice:
                lines.append(f"advice: {self.advice}")
            if self.size_difference:
                lines.append(str_difference(self.size_difference))
        if self.behind_flops:
            lines.append(
                f"frozen layers after a trained layer: {self.behind_flops:,} of {self.total_flops:,} forward FLOPs, "
                "run in each step, and as many backward for the gradient of their input"
            )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, found in by_reason.items():
            more = f" and {len(found) - 1} more" if found[1:] else ""
            lines.append(f"not cached: {found[0] or 'the model'}{more}: {reason}")
        return "\n".join(lines)


def str_difference(difference: float) -> str:
    """Say by how much features differ with the batch size.

    Examples:
        >>> str_difference(0.0161)
        'features of this device differ by 1.6e-02 of the largest with the batch size'
    """
    return f"features of this device differ by {difference:.1e} of the largest with the batch size"
