"""The frozen prefix: what gives the same answer for an image in every epoch, found by watching forward passes.

Autograd is the witness. A module call none of whose outputs requires grad has nothing trained ahead of it; what is
random is made to require grad while watching, so that what follows it does too. A call without either can be
*memoised*. What of it the rest of the pass really reads is found by another pass, in which every output of such a call
is a fresh leaf: the leaves that get a gradient are read. No tracing, no knowledge of the architecture.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from freezeplan import names
from freezeplan.errors import ApplyError

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Output:
    """A tensor that a memoised call gives, as it is for one image."""

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
    """A call of a module that can be memoised."""

    module: str
    number: int
    """Which call of this module within one forward pass, from 0; calls inside memoised calls do not count."""
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
        leaves = [next(found) if constant is _TENSOR else constant for constant in self.constants]
        return tree_unflatten(leaves, self.structure)


_BEHIND = "behind what is trained"
_TENSOR = torch.Tensor
"""Stands among the constants where a tensor is."""


@dataclass(frozen=True)
class Prefix:
    """What of a forward pass can be memoised under the plan that is live on a model."""

    calls: tuple[Call, ...]
    """In the order of the pass; only the outermost of nested calls."""
    reasons: Mapping[str, str]
    """Frozen module whose calls cannot be memoised -> why; the outermost ones."""
    image_shape: tuple[int, ...]
    """Of one image as the model gets it."""
    image_dtype: torch.dtype
    total_flops: int
    """Of the whole pass, for one image forward; a multiplication and an addition are two."""
    behind_flops: int = 0
    """Of the frozen calls behind what is trained, for one image forward. They run each step, and the gradient of their
    inputs costs as much again."""

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
        """Of the memoised calls, for one image forward."""
        return sum(call.flops for call in self.calls)

    @property
    def obstacle(self) -> str:
        """Why nothing can be kept; empty where something can."""
        if self.stored:
            return ""
        found = (f"{name or 'the model'}: {why}" for name, why in self.reasons.items() if why != _BEHIND)
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
            lines = ["nothing ahead of what is trained can be memoised"]
        else:
            share = self.flops / self.total_flops if self.total_flops else 0.0
            ratio = self.bytes / self.image_bytes
            lines = [
                f"memoised: {', '.join(dict.fromkeys(call.module for call in self.stored))}",
                f"{self.bytes:,} bytes an image, {ratio:.2g} times the image's {self.image_bytes:,}",
                f"{self.flops:,} of {self.total_flops:,} forward FLOPs an image ({share:.1%})",
            ]
            if self.advice:
                lines.append(f"advice: {self.advice}")
        if self.behind_flops:
            lines.append(
                f"frozen behind what is trained: {self.behind_flops:,} of {self.total_flops:,} forward FLOPs, run each "
                "step, and as many backward for the gradient of their input"
            )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, found in by_reason.items():
            more = f" and {len(found) - 1} more" if found[1:] else ""
            lines.append(f"not memoised: {found[0] or 'the model'}{more}: {reason}")
        return "\n".join(lines)


def watch(model: nn.Module, sample: Tensor, random: Mapping[str, str]) -> Prefix:
    """Find what can be memoised by running the model on a sample. The model is left as it was.

    Passes in train mode (a plan's pins keep what is frozen in eval), over two images and over three, these two behind
    another, and backward passes that reach no parameter. Random states are the caller's again afterwards, and so are
    the buffers.

    Args:
        model: With a live plan.
        sample: A batch of two images or more, (N, C, H, W), as the model gets them.
        random: Module -> what it draws at random in train mode.

    Raises:
        ApplyError: If the sample is no batch of at least two, or nothing in the pass requires grad.
    """
    if sample.ndim < 1 or len(sample) < 2:
        raise ApplyError(
            f"a sample is a batch of at least two images, found the shape {tuple(sample.shape)}",
            notes=["applied.prefix(next(iter(loader))[0])"],
        )
    pair, three = sample[:2], torch.cat([sample[-1:], sample[:2]])
    with undisturbed(model), torch.autocast(sample.device.type, enabled=False), torch.enable_grad():
        model.train()
        flops = FlopCounterMode(display=False)
        with flops:
            seen = _watched(model, pair, random, flops.get_total_flops)
        again = _watched(model, three, random, lambda: 0)
        calls: tuple[Call, ...] = ()
        if [(r.module, r.parent) for r in seen.records] != [(r.module, r.parent) for r in again.records]:
            reasons = {"": "its parts are not called in a fixed order"}
        else:
            excluded = dict(seen.refused)
            for index, (two, other) in enumerate(zip(seen.records, again.records, strict=True)):
                if index not in excluded and (why := _varies(two, other)):
                    excluded[index] = why
            kept, read, written = _settled(model, pair, seen.records, excluded)
            reasons = _reasons(seen.records, excluded)
            if kept and _IMAGE in read:
                reasons[""] = "what is trained reads the image itself"
            else:
                calls = tuple(_call(seen.records, kept, index, read, written) for index in kept)
    return Prefix(
        calls,
        reasons,
        tuple(sample.shape[1:]),
        sample.dtype,
        total_flops=flops.get_total_flops() // 2,
        behind_flops=sum(seen.records[index].flops for index in _behind(seen)) // 2,
    )


Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def intercepted(modules: Iterable[nn.Module], around: Around) -> Iterator[None]:
    """Let every call of these modules go to ``around(module, forward, args, kwargs)`` while the context is open.

    ``forward`` on the instance stands in for the class's, so calls that pass by hooks are seen too.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = functools.partial(_called, around, module, module.forward)
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _called(around: Around, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return around(module, forward, args, kwargs)


def named(model: nn.Module) -> dict[int, str]:
    """Return ``id`` of each module below a model -> its first canonical name."""
    found: dict[int, str] = {}
    for name, live in names.modules(model).items():
        for module in live:
            found.setdefault(id(module), name)
    found.pop(id(model), None)
    return found


def tensors(value: Any) -> list[Tensor]:
    """Return every tensor in an answer, however it is nested."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run passes in any mode; modes, buffers and random states are the caller's again afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    if buffer.shape == value.shape:
                        buffer.copy_(value)


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
    """Of the last two images, if the call may be memoised, before other calls change them in place."""

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


@dataclass
class _Seen:
    records: list[_Record]
    refused: dict[int, str]
    """Index of a call that cannot be memoised -> why; empty where there is nothing to say."""


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
            record.values = [_last_two(tensor, len(sample)).clone() for tensor in record.tensors]
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
    """Why a call cannot be memoised; empty where there is nothing to say, None where it can be."""
    found = record.tensors
    if not found:
        return ""
    if any(tensor.requires_grad for tensor in found):
        return _BEHIND if frozen and not record.bare and not moves else moves if frozen else ""
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
        rows = a.shape[0] // 2 if a.ndim else 0
        if not rows or a.shape[0] != 2 * rows or b.shape[0] != 3 * rows or a.shape[1:] != b.shape[1:]:
            return f"no axis of images in its output: {tuple(a.shape)} for two, {tuple(b.shape)} for three"
    for a, b in zip(two.values, three.values, strict=True):
        if not close(a, b, 1e-3 if a.dtype.itemsize > 2 else 3e-2):  # other kernels for another number of images
            return "its answer depends on the batch, or on chance"
    return ""


def _last_two(tensor: Tensor, images: int) -> Tensor:
    return tensor.detach()[-2 * (len(tensor) // images) :] if tensor.ndim else tensor.detach()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors are equal but for rounding: to ``tolerance`` times the largest number in the first."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b = a.detach().float(), b.detach().float()
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())


def _behind(seen: _Seen) -> list[int]:
    """The frozen calls behind what is trained, and in no other such call."""
    behind = {index for index, why in seen.refused.items() if why == _BEHIND}
    inside: set[int] = set()
    for index, record in enumerate(seen.records):
        if record.parent in inside or record.parent in behind:
            inside.add(index)
    return sorted(behind - inside)


def _outermost(records: Sequence[_Record], excluded: Collection[int]) -> list[int]:
    """The calls that are memoised: not excluded, and in none that is."""
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
    """The memoised calls, what of them is read and what is written, after those that have to be run are excluded."""
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
    """Which call of its module a call is, where calls inside memoised calls are not seen."""
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
    constants = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in record.leaves)
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
