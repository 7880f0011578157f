"""Finding the frozen prefix: what gives the same answer for an image in every epoch, seen in forward passes.

Autograd is the witness. A module call none of whose outputs requires grad has nothing trained ahead of it; what is
random is made to require grad while watching, so that what follows it does too. A call without either can be cached,
unless its output changes with the other images of the batch. What of it the rest of the pass really reads is found by
another pass, in which every output of such a call is a fresh leaf: the leaves that get a gradient are read. No tracing,
no knowledge of the architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from freezeplan.cache.calls import intercepted, named, tensors, undisturbed
from freezeplan.cache.independence import NOT_TWICE, ON_BATCH, exchanged, largest_difference, rows, same, same_autocast
from freezeplan.cache.prefix import BEHIND, TENSOR, Call, Output, Prefix
from freezeplan.errors import ApplyError

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)


def watch(model: nn.Module, sample: Tensor, random: Mapping[str, str]) -> Prefix:
    """Find what can be cached by running the model on a sample. The model is left as it was.

    Passes in train mode (a plan keeps what is frozen in eval), under the caller's autocast: over two images; over the
    same two, each once more with its companion exchanged; over three, to find the axis of images by its length; and
    backward passes that reach no parameter. Outputs are compared between passes over two images alone, bit by bit.
    Random states are the caller's again afterwards, and so are the buffers.

    Args:
        model: With a live plan.
        sample: A batch of two images or more, (N, C, H, W), as the model gets them.
        random: Module -> what it draws at random in train mode.

    Raises:
        ApplyError: If the sample is no batch of at least two, or nothing in the pass requires grad.
    """
    given: object = sample
    if not isinstance(given, Tensor) or given.ndim < 1 or len(given) < 2:
        found = f"the shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ApplyError(
            f"a sample is a batch of at least two images, found {found}",
            notes=["applied.prefix(next(iter(loader))[0])"],
        )
    kind = sample.device.type
    pair, three = sample[:2], torch.cat([sample[-1:], sample[:2]])
    with undisturbed(model), same_autocast(sample.device), torch.enable_grad():
        model.train()
        flops = FlopCounterMode(display=False)
        with flops:
            seen = _watched(model, pair, random, flops.get_total_flops)
        longer = _watched(model, three, random, lambda: 0)
        calls: tuple[Call, ...] = ()
        difference = 0.0
        if _order_of(seen) != _order_of(longer):
            reasons = {"": "its parts are not called in a fixed order"}
        else:
            excluded = dict(seen.refused)
            for index, (two, other) in enumerate(zip(seen.records, longer.records, strict=True)):
                if index not in excluded and (why := _varies(two, other)):
                    excluded[index] = why
            if not isinstance(sample, FakeTensor):
                excluded |= _dependent(model, pair, random, seen, excluded)
            kept, read, written = _settled(model, pair, seen.records, excluded)
            reasons = _reasons(seen.records, excluded)
            if kept and _IMAGE in read:
                reasons[""] = "what is trained reads the image itself"
            else:
                calls = tuple(_call(seen.records, kept, index, read, written) for index in kept)
                difference = _size_difference(seen, longer, read)
    return Prefix(
        calls,
        reasons,
        tuple(sample.shape[1:]),
        sample.dtype,
        total_flops=flops.get_total_flops() // 2,
        behind_flops=sum(seen.records[index].flops for index in _behind(seen)) // 2,
        size_difference=difference,
        autocast=str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "",
    )


def _order_of(seen: _Seen) -> list[tuple[str, int]]:
    return [(record.module, record.parent) for record in seen.records]


def _dependent(
    model: nn.Module, pair: Tensor, random: Mapping[str, str], seen: _Seen, excluded: Mapping[int, str]
) -> dict[int, str]:
    """Index of a call whose output for an image changes with its companion, or from pass to pass -> which of both."""
    found: dict[int, str] = {}
    twice: _Seen | None = None
    for place in (0, 1):
        other = _watched(model, exchanged(pair, place), random, lambda: 0)
        if _order_of(other) != _order_of(seen):
            return dict.fromkeys(range(len(seen.records)), "its parts are not called in a fixed order")
        for index in _differing(seen, other, place, excluded):
            twice = twice or _watched(model, pair, random, lambda: 0)
            found[index] = NOT_TWICE if index in _differing(seen, twice, None, excluded) else ON_BATCH
    return found


def _differing(seen: _Seen, other: _Seen, place: int | None, excluded: Mapping[int, str]) -> list[int]:
    return [
        index
        for index, (one, two) in enumerate(zip(seen.records, other.records, strict=True))
        if index not in excluded
        and not all(same(rows(a, place, 2), rows(b, place, 2)) for a, b in zip(one.values, two.values, strict=True))
    ]


def _size_difference(seen: _Seen, longer: _Seen, read: set[_Leaf]) -> float:
    """By how much outputs that are read differ between the passes over two images and over three, for the same two."""
    found = 0.0
    for index, at in read - {_IMAGE}:
        two, three = seen.records[index].values, longer.records[index].values
        if two and three:
            part = three[at]
            found = max(found, largest_difference(two[at], part[len(part) // 3 :]))
    return found


@dataclass
class _Record:
    """A call as it was seen."""

    module: str
    parent: int
    """Index of the call that it stands in, -1 for the model's own."""
    bare: bool
    """Whether the module has no parameters."""
    inputs: frozenset[int]
    """``id`` of the tensors that it got."""
    changed: frozenset[int] = frozenset()
    """``id`` of those of them that it changed in place."""
    leaves: list[Any] = field(default_factory=list)
    structure: TreeSpec | None = None
    flops: int = 0
    values: list[Tensor] = field(default_factory=list)
    """Its outputs, if the call may be cached, before other calls change them in place."""

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


