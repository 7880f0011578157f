"""What timm knows: which modules of a model are timm's, and the classifier, stages and layers of each such part.

timm's own data are read through its public methods (``get_classifier``, ``no_weight_decay``, ``group_matcher``,
``pretrained_cfg``), never through module names, and what it does not know is said and not guessed. Whether a module has
such a method is asked of its class: wrappers forward attributes that they do not have.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from freezeplan.errors import ModelError
from freezeplan.model import depth as stages
from freezeplan.model import names
from freezeplan.model.meta import meta_device


@dataclass(frozen=True)
class LivePart:
    """One outermost timm model in a model; a whole timm model is the part with the empty name."""

    name: str
    """Canonical name of the module."""
    module: nn.Module

    @property
    def is_cut(self) -> bool:
        """Whether it was cut from its architecture (``features_only``): timm takes the classes out of its settings."""
        known = config(self.module)  # of which timm's MobileNetV3Features keeps them, and an alias has them not
        return bool(known) and "num_classes" not in self.module.__dict__.get("default_cfg", known)

    def in_source(self, name: str, known: Container[str]) -> str | None:
        """Return what a name inside of the part is called in its architecture, or None.

        Args:
            name: Name of a tensor or module, without the part's own name ahead.
            known: The names of the architecture.

        Examples:
            >>> part = LivePart("", nn.Identity())
            >>> part.module.pretrained_cfg = {"architecture": "resnet18"}
            >>> part.in_source("stages_0.conv.weight", {"stages.0.conv.weight"})
            'stages.0.conv.weight'
        """
        if name in known:
            return name
        if not self.is_cut:
            return None
        first, dot, rest = name.partition(".")
        for at in (index for index, sign in enumerate(first) if sign == "_"):
            dotted = f"{first[:at]}.{first[at + 1 :]}{dot}{rest}"
            if dotted in known:
                return dotted
        return self.in_source(rest, known) if rest else None


@dataclass(frozen=True)
class Facts:
    """What timm knows of one architecture. All names are the architecture's own."""

    tensors: Mapping[str, str]
    """Every name of a tensor -> its first one."""
    head: frozenset[str]
    """The classifier's tensors."""
    beside_head: frozenset[str]
    """Tensors in the module that holds the classifier, or in ``pre_logits``."""
    listed: frozenset[str]
    """The tensors that ``no_weight_decay()`` lists."""
    stages: Mapping[str, int]
    layers: Mapping[str, int]
    """Tensor -> its layer by timm's matcher, the first one 0; without a matcher by stage."""
    classifier_layer: int
    """The layer of the classifier, also where the model has none (``num_classes=0``)."""
    unplaced: frozenset[str]
    """Tensors that timm's matcher leaves out, the classifier's excepted."""
    classifier_elements: int
    """Number of elements of the classifier that the architecture has by default; 0 if that is not known."""


def find_parts(live: names.Live) -> tuple[LivePart, ...]:
    """Return the outermost modules that are timm's, in the model's order.

    A module is timm's if it has a ``pretrained_cfg`` of its own, or its class defines ``group_matcher``. One whose
    class defines none gives way to what it holds, unless it was cut from an architecture.

    Args:
        live: The model as it was looked up.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.Sequential(), "head": nn.Linear(2, 2)})
        >>> model["encoder"].pretrained_cfg = {"architecture": "resnet18", "num_classes": 1000}
        >>> [part.name for part in find_parts(names.survey(model))]
        ['encoder']
    """
    found: list[LivePart] = []
    seen: set[int] = set()
    for name, module in live.inner.items():
        if found and _inside(name, found[-1].name):
            continue
        if id(module) in seen or not _is_timms(module):
            continue
        part = LivePart(name, module)
        if hasattr(type(module), "group_matcher") or part.is_cut or not _holds_timm(module):
            found.append(part)
            seen.add(id(module))
            if not name:
                break
    return tuple(found)


def _is_timms(module: nn.Module) -> bool:
    return is_timm(module) or hasattr(type(module), "group_matcher")


def _holds_timm(module: nn.Module) -> bool:
    return any(_is_timms(inner) for inner in module.modules() if inner is not module)


def _inside(name: str, above: str) -> bool:
    return not above or name.startswith(f"{above}.")


def is_timm(model: nn.Module) -> bool:
    """Whether the model is one of timm's, by the configuration that timm gives each of its models."""
    return isinstance(model.__dict__.get("pretrained_cfg"), Mapping)


