"""Run the model with cached outputs in place of its frozen layers."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan.cache.calls import given_together, intercepted, named, tensors
from freezeplan.cache.independence import same
from freezeplan.cache.prefix import Call, Output, Prefix
from freezeplan.cache.weights import Weights
from freezeplan.errors import ApplyError
from freezeplan.model import names
from freezeplan.model.sharded import is_sharded

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Rest(nn.Module):
    """The part of a model that is left to run on features: what is trained, and what stands behind it.

    Its parameters are the trained parameters of the model, the same objects under the same names, and so are the
    modules that hold nothing else: an optimizer, an average of weights or a checkpoint made from one is good for the
    other. ``train``, ``eval`` and ``to`` act on the whole model.

    Args:
        model: With a live plan.
        prefix: What ``watch`` found on it.
        together: Images that the model takes at a time.
    """

    _model: nn.Module
    _together: int
    _parts: dict[str, list[nn.Module]]
    _frozen: list[nn.Parameter]
    _prefix: Prefix
    _first: str
    _weights: Weights | None
    _needs_autocast: bool

    def __init__(self, model: nn.Module, prefix: Prefix, together: int = 1):
        super().__init__()
        self.__dict__["_model"] = model  # not registered: its frozen parameters are not this module's
        self.__dict__["_prefix"] = prefix
        self.__dict__["_together"] = together
        first = next(iter(inspect.signature(model.forward).parameters.values()), None)
        self.__dict__["_first"] = first.name if first is not None and first.kind in _NAMED else ""
        self.__dict__["_parts"] = _parts(model, prefix)
        self.__dict__["_frozen"] = [p for found in self._parts.values() for m in found for p in m.parameters()]
        self.__dict__["_weights"] = None
        self.__dict__["_needs_autocast"] = prefix.needs_autocast
        _adopt(self, model, {part for found in self._parts.values() for module in found for part in module.modules()})
        self.training = model.training

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return what the model returns for the images that these features are of.

        Args:
            *given: Features, (N, E), as ``capture`` or a dataset of features gives them; then the model's other
                arguments.
            **named: The model's other arguments; or the features too, under the name of its first
                (``pixel_values`` in transformers).

        Raises:
            ApplyError: If a parameter of the cached part is trained now or has other values than when the features
                were computed, these are no features of it, or it runs outside of the autocast that they need.
        """
        by_name = not given and self._first in named
        if not given and not by_name:
            way = f", or {self._first}=" if self._first else ""
            raise ApplyError(f"features are the first argument{way}; found {', '.join(named) or 'none'}")
        features: Tensor = named.pop(self._first) if by_name else given[0]
        elements = self._prefix.elements
        if features.ndim != 2 or features.shape[1] != elements:
            raise ApplyError(
                f"features of this model have the shape (N, {elements}), found {tuple(features.shape)}",
                notes=["images go to the model itself; after a new phase: applied.cached(...) again"],
            )
        if any(parameter.requires_grad for parameter in self._frozen):
            raise ApplyError(
                "what these features were computed with is trained now, so they are of no use",
                notes=["after a new phase: features, rest = applied.cached(...) again"],
            )
        if self._weights is not None and not torch.compiler.is_compiling() and self._weights.changed:
            raise ApplyError(
                "what is frozen has other values than when these features were computed",
                notes=["load weights first, then: features, rest = applied.cached(...)"],
            )
        if self._needs_autocast and not torch.is_autocast_enabled(features.device.type):
            raise ApplyError(
                f"these features were computed under autocast, in {self._prefix.autocast}, and are used outside of it",
                notes=["with torch.autocast(...): outputs = rest(features)"],
            )
        together = given_together(self._model, self._together) if self._together > 1 else contextlib.nullcontext()
        with together, _answering(self._parts, self._prefix, features):
            images = _no_images(self._prefix, features)
            if by_name and self._together == 1:
                return self._model(**{self._first: images}, **named)
            return self._model(images, *given[1:], **named)

    def watch(self, weights: Weights) -> None:
        """Refuse features from now on where what they were computed with is written and gets other values."""
        self.__dict__["_weights"] = weights

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model takes arguments of any name. transformers' Trainer asks before it passes its own."""
        kinds = [parameter.kind for parameter in inspect.signature(self._model.forward).parameters.values()]
        return bool(getattr(self._model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds))

    def train(self, mode: bool = True) -> Rest:
        """Set the mode of the whole model; what the plan holds in eval stays there."""
        self._model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rest:
        self._model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _parts(model: nn.Module, prefix: Prefix) -> dict[str, list[nn.Module]]:
    cached = {call.module for call in prefix.calls}
    return {name: found for name, found in names.modules(model).items() if name in cached}


