"""Any model -> its description: names, shapes, classes, and what timm knows of the parts that are timm's."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from freezeplan.errors import ModelError
from freezeplan.model import names
from freezeplan.model.create import create_model, model_names, version
from freezeplan.model.description import Description, Module, Part, Tensor
from freezeplan.model.timm_facts import (
    Facts,
    LivePart,
    find_classifier,
    find_parts,
    is_timm,
    no_weight_decay,
    read_part,
    reentrant,
    reentrant_advice,
    superseded,
    timm_version,
    title,
)
from freezeplan.plan.fields import ROLES

__all__ = [
    "create_model",
    "describe",
    "is_timm",
    "model_names",
    "reentrant",
    "reentrant_advice",
    "timm_version",
    "title",
    "version",
]

_BIAS = re.compile(r"(?:\w+_)?bias(?:_[ih]h_l\d+(?:_reverse)?)?")
_DRAWS = re.compile(r"\bdrop\w*\(|dropout_p\b|self\.dropout,")
_POSITION = re.compile(  # one component of a name
    r"\w*pos(?:ition(?:al)?)?_emb\w*|patch_pos|pixel_pos"  # absolute
    r"|\w*rel(?:ative)?_pos\w*|attention_biases|rope"  # relative
    r"|pos_block|pos_proj|cr?pe\d?|cpb_mlp|meta_mlp"  # what makes them: convolutions, small networks of offsets
)
_NORM = re.compile(r"Norm|InplaceAbn")


@dataclass(frozen=True)
class _Placed:
    """A part of the model that is described, with its tensors."""

    part: LivePart
    facts: Facts | None
    tensors: Mapping[str, str | None]
    """Tensor of the model -> its name in the part's architecture; None where it has none there."""

    def present(self, role: str) -> frozenset[str]:
        """The tensors that have a role in the architecture: those of one of the sets of ``Facts``."""
        wanted: frozenset[str] = getattr(self.facts, role, frozenset())
        return frozenset(self._here[there] for there in wanted if there in self._here)

    @cached_property
    def _here(self) -> Mapping[str | None, str]:
        """Name in the architecture -> tensor of the model."""
        return {there: name for name, there in self.tensors.items()}

    @cached_property
    def unplaced(self) -> frozenset[str]:
        """The tensors that timm's matcher leaves out, and those that the architecture does not have."""
        lost = (name for name, there in self.tensors.items() if there is None)
        return self.present("unplaced").union(lost if self.facts and self.facts.layers else ())

    @property
    def described(self) -> Part:
        """The part as data."""
        elements = self.facts.classifier_elements if self.facts else 0
        return Part(self.part.name, title(self.part.module), frozenset(self.tensors), self.present("head"), elements)


def describe(found: nn.Module | names.Live, *, asked: Collection[str] | None = None) -> Description:
    """Write down all that a plan can ask of a model. Changes nothing; works on the meta device.

    Args:
        found: Any module, or what ``names.survey`` found of it; roles that timm knows need a timm model.
        asked: The roles to find, ``stage`` and ``layer_decay`` for depth; None: all. It saves the time of the others.

    Returns:
        Names, shapes, classes, roles. Tied weights are one tensor with several names.

    Raises:
        ModelError: If it is no module, a parameter has no shape yet, or what it says of its layers cannot be read.

    Examples:
        >>> model = describe(create_model("resnet18", meta=True))
        >>> sorted(model.roles["head"])
        ['fc.bias', 'fc.weight']
        >>> len(model.roles["norm"])
        40
    """
    live = found if isinstance(found, names.Live) else names.survey(found)
    model = live.root
    asked = frozenset((*ROLES, "stage", "layer_decay")) if asked is None else frozenset(asked)
    tied = len(live.first_name) < len(live.parameters)
    aliases = _first_names([(name, held[0]) for name, held in live.parameters.items()])[1] if tied else {}
    tensors = tuple(
        Tensor(name, _shape(name, live.parameters[name]), names.owner(name), aliases.get(name, ()))
        for name in live.first_name.values()
    )
    ordered = tuple(tensor.name for tensor in tensors)
    depth = not asked.isdisjoint(("stem", "stage", "layer_decay"))
    parts = _place(live, depth=depth)
    outside = frozenset(ordered).difference(*(placed.tensors for placed in parts))
    own_classifiers = frozenset().union(*(placed.present("head") for placed in parts))
    unread = superseded(live)
    if hasattr(type(model), "get_classifier") and (not parts or parts[0].part.name):
        head = find_classifier(live) - unread
    else:
        head = own_classifiers.union(outside if parts else ()) - unread
    listed = _listed(live, parts, outside)
    found_stages = dict(_stages(parts))
    find: dict[str, Callable[[], Iterable[str]]] = {
        "head": lambda: head,
        "body": lambda: head.symmetric_difference(ordered),
        "norm": lambda: _norms(live.inner, live.first_name),
        "bias": lambda: (name for name in ordered if "bias" in name and _BIAS.fullmatch(name.rpartition(".")[2])),
        "no_weight_decay": lambda: listed,
        "pos_embed": lambda: _positions(parts),
        "stem": lambda: (name for name, stage in found_stages.items() if stage == 0),
    }
    return Description(
        model=title(model),
        tensors=tensors,
        modules=tuple(_modules(live.inner)),
        roles={role: frozenset(find[role]()) for role in ROLES if role in asked and (head or role != "head")},
        unknown=_unknown(live, parts, head),
        stages=found_stages,
        exponents=dict.fromkeys(outside if parts and depth else (), 0) | _exponents(parts, bool(outside)),
        unplaced=tuple(filter(frozenset().union(*(placed.unplaced for placed in parts)).__contains__, ordered)),
        no_decay=frozenset(_no_decay(tensors, listed)),
        beside_head=frozenset().union(*(placed.present("beside_head") for placed in parts)) - head,
        buffers=_owners(live),
        parts=tuple(placed.described for placed in parts),
        unread=unread,
    )


