"""The frozen prefix: what gives the same answer for an image in every epoch, found by watching forward passes.

Autograd is the witness. A module call none of whose outputs requires grad has nothing trained ahead of it; if nothing
in it is random either, it can be *memoised*. What of it the rest of the pass really reads is found by a second pass, in
which every such output is a fresh leaf: the leaves that get a gradient are read. No tracing, no names, no knowledge of
the architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from freezeplan import names
from freezeplan.errors import ApplyError


@dataclass(frozen=True)
class Call:
    """A call of a module that can be memoised."""

    module: str
    number: int
    """Which call of this module within one forward pass, from 0."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its tensor outputs, the batch included."""
    bytes: int
    """Of its tensor outputs, for one image; 0 where the rest of the pass reads none of them."""


@dataclass(frozen=True)
class Prefix:
    """What of a forward pass can be memoised under the plan that is live on a model."""

    calls: tuple[Call, ...]
    """In the order of the pass; only the outermost of nested calls."""
    reasons: Mapping[str, str]
    """Frozen module whose calls cannot be memoised -> why; the outermost ones."""
    image_bytes: int
    """Of one image as the model gets it."""
    flops: int
    """Of the memoised calls, for one image forward; a multiplication and an addition are two."""
    total_flops: int
    """Of the whole pass, for one image forward."""

    @property
    def stored(self) -> tuple[Call, ...]:
        """The calls whose outputs the rest of the pass reads."""
        return tuple(call for call in self.calls if call.bytes)

    @property
    def bytes(self) -> int:
        """What has to be kept for one image."""
        return sum(call.bytes for call in self.stored)

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
            if self.bytes > self.image_bytes:
                lines.append("advice: the features are larger than the images; a cache costs more than it reads")
            elif share < 0.1:
                lines.append("advice: little is computed ahead of what is trained; a cache gains little")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, found in by_reason.items():
            more = f" and {len(found) - 1} more" if found[1:] else ""
            lines.append(f"not memoised: {found[0] or 'the model'}{more}: {reason}")
        return "\n".join(lines)