def _answering(
    parts: dict[str, list[nn.Module]], prefix: Prefix, features: Tensor
) -> contextlib.AbstractContextManager[None]:
    """Let cached calls give their stored outputs."""
    answers = dict(_unpacked(prefix, features))
    name = {id(module): n for n, found in parts.items() for module in found}
    counts = dict.fromkeys(parts, 0)  # no Counter: torch.compile knows none

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        key = (name[id(module)], counts[name[id(module)]])
        counts[key[0]] += 1
        return answers[key] if key in answers else forward(*args, **kwargs)

    return intercepted([module for found in parts.values() for module in found], around)


def _adopt(target: nn.Module, source: nn.Module, cached: Collection[nn.Module]) -> None:
    """Register what is trained of a module, and buffers that may move with it, under its own names."""
    for name, parameter in source.named_parameters(recurse=False):
        if parameter.requires_grad:
            target.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False):
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, child in source.named_children():
        trained = {parameter.requires_grad for parameter in child.parameters()}
        moving = not trained and child not in cached and any(True for _ in child.buffers())
        if trained == {True} or moving:
            target.add_module(name, child)
        elif True in trained:
            part = nn.Module()
            _adopt(part, child, cached)
            target.add_module(name, part)


def _unpacked(prefix: Prefix, features: Tensor) -> Iterator[tuple[tuple[str, int], Any]]:
    """Every cached call's answer: its stored outputs, and zeros without memory for outputs that nobody reads."""
    at, images = 0, len(features)
    for call in prefix.calls:
        found = []
        for output in call.outputs:
            rows, *others = output.shape
            if not output.read:
                found.append(_nothing(features, (images * rows, *others), output.dtype))
                continue
            part = features[:, at : at + output.elements]
            if output.written or part.shape != features.shape:  # as it lay in memory: kernels are chosen by that too
                part = part.clone(memory_format=torch.contiguous_format)
            at += output.elements
            size = (images * rows, *others)
            lying = part.reshape([size[axis] for axis in output.order])
            tensor = lying.permute([output.order.index(axis) for axis in range(len(size))]).to(output.dtype)
            last = prefix.channels_last and tensor.ndim == 4
            found.append(tensor.contiguous(memory_format=torch.channels_last) if last else tensor)
        yield (call.module, call.number), call.answer(found)


def _no_images(prefix: Prefix, features: Tensor) -> Tensor:
    return _nothing(features, (len(features), *prefix.image_shape), prefix.image_dtype)


def _nothing(features: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=features.device).expand(shape)


class _Enough(Exception):  # noqa: N818  # no error: the pass may end here
    """Everything that is kept has been seen."""


def capture(
    model: nn.Module,
    prefixes: Sequence[Prefix],
    given: Tensor,
    earlier: Prefix | None = None,
    *,
    gradients: bool = False,
) -> list[Tensor]:
    """Run a model on images up to the last output that is kept.

    Args:
        model: As it was watched. It is not changed.
        prefixes: What ``watch`` found; several, of several phases, cost one pass.
        given: Images, (N, C, H, W), on the model's device; or features of them, (N, E), from which the pass goes on.
        earlier: What was found on the model where these features were kept; all of it is cached in ``prefixes`` too.
        gradients: Whether autograd records the pass, as in training. It has other kernels for some modules.

    Returns:
        For each prefix the features, (N, E), on that device.
    """
    found: list[dict[tuple[str, int], list[Tensor]]] = [{} for _ in prefixes]
    open_ = [len(prefix.stored) for prefix in prefixes]
    with contextlib.ExitStack() as stack:
        if earlier is not None:
            stack.enter_context(_answering(_parts(model, earlier), earlier, given))
        for at, prefix in enumerate(prefixes):
            stack.enter_context(_collecting(model, prefix, found[at], open_, at))
        with torch.set_grad_enabled(gradients), contextlib.suppress(_Enough):
            model(given if earlier is None else _no_images(earlier, given))
    return [
        torch.cat([part for call in prefix.stored for part in seen[call.module, call.number]], 1)
        for prefix, seen in zip(prefixes, found, strict=True)
    ]