def config(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's configuration of a model; empty for others."""
    return model.__dict__["pretrained_cfg"] if is_timm(model) else {}


def title(model: nn.Module) -> str:
    """Return what the model is called in reports: timm's architecture, or the class."""
    return str(config(model).get("architecture") or type(model).__name__)


def _entries(model: nn.Module, key: str) -> tuple[str, ...]:
    """The module names under a key of timm's configuration, which holds one name, a list of them, or nothing."""
    entry = config(model).get(key) or ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def first_conv(model: nn.Module) -> str:
    """Return the name of the first convolution; empty where timm names none."""
    return next(iter(_entries(model, "first_conv")), "")


def read_part(part: LivePart, live: names.Live, *, depth: bool) -> Facts | None:
    """Return what timm knows of a part; what was cut is read through its architecture, on the meta device.

    Args:
        part: The part.
        live: Its module as it was looked up.
        depth: Whether stages and layers are asked for.

    Returns:
        The facts; None where timm cannot create the architecture that a part was cut from.

    Raises:
        ModelError: If a ``group_matcher`` that is not timm's raises.
    """
    return _architecture(title(part.module)) if part.is_cut else read(live, depth=depth)


@functools.lru_cache(maxsize=64)
def _architecture(name: str) -> Facts | None:
    import timm

    if not timm.is_model(name):
        return None
    with meta_device():
        return read(names.survey(timm.create_model(name)), depth=True)


def read(live: names.Live, *, depth: bool = True) -> Facts:
    """Return what timm knows of one of its models.

    Args:
        live: The model as it was looked up.
        depth: Whether stages and layers are asked for; without, there are none.

    Raises:
        ModelError: If a ``group_matcher`` that is not timm's raises.
    """
    model = live.root
    first_name = live.first_name
    tensors = {name: first_name[id(held[0])] for name, held in live.parameters.items()}
    ordered = tuple(first_name.values())
    head = find_classifier(live)
    virtual = () if head else tuple(f"{name}.weight" for name in _entries(model, "classifier"))
    found, layers, last, unplaced = _depth(live, ordered, head, virtual) if depth else ({}, {}, 0, frozenset())
    features, classes = getattr(model, "num_features", 0), config(model).get("num_classes", 0)
    return Facts(
        tensors=tensors,
        head=head,
        beside_head=stages.beside_head(ordered, head.union(virtual)) - head,
        listed=no_weight_decay(model, tensors),
        stages=found,
        layers=layers,
        classifier_layer=last,
        unplaced=unplaced,
        classifier_elements=(features + 1) * classes if isinstance(features, int) else 0,
    )


def no_weight_decay(module: nn.Module, tensors: Mapping[str, str]) -> frozenset[str]:
    """Return the tensors that a module's own ``no_weight_decay()`` lists, by name or by pattern.

    Args:
        module: The module.
        tensors: Name of a tensor as the module has it -> what is returned for it.
    """
    patterns = set(module.no_weight_decay()) if hasattr(type(module), "no_weight_decay") else set()  # type: ignore[operator]
    globs = [pattern for pattern in patterns if any(sign in pattern for sign in "*?[")]
    found = patterns.intersection(tensors).union(*(fnmatch.filter(tensors, glob) for glob in globs))
    return frozenset(tensors[name] for name in found)


def find_classifier(live: names.Live) -> frozenset[str]:
    """Return the tensors of what a model's ``get_classifier()`` gives, and of what its settings call classifier.

    volo's ``aux_head`` is in no ``get_classifier``. Where that raises, because a head was replaced, the module that
    stands in its place counts.

    Args:
        live: The model as it was looked up.

    Raises:
        ModelError: If ``get_classifier`` raises and the model has no settings of timm's.
    """
    model, heads = live.root, list[nn.Module]()
    configured = _entries(model, "classifier")
    if hasattr(type(model), "get_classifier"):
        try:
            heads += _flatten(model.get_classifier())  # type: ignore[operator]
        except Exception as error:
            if not is_timm(model):
                raise ModelError(f"{type(model).__name__}.get_classifier() raised {error!r}") from error
            configured = tuple(_existing(name, live.inner) for name in configured)
    heads += (live.inner[name] for name in configured if name in live.inner)
    found = (live.first_name.get(id(parameter)) for head in heads for parameter in head.parameters())
    return frozenset(name for name in found if name is not None)


def _existing(name: str, modules: Container[str]) -> str:
    """The name, without as many components at its end as lead to no module."""
    while name and name not in modules:
        name = names.owner(name)
    return name or "?"


def superseded(live: names.Live) -> frozenset[str]:
    """Return the tensors of which PEFT keeps a copy that is trained in their place (``modules_to_save``)."""
    kept = tuple(
        f"{name}.original_module.".lstrip(".")
        for name, module in live.inner.items()
        if "original_module" in module._modules and "modules_to_save" in module._modules
    )
    return frozenset(name for name in live.parameters if name.startswith(kept)) if kept else frozenset()


def _flatten(classifier: Any) -> Iterator[nn.Module]:
    if isinstance(classifier, nn.Module):
        yield classifier
    elif isinstance(classifier, (tuple, list)):
        for part in classifier:
            yield from _flatten(part)


class _Named:
    """As much of a module as ``timm.models.group_parameters`` reads, with one name more that no matcher knows."""

    unknown = "?"

    def __init__(self, tensors: Iterable[str]):
        self._names = (*tensors, self.unknown)

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self._names)


