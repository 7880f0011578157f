"""A model as data: names, shapes, classes and what timm knows of them. No tensors, no torch.

``describer.py`` writes it; selecting and resolving read it, so that both are pure and work for a model that was only
created on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Tensor(NamedTuple):
    """One parameter; tied weights are one tensor with several names."""

    name: str
    """Canonical dotted name: without ``module.``, ``_orig_mod.`` and the like."""
    shape: tuple[int, ...]
    module: str
    """Name of the module that owns it; empty for the root."""
    aliases: tuple[str, ...] = ()
    """Further names of the same tensor."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names, the first one first."""
        return (self.name, *self.aliases)


class Module(NamedTuple):
    """One module, the root included under the empty name."""

    name: str
    types: tuple[str, ...]
    """Class name, then the names of its bases."""
    aliases: tuple[str, ...] = ()
    """Further names of the same module object."""
    random: str = ""
    """What it draws at random in train mode, such as ``Dropout p=0.5``; empty if nothing."""
    caches: bool = False
    """Whether it caches trained values while in eval (timm's ``attention_bias_cache``)."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names, the first one first."""
        return (self.name, *self.aliases)


class Part(NamedTuple):
    """An outermost timm model in the model; a whole timm model is the part with the empty name."""

    name: str
    """Name of the module."""
    architecture: str
    """Timm's name of it, or the class."""
    tensors: frozenset[str]
    classifier: frozenset[str] = frozenset()
    """The tensors of a classifier of its own."""
    usual: int = 0
    """Elements of the classifier that the architecture has by default; 0 if that is not known."""


@dataclass(frozen=True)
class Description:
    """All that a plan can ask of a model.

    Examples:
        >>> modules = (Module("", ("Toy",)), Module("fc", ("Linear",)))
        >>> model = Description("toy", (Tensor("fc.weight", (2, 3), "fc"),), modules)
        >>> [tensor.elements for tensor in model.tensors]
        [6]
        >>> sorted(model.below["fc"])
        ['fc.weight']
    """

    model: str
    """What the model is called in reports: timm's architecture, or the class."""
    tensors: tuple[Tensor, ...]
    modules: tuple[Module, ...]
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Role -> names of the tensors that have it, and of modules that have it without owning a tensor."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Role, ``stage`` or ``layer_decay`` -> why this model has none, one sentence with what to do."""
    stages: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> stage: 0 the stem, counted from 1; absent for the classifier and what belongs to it."""
    exponents: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> exponent of ``layer_decay``: the layers behind it; 0 for the last."""
    unplaced: tuple[str, ...] = ()
    """Tensors that timm's matcher leaves out, the classifier's excepted; they have the stage of the tensor ahead."""
    no_decay: frozenset[str] = frozenset()
    """Tensors without weight decay by timm's rule: one dimension or none, biases, ``no_weight_decay()``."""
    beside_head: frozenset[str] = frozenset()
    """Tensors that stand in the module that holds the classifier, or in ``pre_logits``, and are not the classifier."""
    buffers: Mapping[str, str] = field(default_factory=dict)
    """Persistent buffer -> the module that owns it; of one that a parametrization made, the one that it belongs to."""
    parts: tuple[Part, ...] = ()
    """The parts that are timm's, in the model's order; what is in none of them is outside."""
    unread: frozenset[str] = frozenset()
    """Tensors that PEFT keeps beside the copy that it trains (``modules_to_save``); no forward pass reads them."""

    @cached_property
    def own(self) -> Mapping[str, tuple[str, ...]]:
        """Module name -> names of the tensors that it owns itself."""
        own: dict[str, tuple[str, ...]] = {module.name: () for module in self.modules}
        for tensor in self.tensors:
            own[tensor.module] = (*own.get(tensor.module, ()), tensor.name)
        return own

    @cached_property
    def below(self) -> Mapping[str, frozenset[str]]:
        """Module name -> names of the tensors that it or a module below it owns, under any of their names."""
        below: dict[str, set[str]] = {name: set() for module in self.modules for name in module.names}
        for tensor in self.tensors:
            for name in tensor.names:
                for prefix in ("", *prefixes(name)):
                    below.setdefault(prefix, set()).add(tensor.name)
        return {name: frozenset(tensors) for name, tensors in below.items()}

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Class names of the model itself, its own first."""
        return next((module.types for module in self.modules if not module.name), ())

    @cached_property
    def tensor_paths(self) -> Mapping[str, tuple[str, ...]]:
        """Tensor -> each of its names, behind the names of the modules above it, outermost first."""
        return _paths(self.tensors)

    @cached_property
    def module_paths(self) -> Mapping[str, tuple[str, ...]]:
        """Module, the root excluded -> each of its names, behind the names of the modules above it."""
        return _paths(module for module in self.modules if module.name)

    @cached_property
    def last_stage(self) -> int:
        """Number of the last stage, which is the number of stages without the stem; of parts, that of the deepest."""
        return max(self.stages.values(), default=0)

    @cached_property
    def last_stages(self) -> Mapping[str, int]:
        """Tensor with a stage -> number of the last stage of the part that it is in."""
        last: dict[str, int] = {}
        for part in self.parts:
            found = max((self.stages[name] for name in part.tensors if name in self.stages), default=0)
            last |= dict.fromkeys(part.tensors, found)
        return {name: last.get(name, self.last_stage) for name in self.stages}

    @cached_property
    def top(self) -> Mapping[str, int]:
        """First component of the names -> number of tensors, in the model's order."""
        top: dict[str, int] = {}
        for tensor in self.tensors:
            first = tensor.name.partition(".")[0]
            top[first] = top.get(first, 0) + 1
        return top


def _paths(things: Iterable[Tensor | Module]) -> Mapping[str, tuple[str, ...]]:
    known: dict[str, tuple[str, ...]] = {"": ()}

    def path(name: str) -> tuple[str, ...]:
        if name not in known:
            known[name] = (*path(name.rpartition(".")[0]), name)
        return known[name]

    return {one.name: path(one.name) + tuple(part for name in one.aliases for part in path(name)) for one in things}


def prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules above a dotted name, outermost first, without the root.

    Examples:
        >>> list(prefixes("layer1.0.conv1.weight"))
        ['layer1', 'layer1.0', 'layer1.0.conv1']
    """
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