@dataclass
class _Seen:
    records: list[_Record]
    refused: dict[int, str]
    """Index of a call that cannot be cached -> why; empty where there is nothing to say."""


def _watched(model: nn.Module, sample: Tensor, random: Mapping[str, str], flops: Callable[[], int]) -> _Seen:
    """Run a pass and write down every call in it."""
    name = named(model)
    frozen = {id(m): not any(p.requires_grad for p in m.parameters()) for m in model.modules()}
    bare = {id(m): not any(True for _ in m.parameters()) for m in model.modules()}
    moves = {id(m): _moves(m, random.get(name.get(id(m), ""), "")) for m in model.modules()}
    below = {id(m): next((moves[id(p)] for p in m.modules() if moves[id(p)]), "") for m in model.modules()}
    seen, open_, alive = _Seen([], {}), [-1], [sample]

    def around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tensors((args, kwargs))
        versions = {id(tensor): tensor._version for tensor in given}
        alive.extend(given)  # an id is only one's own while its tensor lives
        index, record = len(seen.records), _Record(name[id(module)], open_[-1], bare[id(module)], frozenset(versions))
        seen.records.append(record)
        open_.append(index)
        started = flops()
        answer = forward(*args, **kwargs)
        open_.pop()
        record.flops = flops() - started
        record.leaves, record.structure = tree_flatten(answer)
        record.changed = frozenset(id(tensor) for tensor in given if tensor._version != versions[id(tensor)])
        alive.extend(record.tensors)
        why = _refusal(record, below[id(module)], frozen[id(module)])
        if why is not None:
            seen.refused[index] = why
        elif not isinstance(sample, FakeTensor):
            record.values = [tensor.detach().clone() for tensor in record.tensors]
        if moves[id(module)]:  # from here on autograd follows what is random
            marked = [_marked(leaf) for leaf in record.leaves]
            answer = tree_unflatten(marked, record.structure)
        return answer

    with intercepted([m for m in model.modules() if id(m) in name], around):
        if not any(tensor.requires_grad for tensor in tensors(model(sample))):
            raise ApplyError("the model's answer to the sample requires no grad: nothing trained takes part in it")
    return seen


def _marked(leaf: Any) -> Any:
    wanted = isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.requires_grad
    return leaf.detach().clone().requires_grad_().clone() if wanted else leaf


def _moves(module: nn.Module, random: str) -> str:
    """Why a module's answer is not the same twice; empty if it is."""
    if not module.training:
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch norm in train, whose answer depends on the batch"
    return f"random: {random}" if random else ""


def _refusal(record: _Record, moves: str, frozen: bool) -> str | None:
    """Why a call cannot be cached; empty where there is nothing to say, None where it can be."""
    found = record.tensors
    if not found:
        return ""
    if any(tensor.requires_grad for tensor in found):
        return BEHIND if frozen and not record.bare and not moves else moves if frozen else ""
    if moves:
        return moves
    for leaf in record.leaves:
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            return f"it gives {str(leaf.dtype).removeprefix('torch.')}, and only floating-point numbers are kept"
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            return f"it gives a {type(leaf).__name__}, which cannot be kept"
    return None


def _varies(two: _Record, three: _Record) -> str:
    """Why a call over two images is not like the same call over three; empty if it is."""
    if two.structure != three.structure or len(two.leaves) != len(three.leaves):
        return "its answer has another structure for another number of images"
    for a, b in zip(two.leaves, three.leaves, strict=True):
        if not isinstance(a, Tensor):
            if a != b:
                return f"it gives {a!r} for two images and {b!r} for three"
            continue
        each = a.shape[0] // 2 if a.ndim else 0
        if not each or a.shape[0] != 2 * each or b.shape[0] != 3 * each or a.shape[1:] != b.shape[1:]:
            return f"its output has no batch dimension: {tuple(a.shape)} for two, {tuple(b.shape)} for three"
    return ""


def _behind(seen: _Seen) -> list[int]:
    """The frozen calls behind what is trained, and in no other such call."""
    behind = {index for index, why in seen.refused.items() if why == BEHIND}
    inside: set[int] = set()
    for index, record in enumerate(seen.records):
        if record.parent in inside or record.parent in behind:
            inside.add(index)
    return sorted(behind - inside)


