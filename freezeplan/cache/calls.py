"""Passes in which every call of a module is seen or answered, and after which the model is as before."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from freezeplan.model import names

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


@contextlib.contextmanager
def given_together(model: nn.Module, images: int) -> Iterator[None]:
    """Let a model that takes several images take them as one tensor while the context is open.

    Args:
        model: Its ``forward`` begins with K images, (N, C, H, W) each.
        images: K; with 1 nothing is changed. Then it takes (N, K, C, H, W) in their place.

    Examples:
        >>> class Both(nn.Module):
        ...     def forward(self, left, right):
        ...         return left - right
        >>> with given_together(model := Both(), 2):
        ...     model(torch.tensor([[5, 3]]))
        tensor([2])
    """
    before = model.__dict__.get("forward")
    if images == 1 or hasattr(before, "together"):
        yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def together(given: Tensor, *others: Any, **named: Any) -> Any:
        return forward(*given.unbind(1), *others, **named)

    together.together = True  # type: ignore[attr-defined]
    model.__dict__["forward"] = together
    try:
        yield
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = before


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
