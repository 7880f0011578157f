"""Canonical names -> live parameters, buffers and modules of a model, looked up anew at each use.

Wrappers put themselves into the names and some replace every parameter object, so freezeplan keeps names and never
tensors. ``module.`` (DDP), ``_orig_mod.`` (compile), ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.`` and
``parametrizations.*.original*`` do not count, wherever they stand; a part of the model that is itself called ``module``
(timm's iFormer has some) does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor, nn

from freezeplan.errors import ModelError

T = TypeVar("T")

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset(
    ("DataParallel", "DistributedDataParallel", "AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3")
)
"""Wrappers that call what they wrap ``module``, a name that models use too."""
_SPECIAL = _WRAPPERS | {"parametrizations"}
_ENDS = tuple(_SPECIAL)
_SUSPECT = re.compile(rf"(?:^|\.)(?:{'|'.join(sorted(_SPECIAL))})(?:\.|$)")


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
        if children := module._modules:
            below = f"{name}." if name else ""
            ahead += [(below + key, child) for key, child in reversed(children.items()) if child is not None]
    return found


def called_module(walked: Sequence[tuple[str, nn.Module]]) -> frozenset[str]:
    """Return the names, of what ``walk`` found, that end in ``module`` and are the model's own, no wrapper's."""
    called = [name for name, _ in walked if name == "module" or name.endswith(".module")]
    live = dict(walked) if called else {}
    return frozenset(name for name in called if type(live[owner(name)]).__name__ not in _WRAPPER_CLASSES)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers such as ``torch.compile`` and DistributedDataParallel.

    Examples:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True

    Raises:
        ModelError: If it is no module.
    """
    given: object = model
    if not isinstance(given, nn.Module):
        raise ModelError(
            f"a model is a torch.nn.Module, found a {type(given).__name__}",
            notes=["apply_plan(model, plan), resolve_plan(plan, model); create_model(name) makes a model of a name"],
        )
    while True:
        children = dict(model.named_children())
        if len(children) != 1 or not _WRAPPERS.issuperset(children) or called_module(walk(model)) & children.keys():
            return model
        (model,) = children.values()


@dataclass(frozen=True)
class Live:
    """The parts of a model by their canonical names, as they were when ``survey`` looked."""

    root: nn.Module
    """The model, without the wrappers around it."""
    walked: Sequence[tuple[str, nn.Module]]
    """What ``walk`` returns: names as torch has them."""
    parameters: dict[str, list[nn.Parameter]]
    """Canonical name -> its parameters: one, or several where a parametrization holds the parts of one."""
    inner: dict[str, nn.Module]
    """Canonical name -> the module itself, without wrappers and without what a parametrization adds to it."""
    buffers: dict[str, list[Tensor]]
    """Canonical name -> its persistent buffers. Others are derived from the rest and may be rebuilt."""
    own: Collection[str]
    """Names of modules that are called like a wrapper's and are the model's own."""

    @cached_property
    def first_name(self) -> Mapping[int, str]:
        """``id`` of each parameter, of a parametrized one that of its first -> the first of its names, in order."""
        found: dict[int, str] = {}
        for name, held in self.parameters.items():
            found.setdefault(id(held[0]), name)
        return found

    @cached_property
    def modules(self) -> Mapping[str, list[nn.Module]]:
        """Canonical name -> its modules: one, or several where wrappers stand around it; the root under ``""``."""
        return _grouped((canonical_module(name, self.own), module) for name, module in self.walked)


def survey(model: nn.Module) -> Live:
    """Look up all parts of a model in one walk; wrappers around it do not count.

    Examples:
        >>> live = survey(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
        >>> list(live.parameters), list(live.modules), len(live.parameters["weight"])
        (['bias', 'weight'], [''], 2)
    """
    model = unwrap(model)
    walked = walk(model)
    special = [name for name, _ in walked if name.endswith(_ENDS) and name.rpartition(".")[2] in _SPECIAL]
    own = called_module(walked) if special else frozenset()
    parameters, buffers = _held(walked)
    if own.issuperset(special):
        return Live(model, walked, parameters, dict(walked), buffers, own)
    inner: dict[str, nn.Module] = {}
    for name, module in walked:
        if "parametrizations" not in name.split("."):
            inner[canonical_module(name, own)] = module  # of a module and the wrappers around it, the innermost is last
    return Live(model, walked, _canonical(parameters, own), inner, _canonical(buffers, own), own)


def _held(walked: Iterable[tuple[str, nn.Module]]) -> tuple[dict[str, list[nn.Parameter]], dict[str, list[Tensor]]]:
    """The parameters and the persistent buffers of what ``walk`` found, by torch's names, each one by itself."""
    parameters: dict[str, list[nn.Parameter]] = {}
    buffers: dict[str, list[Tensor]] = {}
    for name, module in walked:
        below = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters[below + key] = [parameter]
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffers[below + key] = [buffer]
    return parameters, buffers


def _canonical(held: Mapping[str, list[T]], own: Collection[str]) -> dict[str, list[T]]:
    """The same by canonical names: what a parametrization made of one parameter is together."""
    return _grouped((canonical(name, own), item) for name, items in held.items() for item in items)


def parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return canonical name -> its live parameters; see ``Live``.

    Examples:
        >>> list(parameters(nn.Linear(2, 3)))
        ['weight', 'bias']
    """
    return survey(model).parameters


def modules(model: nn.Module) -> Mapping[str, list[nn.Module]]:
    """Return canonical name -> its live modules; see ``Live``.

    Examples:
        >>> list(modules(nn.Sequential(nn.ReLU())))
        ['', '0']
    """
    return survey(model).modules


def buffers(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return canonical name -> its live persistent buffers; see ``Live``."""
    return survey(model).buffers


def grouped(model: nn.Module, state: Mapping[str, T]) -> dict[str, list[T]]:
    """Return what a file holds by the canonical names of the model that it belongs to.

    Examples:
        >>> grouped(nn.Linear(2, 2), {"module.weight": 1, "module.bias": 2})
        {'weight': [1], 'bias': [2]}
    """
    own = called_module(walk(model))
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
