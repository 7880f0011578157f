"""The frozen values that features were computed with: their digest, and whether the model still has them."""

from __future__ import annotations

import hashlib

from torch import nn

from freezeplan.apply.frozen import frozen_values
from freezeplan.model.digest import digest
from freezeplan.model.sharded import is_sharded
from freezeplan.resolve.resolution import Resolution


def digest_of(model: nn.Module, part: Resolution) -> str:
    """Return a digest of all frozen parameters and buffers of a model, bit by bit.

    Args:
        model: The model.
        part: What its plan means in one phase.
    """
    found = hashlib.sha256()
    for name, tensors in frozen_values(model, part):
        found.update(f"{name} {digest(tensors)}".encode())
    return found.hexdigest()


class Weights:
    """Watches the frozen values of a model.

    torch counts how often a tensor was written. So to ask costs microseconds, and the values are read only where
    something wrote: loading the same values again changes nothing. Of a sharded model nothing is watched.

    Args:
        model: The model.
        part: What its plan means in the phase of the features.
        known: Its ``digest_of``.

    Examples:
        >>> import torch
        >>> from freezeplan import apply_plan
        >>> from freezeplan.model import create_model
        >>> model = create_model("test_resnet", num_classes=3)
        >>> part = apply_plan(model, "linear_probe").resolution
        >>> weights = Weights(model, part, digest_of(model, part))
        >>> _ = model.load_state_dict(model.state_dict())
        >>> weights.changed
        False
        >>> _ = model.layer1[0].conv1.weight.detach().zero_()
        >>> weights.changed
        True
    """

    def __init__(self, model: nn.Module, part: Resolution, known: str):
        self._model, self._part, self._known = model, part, known
        tensors = [tensor for _, found in frozen_values(model, part) for tensor in found]
        watched = not any(is_sharded(tensor) or tensor.is_inference() for tensor in tensors)
        self._tensors = tensors if watched else []
        self._versions = self._now()
        self._changed = False

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]

    @property
    def changed(self) -> bool:
        """Whether a value is another than when the features were computed."""
        now = self._now()
        if now != self._versions:
            self._versions, self._changed = now, digest_of(self._model, self._part) != self._known
        return self._changed