def _place(live: names.Live, *, depth: bool) -> tuple[_Placed, ...]:
    """Find the parts, read what timm knows of them, and say which tensors are whose: of several the first part's."""
    found: list[_Placed] = []
    first_name = live.first_name
    for part in find_parts(live):
        inside = names.survey(part.module) if part.name else live
        facts = read_part(part, inside, depth=depth)
        tensors: dict[str, str | None] = {first_name[i]: name for i, name in inside.first_name.items()}
        if part.is_cut:
            known = facts.tensors if facts else {}
            there = {first: part.in_source(name or "", known) for first, name in tensors.items()}
            tensors = {first: name and known[name] for first, name in there.items()}
        for earlier in found:
            tensors = {first: name for first, name in tensors.items() if first not in earlier.tensors}
        found.append(_Placed(part, facts, tensors))
    return tuple(found)


def _stages(parts: Iterable[_Placed]) -> Iterator[tuple[str, int]]:
    """The stage of each tensor by its part; one that the architecture does not have has that of the tensor ahead."""
    for placed in parts:
        if placed.facts is None or not placed.facts.stages:
            continue
        ahead = 0
        for name, there in placed.tensors.items():
            stage = ahead if there is None else placed.facts.stages.get(there)
            if stage is not None:
                ahead = stage
                yield name, stage


def _exponents(parts: Iterable[_Placed], outside: bool) -> dict[str, int]:
    """The layers behind each tensor; what is outside stands where the classifier does, or behind it if there is one."""
    found: dict[str, int] = {}
    for placed in parts:
        facts = placed.facts
        if facts is None or not facts.layers:
            continue
        last = max(facts.layers.values())
        if outside:
            last = last + 1 if placed.present("head") else max(last, facts.classifier_layer)
        found |= {
            name: last - (facts.classifier_layer if there is None else facts.layers[there])
            for name, there in placed.tensors.items()
        }
    return found


def _positions(parts: Iterable[_Placed]) -> Iterator[str]:
    for placed in parts:
        ahead = len(placed.part.name) + 1 if placed.part.name else 0
        read = {name: there or name[ahead:] for name, there in placed.tensors.items()}
        if called := set(filter(_POSITION.fullmatch, set(".".join(read.values()).split(".")))):
            yield from (name for name, there in read.items() if not called.isdisjoint(there.split(".")))


def _listed(live: names.Live, parts: Collection[_Placed], outside: Collection[str]) -> frozenset[str]:
    """What ``no_weight_decay()`` lists: inside of a part what the part says, outside what any module says."""
    found = [placed.present("listed") for placed in parts]
    if outside:
        for above, module in live.inner.items():
            if hasattr(type(module), "no_weight_decay"):
                below = f"{above}." if above else ""
                found.append(
                    no_weight_decay(module, {name[len(below) :]: name for name in outside if name.startswith(below)})
                )
    return frozenset().union(*found)


def _unknown(live: names.Live, parts: Collection[_Placed], head: Collection[str]) -> dict[str, str]:
    """What is not known of a model, each with the reason and what to do."""
    called, cls = title(live.root), type(live.root)
    unknown: dict[str, str] = {}
    if not parts and not hasattr(cls, "get_classifier"):
        unknown["head"] = (
            f"{called} is no timm model and holds none, so its classifier is not known; select it with match"
        )
    elif not head and is_timm(live.root) and not hasattr(cls, "get_classifier"):
        unknown["head"] = f"{called} is an encoder without a classifier; select with match instead"
    elif not head:
        unknown["head"] = (
            f"the classifier of {called} has no parameters; create the model with num_classes greater than 0"
        )
    lost = next((placed.part for placed in parts if placed.facts is None), None)
    if lost is not None:
        reason = f"{called} holds {lost.name or 'features'} cut from {title(lost.module)}, which timm does not have, so"
    elif parts:
        return unknown
    else:
        reason = f"{called} is no timm model and holds none, so"
        unknown["body"] = f"{reason} its body is not known; select with match or type"
        unknown["pos_embed"] = f"{reason} its position embeddings are not known; select with match or type"
        if not any(hasattr(type(module), "no_weight_decay") for module in live.inner.values()):
            unknown["no_weight_decay"] = (
                f"{reason} its list of tensors without weight decay is not known; select with match or type"
            )
    unknown["stem"] = f"{reason} its stem is not known; select with match or type"
    unknown["stage"] = f"{reason} its stages are not known; select with match or type"
    unknown["layer_decay"] = f"{reason} its layers have no known order"
    return unknown