def watch(model: nn.Module, sample: Tensor, random: Mapping[str, str]) -> Prefix:
    """Find what can be memoised by running the model on a sample. The model is left as it was.

    Three forward passes in train mode (a plan's pins keep what is frozen in eval), and a backward pass that reaches no
    parameter. Random states are the caller's again afterwards, and so are the buffers.

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
    with _undisturbed(model):
        first, flops = _Watch(model, random), FlopCounterMode(display=False)
        with flops, first.hooks(flops.get_total_flops):
            if not any(tensor.requires_grad for tensor in _tensors(model(sample))):
                raise ApplyError("the model's answer to the sample requires no grad: nothing trained takes part in it")
        again = _Watch(model, random)
        with again.hooks():
            model(sample)
        steady = [(call.module, call.number) for call in again.found] == [(c.module, c.number) for c in first.found]
        if not steady:
            reason = "its parts are not called in a fixed order"
            return Prefix((), {"": reason}, _size(sample), 0, flops.get_total_flops() // len(sample))
        read = _read(model, sample, {(call.module, call.number) for call in first.found})
    batch = len(sample)
    calls, reasons, saved = [], dict(first.reasons), 0
    for found in first.found:
        if any(len(shape) == 0 or shape[0] % batch for shape in found.shapes):
            reasons[found.module] = f"no axis of images in its output: {found.shapes}"
            continue
        size = found.bytes // batch if (found.module, found.number) in read else 0
        calls.append(Call(found.module, found.number, found.shapes, size))
        saved += found.flops
    return Prefix(tuple(calls), reasons, _size(sample), saved // batch, flops.get_total_flops() // batch)


@dataclass
class _Found:
    module: str
    number: int
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    flops: int


class _Watch:
    """One forward pass, watched: the outermost calls that can be memoised."""

    def __init__(self, model: nn.Module, random: Mapping[str, str]):
        self.found: list[_Found] = []
        self.reasons: dict[str, str] = {}
        self._model = model
        self._name = {id(module): name for name, found in names.modules(model).items() for module in found}
        self._still = {id(m): not any(p.requires_grad for p in m.parameters()) for m in model.modules()}
        live = {id(m): _moves(m, random.get(self._name[id(m)], "")) for m in model.modules()}
        self._why = {id(m): next((live[id(p)] for p in m.modules() if live[id(p)]), "") for m in model.modules()}
        self._counts: dict[str, int] = {}
        self._open: list[tuple[int, int]] = []  # finds and FLOPs when a call began

    @contextlib.contextmanager
    def hooks(self, flops: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """Watch every call while the context is open."""

        def before(module: nn.Module, inputs: Any) -> None:
            self._open.append((len(self.found), flops()))

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            begun, started = self._open.pop()
            found = self._judge(module, output, flops() - started)
            if found is not None:
                del self.found[begun:]  # what it called itself
                self.found.append(found)

        handles = [m.register_forward_pre_hook(before) for m in self._model.modules() if m is not self._model]
        handles += [m.register_forward_hook(after) for m in self._model.modules() if m is not self._model]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _judge(self, module: nn.Module, output: Any, flops: int) -> _Found | None:
        tensors = _tensors(output)
        name = self._name[id(module)]
        number = self._counts[name] = self._counts.get(name, -1) + 1
        if not tensors or any(tensor.requires_grad for tensor in tensors):
            if self._still[id(module)] and any(True for _ in module.parameters()):
                self._note(name, "behind what is trained")
            return None
        if self._why[id(module)]:
            self._note(name, self._why[id(module)])
            return None
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        return _Found(name, number, shapes, sum(tensor.nbytes for tensor in tensors), flops)

    def _note(self, name: str, reason: str) -> None:
        below = [other for other in self.reasons if other.startswith(f"{name}.")]
        for other in below:
            del self.reasons[other]
        self.reasons[name] = reason


def _moves(module: nn.Module, random: str) -> str:
    """Why a module's answer is not the same twice; empty if it is."""
    if not module.training:
        return ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch norm in train, whose answer depends on the batch"
    return f"random: {random}" if random else ""


def _read(model: nn.Module, sample: Tensor, calls: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """The calls whose outputs the rest of the pass reads: those whose stand-in gets a gradient."""
    leaves: list[tuple[tuple[str, int], Tensor]] = []
    counts: dict[str, int] = {}

    def leaf(key: tuple[str, int], tensor: Tensor) -> Tensor:
        found = tensor.detach().clone()
        leaves.append((key, found))
        # a copy of the leaf may be changed in place, as a leaf may not; what has no gradient counts as read
        return found.requires_grad_().clone() if found.is_floating_point() else tensor

    def stand_in(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            key = (name, counts.setdefault(name, 0))
            counts[name] += 1
            return _mapped(output, lambda tensor: leaf(key, tensor)) if key in calls else None

        return hook

    wanted = {name for name, _ in calls}
    handles = [
        module.register_forward_hook(stand_in(name))
        for name, found in names.modules(model).items()
        if name in wanted
        for module in found[-1:]
    ]
    try:
        outputs = [tensor for tensor in _tensors(model(sample)) if tensor.requires_grad]
    finally:
        for handle in handles:
            handle.remove()
    asked = [tensor for _, tensor in leaves if tensor.requires_grad]
    gradients = iter(torch.autograd.grad([o.sum() for o in outputs], asked, allow_unused=True) if asked else ())
    return {key for key, tensor in leaves if not tensor.requires_grad or next(gradients) is not None}


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run passes in train mode and give modes, buffers and random states back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(), torch.enable_grad():
        try:
            model.train()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    if buffer.shape == value.shape:
                        buffer.copy_(value)


def _size(sample: Tensor) -> int:
    return sample.nbytes // len(sample)


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in an output, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)({key: _mapped(part, change) for key, part in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
