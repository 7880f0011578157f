"""Proof that a freeze held: digests of what must stand still, and what moved. Reads a model, never changes it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from freezeplan import names
from freezeplan.resolution import Resolution


@dataclass(frozen=True)
class Moved:
    """One tensor or buffer that should have stood still."""

    name: str
    max_abs: float | None
    """Largest absolute change, in the tensor's own units; None if the seal holds no copy or the shape changed."""
    cause: str
    """The likely cause."""

    def __str__(self) -> str:
        return f"{self.name}: {'' if self.max_abs is None else f'moved by up to {self.max_abs:.3g}; '}{self.cause}"


@dataclass(frozen=True)
class Verification:
    """Whether what was sealed stood still. True in a condition exactly if it did."""

    checked: int
    """Number of tensors and buffers compared."""
    moved: tuple[Moved, ...]

    def __bool__(self) -> bool:
        return not self.moved

    def __str__(self) -> str:
        if not self.moved:
            return f"held: {self.checked} frozen tensors and buffers are bit-identical"
        lines = map(str, self.moved)
        return "\n".join([f"{len(self.moved)} of {self.checked} frozen tensors and buffers moved", *lines])


@dataclass(frozen=True)
class Seal:
    """Digests (sha256) of what stands still, by name, and copies where they were asked for."""

    digests: Mapping[str, str]
    copies: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def still(model: nn.Module, resolution: Resolution) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield what must not move: frozen parameters, and the buffers of every module that is held in eval."""
    live = names.parameters(model)
    for row in resolution.always_frozen:
        yield row.name, list(live.get(row.name, ()))
    for name, found in names.buffers(model).items():
        if all(part.modes[_module(name, resolution)] == "eval" for part in resolution.parts):
            yield name, found


def _module(name: str, resolution: Resolution) -> str:
    """The module that owns a buffer; of one made by a parametrization, the module that it belongs to."""
    module = names.owner(name)
    while module not in resolution.modes:
        module = names.owner(module)
    return module


def take_seal(model: nn.Module, resolution: Resolution, *, copy: bool) -> Seal:
    """Return the digests of what must not move; with ``copy`` also its values, at the cost of their memory."""
    now = dict(still(model, resolution))
    copies = {name: tuple(tensor.detach().clone() for tensor in found) for name, found in now.items()} if copy else {}
    return Seal({name: digest(found) for name, found in now.items()}, copies)


def digest(tensors: list[Tensor]) -> str:
    """Return the sha256 of the values, shapes and dtypes of some tensors, as a hexadecimal string.

    Examples:
        >>> flat, row = torch.zeros(2), torch.zeros(1, 2)
        >>> digest([flat]) == digest([flat.clone()]), digest([flat]) == digest([row])
        (True, False)
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def compare(model: nn.Module, resolution: Resolution, seal: Seal) -> Verification:
    """Say what moved since the seal was taken, by how much where it holds copies, and the likely cause."""
    now = dict(still(model, resolution))
    moved = tuple(
        Moved(name, _distance(seal.copies.get(name, ()), now.get(name, [])), _cause(model, name, now))
        for name, sealed in seal.digests.items()
        if name not in now or digest(now[name]) != sealed
    )
    return Verification(len(seal.digests), moved)


def _distance(before: tuple[Tensor, ...], after: list[Tensor]) -> float | None:
    if not before or [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return None
    return largest_change(before, after)


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of tensors of the same shapes, in their own units; 0 for empty ones.

    Examples:
        >>> largest_change([torch.zeros(2)], [torch.tensor([0.5, -1.0])])
        1.0
    """
    pairs = zip(before, after, strict=True)
    changes = (b.detach().double() - a.detach().to(b.device).double() for b, a in pairs if b.numel())
    return max((float(change.abs().max()) for change in changes), default=0.0)


def _cause(model: nn.Module, name: str, now: Mapping[str, list[Tensor]]) -> str:
    tensors = now.get(name, [])
    if not tensors:
        return "it is no longer in the model"
    if not isinstance(tensors[0], nn.Parameter):
        live = names.modules(model).get(names.owner(name), [])
        if any(module.training for module in live):
            return "its module is in train: something set .training by hand"
        return "a buffer was written by other code: a loader, or statistics updated in train"
    if any(tensor.requires_grad for tensor in tensors):
        return "requires_grad was set back to True by other code"
    if any(tensor.grad is not None for tensor in tensors):
        return "a gradient was left on it, and an optimizer outside the plan used it"
    return "other code wrote it: an optimizer that holds it, an average of weights, or a loader"