def _shape(name: str, parameters: list[nn.Parameter]) -> tuple[int, ...]:
    """The shape of one parameter; of a parametrized one, that of its largest part."""
    whole = parameters[0] if len(parameters) == 1 else max(parameters, key=lambda parameter: parameter.numel())
    try:
        return tuple(whole.shape)
    except RuntimeError:  # of a lazy module
        notes = ["run the model on one batch before the plan"]
        raise ModelError(f"{name!r} has no shape yet, as its module is lazy", notes=notes) from None


def _modules(inner: Mapping[str, nn.Module]) -> Iterator[Module]:
    first_name, aliases = _first_names(inner.items())
    for name in first_name.values():
        module = inner[name]
        cls: Any = type(module)
        random = _random(module, cls) if _may_draw(cls) else ""
        yield Module(name, _types(cls), aliases.get(name, ()), random, "attention_bias_cache" in module.__dict__)


def _owners(live: names.Live) -> dict[str, str]:
    """The persistent buffers, each with the described module that it belongs to."""
    found = {name: name.rpartition(".")[0] for name in live.buffers}
    for name, module in found.items():
        while module not in live.inner:
            module = found[name] = module.rpartition(".")[0]
    return found


def _first_names(named: Collection[tuple[str, object]]) -> tuple[dict[int, str], dict[str, tuple[str, ...]]]:
    """The ``id`` of each object -> its first name; and the first names of what has further ones -> these."""
    first = {id(item): name for name, item in named}
    if len(first) == len(named):
        return first, {}
    first.clear()
    further: dict[str, tuple[str, ...]] = {}
    for name, item in named:
        known = first.setdefault(id(item), name)
        if known is not name:
            further[known] = (*further.get(known, ()), name)
    return first, further


@functools.cache
def _types(cls: Any) -> tuple[str, ...]:
    """The name of a class and of its bases, ``nn.Module`` excepted."""
    return tuple(base.__name__ for base in cls.__mro__ if base not in (nn.Module, object))


def _random(module: nn.Module, cls: Any) -> str:
    """What a module draws at random in train mode: dropout modules, and classes that call dropout on their own."""
    called = module.__dict__ if "Drop" in cls.__name__ else _drops(cls)
    rates = {key: value for key in called if isinstance(value := module.__dict__.get(key), float) and value > 0}
    if not rates or not _draws(cls):
        return ""
    key, rate = max(rates.items(), key=lambda item: item[1])
    return f"{cls.__name__} {key}={rate:g}"


@functools.cache
def _may_draw(cls: Any) -> bool:
    return "Drop" in cls.__name__ or bool(_drops(cls))


@functools.cache
def _drops(cls: Any) -> tuple[str, ...]:
    """The attributes that a class's own code names and calls something like dropout."""
    codes = (getattr(inspect.unwrap(found), "__code__", None) for base in cls.__mro__ for found in vars(base).values())
    return tuple(dict.fromkeys(name for code in codes if code for name in code.co_names if "drop" in name))


@functools.cache
def _draws(cls: Any) -> bool:
    try:
        source = inspect.getsource(cls)
        return "self.training" in source and (_DRAWS.search(source) is not None or "Drop" in cls.__name__)
    except (OSError, TypeError):  # a class without source: say it rather than miss it
        return True


@functools.cache
def _is_called_norm(cls: Any) -> bool:
    return any(map(_NORM.search, _types(cls)))


def _norms(inner: Mapping[str, nn.Module], first_name: Mapping[int, str]) -> Iterator[str]:
    """Normalisation layers: their class, or a base, is called so, all they own is 1-d, and nothing below owns more."""
    for name, module in inner.items():
        cls: Any = type(module)
        if not _is_called_norm(cls):
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if (
            (not module._modules or len(own) == len(list(module.parameters())))
            and not [parameter for parameter in own if parameter.ndim != 1]
            and (own or isinstance(module, nn.modules.batchnorm._NormBase))
        ):
            yield from (first_name[id(parameter)] for parameter in own)
            if not own:
                yield name


def _no_decay(tensors: Iterable[Tensor], listed: frozenset[str]) -> Iterator[str]:
    """As ``timm.optim.param_groups_weight_decay``: at most one dimension, ``.bias``, or in ``no_weight_decay()``."""
    for tensor in tensors:
        if len(tensor.shape) <= 1 or tensor.name.endswith(".bias") or tensor.name in listed:
            yield tensor.name