def _groups(model: nn.Module, tensors: Iterable[str], *, coarse: bool) -> dict[str, int] | None:
    """Return timm's groups, and under ``?`` the one of what its matcher leaves out; None without a matcher."""
    from timm.models import group_parameters

    method = getattr(type(model), "group_matcher", None)
    if method is None:
        return None
    try:
        return dict(group_parameters(_Named(tensors), model.group_matcher(coarse=coarse), reverse=True))  # type: ignore[operator]
    except Exception as error:
        if isinstance(error, AssertionError) and str(method.__module__).startswith("timm."):
            return None  # none of this kind (rdnet)
        raise ModelError(
            f"{type(model).__name__}.group_matcher(coarse={coarse}) raised {error!r}",
            notes=["as in timm, it takes coarse=True or False and returns patterns, such as {'stem': '^stem', ...}"],
        ) from error


def _depth(
    live: names.Live, ordered: tuple[str, ...], head: frozenset[str], virtual: tuple[str, ...]
) -> tuple[dict[str, int], dict[str, int], int, frozenset[str]]:
    """Stages and layers by timm's groups; by its feature taps where the groups are single layers or missing.

    Args:
        live: The model.
        ordered: Its tensors.
        head: The classifier's.
        virtual: Names of the classifier's tensors where the model has none.

    Returns:
        Tensor -> stage, tensor -> layer, the classifier's layer, and what timm's matcher leaves out.
    """
    model, heads = live.root, head.union(virtual)
    coarse, fine = _groups(model, ordered, coarse=True), _groups(model, (*ordered, *virtual), coarse=False)
    left_out = frozenset(name for name in ordered if fine and fine[name] == fine[_Named.unknown])
    tapped = (str(tap["module"]) for tap in getattr(model, "feature_info", ()) or ())
    taps = [tap for tap in tapped if tap in live.inner]  # mobilenetv5_300m_enc taps a bn1 that it does not have
    if coarse and not (taps and _single_layers(coarse)):
        unmatched = frozenset(name for name in ordered if coarse[name] == coarse[_Named.unknown])
        found = stages.by_groups({name: coarse[name] for name in ordered}, unmatched, heads)
    else:
        place: dict[int, int] = {}
        order = {name: place.setdefault(id(module), len(place)) for name, module in live.inner.items()}
        found = stages.by_features(ordered, order, taps, first_conv(model), heads)
    if fine:
        layers = {name: fine[name] for name in ordered}
        last = fine[next(iter(head.intersection(fine) or virtual), _Named.unknown)]
    else:
        last = max(found.values(), default=0) + 1
        layers = {name: found.get(name, last) for name in ordered}
    return found, layers, last, left_out - head


def _single_layers(groups: Mapping[str, int]) -> bool:
    """Whether no group, the stem and the last apart, has more than one module that owns tensors (VGG)."""
    last, owner = max(groups.values()), dict[int, str]()
    between = ((group, names.owner(name)) for name, group in groups.items() if 0 < group < last)
    return all(owner.setdefault(group, above) == above for group, above in between)


def timm_version(model: nn.Module) -> str:
    """Return the version of timm that is installed; empty for a model that is not timm's.

    Examples:
        >>> timm_version(nn.Linear(2, 2))
        ''
    """
    import timm

    return str(timm.__version__) if is_timm(model) else ""


def reentrant(model: nn.Module) -> str:
    """Return what of a model checkpoints its activations with ``use_reentrant=True``; empty if nothing does.

    timm's models do where ``grad_checkpointing`` is on and ``set_reentrant_ckpt(True)`` was called; those of
    transformers where that is asked for, unless they give their embeddings' output a gradient, as those of text do.

    Examples:
        >>> import timm
        >>> reentrant(timm.create_model("test_vit"))
        ''
    """
    import timm

    needs_gradient = any(getattr(module, "_require_grads_hooks", None) for module in model.modules())
    for name, module in model.named_modules():
        implementation = getattr(module, "checkpoint_impl", None)
        if getattr(implementation, "name", "") == "REENTRANT":
            return repr(names.canonical_module(name))
        if getattr(module, "grad_checkpointing", False) is True and timm.layers.use_reentrant_ckpt():
            return repr(name) if name else title(model)
        function = getattr(module, "_gradient_checkpointing_func", None)
        asked = isinstance(function, functools.partial) and function.keywords.get("use_reentrant")
        if asked and getattr(module, "gradient_checkpointing", False) and not needs_gradient:
            return repr(names.canonical_module(name)) if name else title(model)
    return ""


def reentrant_advice(model: nn.Module) -> str:
    """Return how to say ``use_reentrant=False`` to what ``reentrant`` found: timm's way, transformers' or torch's.

    Examples:
        >>> reentrant_advice(nn.Linear(2, 2))
        "use_reentrant=False, timm's default: timm.layers.set_reentrant_ckpt(False)"
    """
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        return (
            "use_reentrant=False: "
            'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return "use_reentrant=False, timm's default: timm.layers.set_reentrant_ckpt(False)"
