"""Tensors that lie in shards over several processes (``fully_shard``): their whole values, and values put into them.

Both are collective: every process calls them for the same tensors in the same order, or all wait for one another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor, detached; those of a sharded one are gathered from all processes.

    Examples:
        >>> whole(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    found: Any = tensor.detach()
    return cast(Tensor, found.full_tensor()) if is_sharded(found) else cast(Tensor, found)


def put(target: Tensor, values: Tensor) -> None:
    """Write values into a tensor in place; into a sharded one, each process its own part.

    Args:
        target: Changed in place.
        values: Of the target's whole shape, and the same in all processes.

    Examples:
        >>> target = torch.zeros(2)
        >>> put(target, torch.ones(2))
        >>> target
        tensor([1., 1.])
    """
    if not is_sharded(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    target.copy_(distribute_tensor(values.to(target.device), sharded.device_mesh, sharded.placements))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, as ``fully_shard`` makes them.

    Examples:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes a file of these tensors: the first does, where they are sharded.

    Examples:
        >>> writes([torch.zeros(2)])
        True
    """
    return not any(map(is_sharded, tensors)) or torch.distributed.get_rank() == 0
