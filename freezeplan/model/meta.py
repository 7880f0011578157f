"""The meta device: models of names and shapes, made without memory, and without the time that initialisers take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_INITIALISERS = frozenset(
    {found for name, found in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    | {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.fill_}
    | {Tensor.zero_}
)


class _WithoutValues(TorchFunctionMode):
    """Leaves out what would write values into a tensor that has none: most of the time that a model takes to make."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _INITIALISERS:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Make every new tensor on the meta device, and let initialisers write nothing.

    Examples:
        >>> with meta_device():
        ...     nn.Linear(2, 3).weight.device
        device(type='meta')
    """
    with torch.device("meta"), _WithoutValues():
        yield
