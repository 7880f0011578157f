"""Canonical names -> live parameters, buffers and modules of a model, looked up anew at each use.

Wrappers put themselves into the names and some replace every parameter object, so freezeplan keeps names and never
tensors. ``module.`` (DDP), ``_orig_mod.`` (compile), ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.`` and
``parametrizations.*.original*`` do not count, wherever they stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical(name: str) -> str:
    """Return a dotted name without what wrappers and parametrizations put into it.

    Examples:
        >>> canonical("module._orig_mod.layer1._checkpoint_wrapped_module.0.conv1.weight")
        'layer1.0.conv1.weight'
        >>> canonical("fc.parametrizations.weight.original0")
        'fc.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if "parametrizations" in parts:
        at = parts.index("parametrizations")
        if parts[at + 2 :] and parts[at + 2].startswith("original"):
            return ".".join([*parts[:at], parts[at + 1]])
    return ".".join(parts)


def canonical_module(name: str) -> str:
    """Return a module's canonical name; a parametrization's own modules count as the module that they belong to.

    Examples:
        >>> canonical_module("_orig_mod.layer1.conv.parametrizations.weight")
        'layer1.conv'
    """
    parts = [part for part in name.split(".") if part and part not in _WRAPPERS]
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers such as ``torch.compile`` and DistributedDataParallel.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        children = dict(model.named_children())
        if len(children) != 1 or not _WRAPPERS.issuperset(children) or any(True for _ in model.parameters(recurse=False)):
            return model
        (model,) = children.values()


def parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return canonical name -> its live parameters: one, or several where a parametrization holds the parts of one.

    Examples:
        >>> list(parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))))
        ['bias', 'weight']
    """
    return _grouped((canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False))


def modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return canonical name -> its live modules: one, or several where wrappers stand around it; root under ``""``."""
    return _grouped((canonical_module(n), m) for n, m in model.named_modules(remove_duplicate=False))


def buffers(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return canonical name -> its live persistent buffers. Others are derived from the rest and may be rebuilt."""
    return _grouped(
        (canonical(f"{prefix}.{name}" if prefix else name), buffer)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    )


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for name, item in pairs:
        groups.setdefault(name, []).append(item)
    return groups


def owner(name: str) -> str:
    """Return the canonical name of the module that owns a canonical name.

    Examples:
        >>> owner("head.fc.weight"), owner("pos_embed")
        ('head.fc', '')
    """
    return name.rpartition(".")[0]
