"""Digests of tensors: whether two hold the same values, shapes and types."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from freezeplan.errors import ModelError
from freezeplan.model.sharded import whole


def digest(tensors: list[Tensor]) -> str:
    """Return the sha256 of the values, shapes and dtypes of some tensors, as a hexadecimal string.

    A sharded tensor has the digest of its whole values, so every process calls this for it.

    Raises:
        ModelError: If one is on the meta device.

    Examples:
        >>> flat, row = torch.zeros(2), torch.zeros(1, 2)
        >>> digest([flat]) == digest([flat.clone()]), digest([flat]) == digest([row])
        (True, False)
    """
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_meta:
            raise ModelError("a model on the meta device has no values", notes=["create it on the CPU or a GPU"])
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
