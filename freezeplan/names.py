"""Canonical names -> live parameters, buffers and modules of a model, looked up anew at each use.

Wrappers put themselves into the names and some replace every parameter object, so freezeplan keeps names and never
tensors. ``module.`` (DDP), ``_orig_mod.`` (compile), ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.`` and
``parametrizations.*.original*`` do not count, wherever they stand; a part of the model that is itself called ``module``
(timm's iFormer has some) does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset(
    ("DataParallel", "DistributedDataParallel", "AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3")
)
"""Wrappers that call what they wrap ``module``, a name that models use too."""
_SUSPECT = re.compile(rf"(?:^|\.)(?:{'|'.join(sorted(_WRAPPERS))}|parametrizations)(?:\.|$)")


def canonical(name: str, own: Collection[str] = ()) -> str:
    """Return a dotted name without what wrappers and parametrizations put into it.

    Args:
        name: A parameter's or buffer's name as torch gives it.
        own: Names of modules that are called like a wrapper's and are the model's own.

    Examples:
        >>> canonical("module._orig_mod.layer1._checkpoint_wrapped_module.0.conv1.weight")
        'layer1.0.conv1.weight'
        >>> canonical("fc.parametrizations.weight.original0")
        'fc.weight'
    """
    if not _SUSPECT.search(name):
        return name
    parts = _without_wrappers(name, own)
    if "parametrizations" in parts:
        at = parts.index("parametrizations")
        if parts[at + 2 :] and parts[at + 2].startswith("original"):
            return ".".join([*parts[:at], parts[at + 1]])
    return ".".join(parts)


def canonical_module(name: str, own: Collection[str] = ()) -> str:
    """Return a module's canonical name; a parametrization's own modules count as the module that they belong to.

    Examples:
        >>> canonical_module("_orig_mod.layer1.conv.parametrizations.weight")
        'layer1.conv'
    """
    if not _SUSPECT.search(name):
        return name
    parts = _without_wrappers(name, own)
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts)


def _without_wrappers(name: str, own: Collection[str]) -> list[str]:
    parts = name.split(".") if name else []
    return [
        part for end, part in enumerate(parts, 1) if part not in _WRAPPERS or (own and ".".join(parts[:end]) in own)
    ]


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``named_modules(remove_duplicate=False)`` yields, in its order, several times as fast.

    Examples:
        >>> [name for name, _ in walk(nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU()))]
        ['', '0', '0.0', '1']
    """
    found, ahead = [], [("", model)]
    while ahead:
        name, module = place = ahead.pop()
        found.append(place)
        if module._modules:
            below = f"{name}." if name else ""
            ahead += [(below + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return found


def called_module(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that are called ``module`` and stand in no wrapper: they are the model's own."""
    return called_module_in(walk(model))


def called_module_in(walked: Iterable[tuple[str, nn.Module]]) -> frozenset[str]:
    """Return the same of what ``walk`` returned."""
    called = [name for name, _ in walked if name == "module" or name.endswith(".module")]
    live = dict(walked) if called else {}
    return frozenset(name for name in called if type(live[owner(name)]).__name__ not in _WRAPPER_CLASSES)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers such as ``torch.compile`` and DistributedDataParallel.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    while True:
        children = dict(model.named_children())
        wraps = len(children) == 1 and _WRAPPERS.issuperset(children) and called_module(model).isdisjoint(children)
        if not wraps:
            return model
        (model,) = children.values()


def parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return canonical name -> its live parameters: one, or several where a parametrization holds the parts of one.

    Examples:
        >>> list(parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))))
        ['bias', 'weight']
    """
    return both(model)[0]


def both(model: nn.Module) -> tuple[dict[str, list[nn.Parameter]], dict[str, list[nn.Module]]]:
    """Return ``parameters(model)`` and ``modules(model)``, in one walk.

    Examples:
        >>> [list(found) for found in both(nn.Sequential(nn.Linear(1, 1)))]
        [['0.weight', '0.bias'], ['', '0']]
    """
    live = walk(model)
    own = called_module_in(live)
    found: dict[str, list[nn.Parameter]] = {}
    seen: dict[str, list[nn.Module]] = {}
    for above, module in live:
        wrapped = _SUSPECT.search(above)
        seen.setdefault(canonical_module(above, own) if wrapped else above, []).append(module)
        below = f"{above}." if above else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                whole = canonical(below + name, own) if wrapped else below + name
                found.setdefault(whole, []).append(parameter)
    return found, seen


def modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return canonical name -> its live modules: one, or several where wrappers stand around it; root under ``""``."""
    return both(model)[1]


def buffers(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return canonical name -> its live persistent buffers. Others are derived from the rest and may be rebuilt."""
    own = called_module(model)
    return _grouped(
        (canonical(f"{prefix}.{name}" if prefix else name, own), buffer)
        for prefix, module in walk(model)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )


def grouped(model: nn.Module, state: Mapping[str, T]) -> dict[str, list[T]]:
    """Return what a file holds by the canonical names of the model that it belongs to.

    Examples:
        >>> grouped(nn.Linear(2, 2), {"module.weight": 1, "module.bias": 2})
        {'weight': [1], 'bias': [2]}
    """
    own = called_module(model)
    return _grouped((canonical(name, own), value) for name, value in state.items())


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