def _outermost(records: Sequence[_Record], excluded: Collection[int]) -> list[int]:
    """The calls that are cached: not excluded, and in none that is."""
    kept: list[int] = []
    inside: set[int] = set()
    for index, record in enumerate(records):
        if record.parent in inside:
            inside.add(index)
        elif index not in excluded:
            kept.append(index)
            inside.add(index)
    return kept


def _settled(
    model: nn.Module, sample: Tensor, records: Sequence[_Record], excluded: dict[int, str]
) -> tuple[list[int], set[_Leaf], set[_Leaf]]:
    """The cached calls, what of them is read and what is written, after those that have to be run are excluded."""
    while True:
        kept = _outermost(records, excluded)
        read, written = _read(model, sample, records, kept)
        read_calls = [index for index in kept if any((index, at) in read for at in range(len(records[index].tensors)))]
        given: dict[int, int] = {}  # a tensor that several calls give is the first one's
        for index in read_calls:
            for tensor in records[index].tensors:
                given.setdefault(id(tensor), index)
        conflicts = {
            index: "it changes in place what the rest of the pass reads"
            for index in kept
            if any(given.get(changed, index) < index for changed in records[index].changed)
        }
        if not conflicts:  # what has no parameters and works on what is kept anyway is cheaper to run
            conflicts = {
                index: ""
                for index in read_calls
                if records[index].bare
                and records[index].inputs
                and all(given.get(tensor, index) < index for tensor in records[index].inputs)
            }
        if not conflicts:
            return kept, read, written
        excluded.update(conflicts)


_Leaf = tuple[int, int]
"""Index of a call, and which of its tensors."""
_IMAGE: _Leaf = (-1, 0)


def _read(
    model: nn.Module, sample: Tensor, records: Sequence[_Record], kept: Sequence[int]
) -> tuple[set[_Leaf], set[_Leaf]]:
    """The tensors that the rest of the pass reads, whose stand-in gets a gradient, and those that it writes into."""
    waiting = {(records[index].module, visible_number(records, kept, index)): index for index in kept}
    name, counts = named(model), Counter[str]()
    sources: dict[_Leaf, Tensor] = {}
    copies: dict[_Leaf, Tensor] = {}

    def stand_in(leaf: _Leaf, tensor: Tensor) -> Tensor:
        sources[leaf] = tensor.detach().clone().requires_grad_()
        copies[leaf] = sources[leaf].clone()  # a leaf must not be changed in place, a copy may be
        return copies[leaf]

    def around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (name[id(module)], counts[name[id(module)]])
        counts[name[id(module)]] += 1
        if key not in waiting:
            return forward(*args, **kwargs)
        record, index = records[waiting[key]], waiting[key]
        assert record.structure is not None
        found = iter(stand_in((index, at), tensor) for at, tensor in enumerate(record.tensors))
        leaves = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in record.leaves]
        return tree_unflatten(leaves, record.structure)

    wanted = {records[index].module for index in kept}
    with intercepted([m for m in model.modules() if name.get(id(m)) in wanted], around):
        image = stand_in(_IMAGE, sample) if sample.is_floating_point() else sample
        outputs = [tensor.sum() for tensor in tensors(model(image)) if tensor.requires_grad]
    found: set[_Leaf] = set()
    if outputs:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(outputs, list(sources.values()), allow_unused=True)
        found = {leaf for leaf, gradient in zip(sources, gradients, strict=True) if gradient is not None}
    written = {leaf for leaf, copy in copies.items() if copy._version and leaf != _IMAGE}
    return found | written, written


def visible_number(records: Sequence[_Record], kept: Sequence[int], index: int) -> int:
    """Which call of its module a call is, where calls inside cached calls are not seen."""
    inside: set[int] = set()
    count = 0
    for at, record in enumerate(records[:index]):
        if record.parent in inside or record.parent in kept:
            inside.add(at)
        elif record.module == records[index].module:
            count += 1
    return count


def _call(records: Sequence[_Record], kept: Sequence[int], index: int, read: set[_Leaf], written: set[_Leaf]) -> Call:
    record = records[index]
    assert record.structure is not None
    outputs = tuple(
        Output(
            (tensor.shape[0] // 2, *tensor.shape[1:]),
            tensor.dtype,
            _order(tensor),
            read=(index, at) in read,
            written=(index, at) in written,
        )
        for at, tensor in enumerate(record.tensors)
    )
    constants = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in record.leaves)
    number = visible_number(records, kept, index)
    return Call(record.module, number, outputs, record.flops // 2, record.structure, constants)


def _order(tensor: Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    axes = sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))
    return tuple(axes) if axes[0] == 0 else tuple(range(tensor.ndim))


def _reasons(records: Sequence[_Record], excluded: Mapping[int, str]) -> dict[str, str]:
    """Frozen module -> why it runs each time; the outermost ones, in the order of the pass."""
    found = {records[index].module: why for index, why in sorted(excluded.items()) if why}
    return {
        name: why
        for name, why in found.items()
        if not any(other != name and name.startswith(f"{other}.") for other in found)
    }
