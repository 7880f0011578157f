"""Proof that a freeze held: digests of what must not change, and what moved. Reads a model, never changes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from freezeplan.apply.frozen import frozen_values
from freezeplan.errors import ApplyError, WeightsError, did_you_mean
from freezeplan.model import names
from freezeplan.model.digest import digest
from freezeplan.model.sharded import whole
from freezeplan.proof import causes
from freezeplan.resolve.resolution import Resolution


@dataclass(frozen=True)
class Moved:
    """One tensor or buffer that should not have changed."""

    name: str
    max_abs: float | None
    """Largest absolute change, in the tensor's own units; None if the seal holds no copy, the shape changed, or a value
    is no number."""
    relative: float | None
    """The same over the largest absolute value before; None also where all of that was zero."""
    cause: str
    """The likely cause."""

    def __str__(self) -> str:
        amount = "" if self.max_abs is None else f"moved by up to {self.max_abs:.3g}"
        share = "" if self.relative is None else f" ({self.relative:.2g} of its largest value)"
        return f"{self.name}: {amount}{share}{'; ' * bool(amount)}{self.cause}"


@dataclass(frozen=True)
class Verification:
    """Whether what was sealed is unchanged. True in a condition exactly if it is."""

    checked: int
    """Number of tensors and buffers compared."""
    moved: tuple[Moved, ...]

    def __bool__(self) -> bool:
        return not self.moved

    def __str__(self) -> str:
        if not self.checked:
            return "nothing to hold: the plan freezes no tensor and no buffer from its first epoch to its last"
        if not self.moved:
            return f"held: {self.checked} frozen tensors and buffers are bit-identical"
        lines = map(str, self.moved)
        return "\n".join([f"{len(self.moved)} of {self.checked} frozen tensors and buffers moved", *lines])

    def check_held(self) -> None:
        """Refuse to write a delta of a model whose frozen tensors moved.

        Raises:
            ApplyError: If one did, with the first three.
        """
        if self.moved:
            raise ApplyError(
                f"{len(self.moved)} frozen tensors and buffers moved since the seal, so no base would fit this delta",
                notes=[str(moved) for moved in self.moved[:3]],
            )


class Loads:
    """What ``load_state_dict`` wrote last: a hook that it calls; it keeps nothing alive, and a copy knows no writes."""

    def __init__(self, module: nn.Module):
        self.count = 0
        self.versions: dict[int, int] = {}
        """``id`` of a tensor -> torch's count of writes to it, after the last load."""
        self._handle = module.register_load_state_dict_post_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, keys: object) -> None:
        """Count one."""
        self.count += 1
        tensors = (*module.parameters(), *module.buffers())
        self.versions = {id(tensor): tensor._version for tensor in tensors if not tensor.is_inference()}

    def wrote(self, tensors: Iterable[Tensor]) -> bool:
        """Whether weights were loaded and nothing, as far as is known, has written these tensors since."""
        return self.count > 0 and not any(
            tensor._version > self.versions[id(tensor)] for tensor in tensors if id(tensor) in self.versions
        )

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "versions": {}}