def leading(model: nn.Module, earlier: Prefix, prefixes: Sequence[Prefix], images: Tensor) -> Prefix | None:
    """Return one prefix as its features lead to those of others, bit by bit; None where they do not.

    Features lie in memory in the order that they are stored in, which is not always that of the plain pass: a sum over
    another order rounds differently. So it is tried as ``fill`` computes, with as many images and under
    ``channels_last``; in the order that they are stored in, then channels-last.

    Args:
        model: As it was watched last; it is in train mode afterwards.
        earlier: What was found on it when less was frozen.
        prefixes: What is found now.
        images: A batch, (N, C, H, W), to try it on.
    """
    if not earlier.stored or earlier.image_shape != prefixes[0].image_shape:
        return None
    model.train()
    features, *wanted = capture(model, [earlier, *prefixes], images)
    for last in (False, True):
        tried = dataclasses.replace(earlier, channels_last=last)
        try:
            behind = capture(model, prefixes, features, tried)
        except RuntimeError:  # a shape of features that were not kept
            return None
        if all(map(same, wanted, behind)):
            return tried
    return None


@contextlib.contextmanager
def channels_last(model: nn.Module, prefixes: Sequence[Prefix], sample: Tensor) -> Iterator[None]:
    """Let the convolutions of cached calls lie channels-last, which their kernels are faster on.

    A model whose own code wants its axes as they were (``view`` after a convolution) is left as it is. Afterwards every
    weight lies as before.

    Args:
        model: As it was watched.
        prefixes: What ``watch`` found.
        sample: Some images, (N, C, H, W), to try it on.
    """
    live = names.modules(model)
    cached = [module for prefix in prefixes for call in prefix.calls for module in live[call.module]]
    before: dict[nn.Parameter, Tensor] = {}
    for part in (part for module in cached for part in module.modules()):
        weight = part._parameters.get("weight") if isinstance(part, nn.modules.conv._ConvNd) else None
        if weight is not None and weight.ndim == 4 and not weight.requires_grad and not is_sharded(weight):
            before[weight] = weight.data

    def restore() -> None:
        for weight, value in before.items():
            weight.data = value

    try:
        for weight, value in before.items():
            weight.data = value.contiguous(memory_format=torch.channels_last)
        try:
            capture(model, prefixes, sample)
        except RuntimeError:
            restore()
        yield
    finally:
        restore()


def _collecting(
    model: nn.Module, prefix: Prefix, found: dict[tuple[str, int], list[Tensor]], open_: list[int], at: int
) -> contextlib.AbstractContextManager[None]:
    name, counts = named(model), Counter[str]()
    calls = {(call.module, call.number): call for call in prefix.calls}
    wanted = {call.module for call in prefix.calls}
    inside = False

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return forward(*args, **kwargs)
        key = (name[id(module)], counts[name[id(module)]])
        counts[key[0]] += 1
        call = calls.get(key)
        if call is None:
            return forward(*args, **kwargs)
        inside = True
        try:
            answer = forward(*args, **kwargs)
        finally:
            inside = False
        if call.bytes:
            found[key] = _packed(call, answer)
            open_[at] -= 1
            if not any(open_):
                raise _Enough
        return answer

    return intercepted([m for m in model.modules() if name.get(id(m)) in wanted], around)


def _packed(call: Call, answer: Any) -> list[Tensor]:
    """The outputs that are read, a row an image, as they lie in memory."""
    read = [(output, tensor) for output, tensor in zip(call.outputs, tensors(answer), strict=True) if output.read]
    return [_rows(output, tensor) for output, tensor in read]


def _rows(output: Output, tensor: Tensor) -> Tensor:
    images = tensor.shape[0] // output.shape[0]
    return tensor.detach().permute(output.order).reshape(images, output.elements).clone()