@dataclass(frozen=True)
class Seal:
    """Digests (sha256) of what is frozen, by name, and copies where they were asked for."""

    digests: Mapping[str, str]
    places: Mapping[str, tuple[Place, ...]]
    """Where they lay; empty in a copy of the model, whose tensors lie elsewhere."""
    loads: Loads
    copies: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Which object a tensor was and where its values lay, to tell later how it was changed. It keeps nothing alive."""

    object: int
    data: int
    kind: str
    """Its dtype and shape."""


def place(tensor: Tensor) -> Place:
    """Return where a tensor is now."""
    return Place(id(tensor), tensor.data_ptr(), f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}")


def take_seal(model: nn.Module, resolution: Resolution, *, copy: bool) -> Seal:
    """Return the digests of what must not move; with ``copy`` also its values, at the cost of their memory."""
    now = dict(frozen_values(model, resolution))
    copies = {name: tuple(whole(tensor).clone() for tensor in found) for name, found in now.items()} if copy else {}
    places = {name: tuple(map(place, found)) for name, found in now.items()}
    return Seal({name: digest(found) for name, found in now.items()}, places, Loads(model), copies)


def compare(
    model: nn.Module, resolution: Resolution, seal: Seal, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> Verification:
    """Say what moved since the seal was taken, by how much where it holds copies, and the likely cause.

    Args:
        model: The model.
        resolution: What the plan means for it.
        seal: Taken before.
        optimizers: Those that are known to train it; one that holds what moved is named.
    """
    now = dict(frozen_values(model, resolution))
    broken = [name for name, sealed in seal.digests.items() if name not in now or digest(now[name]) != sealed]
    moved, exchanged = [], set()
    for name in broken:  # parameters first
        tensors, copies = now.get(name, []), seal.copies.get(name, ())
        loaded = seal.loads.wrote(tensors)
        if not tensors:
            cause = "it is no longer in the model"
        elif isinstance(tensors[0], nn.Parameter):
            cause = _parameter_cause(tensors, copies, seal.places.get(name, ()), loaded, list(optimizers))
            if cause == _EXCHANGED:
                exchanged.add(names.owner(name))
        elif names.owner(name) in exchanged and _others(seal.places.get(name, ()), tensors):
            cause = _EXCHANGED
        else:
            in_train = any(module.training for module in names.modules(model).get(names.owner(name), []))
            counter = _counter(name)
            ran = _rise(seal.copies.get(counter), now.get(counter)) if counter in broken else 0
            cause = _buffer_cause(in_train, ran, loaded=loaded)
        moved.append(_moved(name, copies, tensors, cause))
    return Verification(len(seal.digests), tuple(moved))


def compare_states(
    model: nn.Module,
    resolution: Resolution,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    origins: tuple[str, str],
) -> Verification:
    """Say what moved between two files of weights, by how much, and what the change looks like.

    Args:
        model: The model, which may be on the meta device.
        resolution: What the plan means for it.
        before: Name -> tensor, names as they are in the file.
        after: The same later.
        origins: What the two files are called, for errors.

    Raises:
        WeightsError: Where a file lacks what is frozen, or ``before`` has another shape of it than the model.
    """
    files = [names.grouped(model, state) for state in (before, after)]
    wanted = dict(frozen_values(model, resolution))
    for state, origin in zip(files, origins, strict=True):
        missing = [name for name in wanted if name not in state]
        if missing:
            raise WeightsError(
                f"lacks {len(missing)} of {len(wanted)} frozen tensors and buffers, such as {missing[0]!r}",
                where=origin,
                notes=[*did_you_mean(missing[0], state), f"it begins with {next(iter(state))!r}"],
            )
    moved = []
    for name, tensors in wanted.items():
        one, two = (state[name] for state in files)
        if [t.shape for t in one] != [t.shape for t in tensors]:
            shapes = [[tuple(t.shape) for t in part] for part in (one, tensors)]
            raise WeightsError(f"has {name!r} in shape {shapes[0]}, the model in {shapes[1]}", where=origins[0])
        if digest(one) == digest(two):
            continue
        if isinstance(tensors[0], nn.Parameter):
            places = tuple(map(place, one))
            kinds = [found.kind for found in places] != [found.kind for found in map(place, two)]
            cause = _changed_kind(places, two) if kinds else _pattern_cause(one, two) or _UNKNOWN
        else:
            counter = _counter(name)
            cause = _buffer_cause(False, _rise(files[0].get(counter), files[1].get(counter)), loaded=False)
        moved.append(_moved(name, one, two, cause))
    return Verification(len(wanted), tuple(moved))


_UNKNOWN = "other code wrote it: an optimizer that holds it, an average of weights, or a loader"
_EXCHANGED = "its data was exchanged: to_empty emptied it, or averaged weights (EMA) or others were swapped in"
_PATTERNS = {
    "rounded": "its values were rounded to half precision and back",
    "shrunk": "weight decay on a zero gradient: all its values shrank by one factor; an optimizer holds it",
    "decayed": "weight decay on a zero gradient: each of its values moved towards zero, as under Adam or RMSprop; an "
    "optimizer holds it",
    "drift": "it moved by rounding only: an average of weights (EMA) was put in its place",
    "unrelated": "it has other values altogether: a loader or an initialisation overwrote it",
}


def _moved(name: str, before: Sequence[Tensor], after: Sequence[Tensor], cause: str) -> Moved:
    """What moved; values that are no numbers are said ahead of the cause, and no amount is said of them."""
    if causes.became_nan(before, after):
        cause = f"it holds values that are not numbers (NaN); {cause}"
    return Moved(name, *_amount(before, after), cause)


def _amount(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float | None, float | None]:
    if not before or [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return None, None
    change = causes.largest_change(before, after)
    return (None, None) if math.isnan(change) else (change, causes.relative_change(before, after))


def _others(sealed: Sequence[Place], tensors: Sequence[Tensor]) -> bool:
    """Whether these are other objects than those that were sealed; False where that is not known."""
    return bool(sealed) and [found.object for found in sealed] != [id(tensor) for tensor in tensors]


def _changed_kind(before: Sequence[Place], after: Sequence[Tensor]) -> str:
    return f"it went from {before[0].kind} to {place(after[0]).kind}: it was cast or replaced"


def _pattern_cause(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    return _PATTERNS.get(causes.pattern(before, after), "") if before else ""


def _parameter_cause(
    tensors: Sequence[Tensor],
    copies: Sequence[Tensor],
    sealed: Sequence[Place],
    loaded: bool,
    optimizers: Sequence[torch.optim.Optimizer],
) -> str:
    """The likely cause, the surest evidence first."""
    if any(tensor.requires_grad for tensor in tensors):
        return "requires_grad was set back to True by other code"
    places = [place(tensor) for tensor in tensors]
    if _others(sealed, tensors):
        return (
            "the parameter was replaced after the plan was applied: load_state_dict(assign=True), to_empty, "
            "reset_classifier or fully_shard"
        )
    if sealed and [found.kind for found in places] != [found.kind for found in sealed]:
        return _changed_kind(sealed, tensors)
    looks = causes.pattern(copies, tensors) if copies else ""
    if looks in ("shrunk", "decayed", "rounded"):
        return _PATTERNS[looks] + _holder(tensors, optimizers)
    if any(tensor.grad is not None for tensor in tensors):
        return "a gradient was left on it, and an optimizer outside the plan used it" + _holder(tensors, optimizers)
    holder = _holder(tensors, optimizers)
    if holder:
        return f"an optimizer holds it{holder}"
    if looks == "drift":
        return _PATTERNS[looks]
    if loaded:
        return "load_state_dict wrote it: a loader, or averaged weights (EMA) swapped in"
    if sealed and [found.data for found in places] != [found.data for found in sealed]:
        return _EXCHANGED
    return _PATTERNS.get(looks, _UNKNOWN)


def _holder(tensors: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> str:
    wanted = {id(tensor) for tensor in tensors}
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in wanted for parameter in group["params"]):
                return f" ({type(optimizer).__name__}, group {group.get('name') or index})"
    return ""


def _counter(buffer: str) -> str:
    """Name of the counter of batches beside a buffer of batch norm."""
    return f"{buffer.rpartition('.')[0]}.num_batches_tracked".lstrip(".")


def _rise(before: Sequence[Tensor] | None, after: Sequence[Tensor] | None) -> int | None:
    """By how much a counter of batches rose; None if it is not known."""
    if not before or not after:
        return None
    return int(after[0]) - int(before[0])


def _buffer_cause(in_train: bool, ran: int | None, *, loaded: bool) -> str:
    if in_train:
        return "its module is in train: something set .training by hand"
    if ran is None or ran > 0:
        batches = "" if ran is None else f" for {ran} batch{'es' * (ran > 1)}"
        return f"live BatchNorm statistics: its module ran in train{batches}"
    if loaded:
        return "load_state_dict wrote it: a loader, or averaged weights (EMA) swapped in"
    return "a buffer was written by other code: a loader, an average of weights, or a reset of statistics"
