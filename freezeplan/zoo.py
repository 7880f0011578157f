"""What timm knows of a model: in the core the only importer of timm.

timm's own data are read through its public methods (``get_classifier``, ``no_weight_decay``, ``pretrained_cfg``), never
through module names, and what it does not know is said and not guessed.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from freezeplan import names, stages
from freezeplan.description import Description, Module, Tensor
from freezeplan.errors import ModelError, did_you_mean
from freezeplan.plan import ROLES

_BIAS = re.compile(r"(?:\w+_)?bias(?:_[ih]h_l\d+(?:_reverse)?)?")
_IMPORTABLE = re.compile(r"[\w.]+:\w+")
_DRAWS = re.compile(r"\bdrop\w*\(|dropout_p\b|self\.dropout,")
_POSITION = re.compile(
    r"(?<![^.])(?:"  # a whole part of the name
    r"\w*pos(?:ition(?:al)?)?_emb\w*|patch_pos|pixel_pos"  # absolute
    r"|\w*rel(?:ative)?_pos\w*|attention_biases|rope"  # relative
    r"|pos_block|pos_proj|cr?pe\d?|cpb_mlp|meta_mlp"  # what makes them: convolutions, small networks of offsets
    r")(?![^.])"
)
_NORM = re.compile(r"Norm|InplaceAbn")


def create_model(name: str, *, num_classes: int | None = None, meta: bool = False, **arguments: Any) -> nn.Module:
    """Create a timm model by name, or call ``package.module:function``; nothing is downloaded unless asked for.

    Args:
        name: A timm model name, or ``package.module:function`` of a function that returns an ``nn.Module``.
        num_classes: Number of classes; None leaves the model's own.
        meta: Create it on the meta device: names and shapes without memory or time.
        arguments: Passed on to timm or to the function.

    Raises:
        ModelError: If there is no such model (with the nearest names), or it cannot be built from these arguments.

    Examples:
        >>> create_model("vgg16", num_classes=20, meta=True).head.fc.weight.shape
        torch.Size([20, 4096])
    """
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    build = _imported(name) if _IMPORTABLE.fullmatch(name) else functools.partial(_timm_model, name)
    try:
        with torch.device("meta" if meta else "cpu"):
            model = build(**arguments)
    except ModelError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ModelError(f"{name} cannot be built with {given or 'no arguments'}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _timm_model(name: str, **arguments: Any) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ModelError(
            f"timm has no model called {name!r}",
            notes=[*did_you_mean(name, known), f"timm knows {len(known)} models; or give package.module:function"],
        )
    model: nn.Module = timm.create_model(name, **arguments)
    return model


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot import {name!r}: {error}", notes=["expected package.module:function"]) from None


def model_names() -> list[str]:
    """Return the names of timm's models, sorted as timm sorts them.

    Examples:
        >>> "resnet50" in model_names()
        True
    """
    import timm

    return list(timm.list_models())


def is_timm(model: nn.Module) -> bool:
    """Whether the model is one of timm's, by the configuration that timm gives each of its models."""
    return isinstance(getattr(model, "pretrained_cfg", None), Mapping)


def describe(model: nn.Module, *, live: names.Live | None = None, asked: Collection[str] | None = None) -> Description:
    """Write down all that a plan can ask of a model. Changes nothing; works on the meta device.

    Args:
        model: Any module; roles that timm knows need a timm model.
        live: Its parts, if they were looked up already.
        asked: The roles to find, ``stage`` and ``layer_decay`` for depth; None: all. It saves the time of the others.

    Returns:
        Names, shapes, classes, roles. Tied weights are one tensor with several names.

    Examples:
        >>> model = describe(create_model("resnet18", meta=True))
        >>> sorted(model.roles["head"])
        ['fc.bias', 'fc.weight']
        >>> len(model.roles["norm"])
        40
    """
    model = names.unwrap(model)
    live = live or names.survey(model)
    first_name, aliases = _first_names((name, found[0]) for name, found in live.parameters.items())
    tensors = tuple(
        Tensor(name, _shape(live.parameters[name]), names.owner(name), aliases.get(name, ()))
        for name in first_name.values()
    )
    modules = tuple(_modules(live.inner))
    head = _head(model, first_name, live.inner)
    listed = frozenset(_listed(model, tensors))
    ordered = tuple(tensor.name for tensor in tensors)
    classifier = frozenset() if isinstance(head, str) else head
    asked = frozenset((*ROLES, "stage", "layer_decay")) if asked is None else frozenset(asked)
    depth = _depth(model, ordered, modules, classifier) if asked & {"stem", "stage", "layer_decay"} else _Depth()
    find: dict[str, Callable[[], Iterable[str]]] = {
        "head": lambda: classifier,
        "body": lambda: classifier.symmetric_difference(ordered),
        "norm": lambda: _norms(live.inner, first_name),
        "bias": lambda: (name for name in ordered if _BIAS.fullmatch(name.rpartition(".")[2])),
        "no_weight_decay": lambda: listed,
        "pos_embed": lambda: filter(_POSITION.search, ordered),
        "stem": lambda: (name for name, stage in depth.stages.items() if stage == 0),
    }
    unknown: dict[str, str] = {"head": head} if isinstance(head, str) else {}
    if not is_timm(model):
        reason = f"{title(model)} is not a timm model, so its {{}} not known; select with match or type"
        named = {"stem": "stem is", "body": "body is", "pos_embed": "position embeddings are", "stage": "stages are"}
        unknown |= {key: reason.format(words) for key, words in named.items()}
        if not hasattr(model, "no_weight_decay"):
            unknown["no_weight_decay"] = reason.format("list of tensors without weight decay is")
        unknown["layer_decay"] = f"{title(model)} is not a timm model, so its layers have no known order"
    return Description(
        model=title(model),
        tensors=tensors,
        modules=modules,
        roles={role: frozenset(find[role]()) for role in ROLES if role in asked and (classifier or role != "head")},
        unknown=unknown,
        stages=depth.stages,
        exponents=depth.exponents,
        unplaced=depth.unplaced,
        no_decay=frozenset(_no_decay(tensors, listed)),
    )


def version() -> str:
    """Return timm's version."""
    return importlib.metadata.version("timm")


def title(model: nn.Module) -> str:
    """Return what the model is called in reports: timm's architecture, or the class."""
    return str(_config(model).get("architecture") or type(model).__name__)


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
        >>> reentrant(create_model("test_vit"))
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
        >>> reentrant_advice(create_model("test_vit"))
        "use_reentrant=False, timm's default: timm.layers.set_reentrant_ckpt(False)"
    """
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        return (
            "use_reentrant=False: "
            'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
    return "use_reentrant=False, timm's default: timm.layers.set_reentrant_ckpt(False)"


def _config(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's configuration of a model; empty for others."""
    return cast(Mapping[str, Any], model.pretrained_cfg) if is_timm(model) else {}


def _entries(model: nn.Module, key: str) -> tuple[str, ...]:
    """The module names under a key of timm's configuration, which holds one name, a list of them, or nothing."""
    entry = _config(model).get(key) or ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _first_conv(model: nn.Module) -> str:
    """Name of the first convolution; empty where timm names none."""
    return next(iter(_entries(model, "first_conv")), "")


def _shape(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    """The shape of one parameter; of a parametrized one, that of its largest part."""
    whole = parameters[0] if len(parameters) == 1 else max(parameters, key=lambda parameter: parameter.numel())
    return tuple(whole.shape)


def _modules(inner: Mapping[str, nn.Module]) -> Iterator[Module]:
    first_name, aliases = _first_names(inner.items())
    for name in first_name.values():
        module = inner[name]
        cls: Any = type(module)
        caches = "attention_bias_cache" in module.__dict__
        yield Module(name, _types(cls), aliases.get(name, ()), _random(module, cls), caches)


def _first_names(named: Iterable[tuple[str, object]]) -> tuple[dict[int, str], dict[str, tuple[str, ...]]]:
    """The ``id`` of each object -> its first name; and the first names of what has further ones -> these."""
    first: dict[int, str] = {}
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
    if not called:
        return ""
    rates = {key: value for key in called if isinstance(value := module.__dict__.get(key), float) and value > 0}
    if not rates or not _draws(cls):
        return ""
    key, rate = max(rates.items(), key=lambda item: item[1])
    return f"{cls.__name__} {key}={rate:g}"


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


def _head(model: nn.Module, first_name: Mapping[int, str], live: Mapping[str, nn.Module]) -> frozenset[str] | str:
    """The classifier's tensors, by identity; or why there is none."""
    if not hasattr(model, "get_classifier"):
        if is_timm(model):
            return f"{title(model)} is an encoder without a classifier; select with match instead"
        return f"{title(model)} is not a timm model, so its classifier is not known; select it with match"
    heads = [*_flatten(model.get_classifier()), *_configured(model, live)]  # type: ignore[operator]
    found = frozenset(first_name[id(p)] for head in heads for p in head.parameters() if id(p) in first_name)
    if not found:
        return f"the classifier of {title(model)} has no parameters; create the model with num_classes greater than 0"
    return found


def _flatten(classifier: Any) -> Iterator[nn.Module]:
    if isinstance(classifier, nn.Module):
        yield classifier
    elif isinstance(classifier, (tuple, list)):
        for part in classifier:
            yield from _flatten(part)


def _configured(model: nn.Module, live: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules that timm's configuration calls classifier: volo's ``aux_head`` is in no ``get_classifier``."""
    yield from (live[name] for name in _entries(model, "classifier") if name in live)


def _norms(inner: Mapping[str, nn.Module], first_name: Mapping[int, str]) -> Iterator[str]:
    """Normalisation layers: their class, or a base, is called so, all they own is 1-d, and nothing below owns more."""
    for name, module in inner.items():
        cls: Any = type(module)
        if not any(map(_NORM.search, _types(cls))):
            continue
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if (
            (not module._modules or len(own) == len(list(module.parameters())))
            and all(parameter.ndim == 1 for parameter in own)
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


def _listed(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[str]:
    """The tensors that ``no_weight_decay()`` lists, by name or by pattern."""
    patterns: Iterable[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    patterns = set(patterns)
    if not patterns:
        return
    globs = [pattern for pattern in patterns if any(sign in pattern for sign in "*?[")]
    for tensor in tensors:
        if not patterns.isdisjoint(tensor.names) or any(fnmatch.filter(tensor.names, glob) for glob in globs):
            yield tensor.name


@dataclass(frozen=True)
class _Depth:
    stages: Mapping[str, int] = field(default_factory=dict)
    exponents: Mapping[str, int] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()


class _Named:
    """As much of a module as ``timm.models.group_parameters`` reads, with one name more that no matcher knows."""

    unknown = "?"

    def __init__(self, tensors: Iterable[str]):
        self._names = (*tensors, self.unknown)

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self._names)


def _groups(model: nn.Module, ordered: tuple[str, ...], *, coarse: bool) -> dict[str, int] | None:
    """Return timm's groups, and under ``?`` the one of what its matcher leaves out; None without a matcher."""
    from timm.models import group_parameters

    try:
        matcher = model.group_matcher(coarse=coarse)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # no matcher, or none of this kind (rdnet)
        return None
    return dict(group_parameters(_Named(ordered), matcher, reverse=True))


def _depth(model: nn.Module, ordered: tuple[str, ...], described: tuple[Module, ...], head: frozenset[str]) -> _Depth:
    """Stages and layers by timm's groups; by its feature taps where the groups are single layers or missing."""
    if not is_timm(model):
        return _Depth()
    coarse, fine = _groups(model, ordered, coarse=True), _groups(model, ordered, coarse=False)
    left_out = frozenset(name for name in ordered if fine and fine[name] == fine[_Named.unknown])
    if coarse and not _single_layers(coarse):
        unmatched = frozenset(name for name in ordered if coarse[name] == coarse[_Named.unknown])
        found = stages.by_groups({name: coarse[name] for name in ordered}, unmatched, head)
    else:
        order = {name: index for index, module in enumerate(described) for name in module.names}
        tapped = (str(tap["module"]) for tap in getattr(model, "feature_info", ()) or ())
        taps = [tap for tap in tapped if tap in order]  # mobilenetv5_300m_enc taps a bn1 that it does not have
        found = stages.by_features(ordered, order, taps, _first_conv(model), head)
    if fine:
        layers = {name: fine[name] for name in ordered}
    else:
        last = max(found.values(), default=0) + 1
        layers = {name: found.get(name, last) for name in ordered}
    return _Depth(found, stages.exponents(layers), tuple(name for name in ordered if name in left_out - head))


def _single_layers(groups: Mapping[str, int]) -> bool:
    """Whether no group, the stem and the last apart, has more than one module that owns tensors (VGG)."""
    owners: dict[int, set[str]] = {}
    for name, group in groups.items():
        owners.setdefault(group, set()).add(names.owner(name))
    return all(len(found) == 1 for group, found in owners.items() if 0 < group < max(owners))


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Create the same architecture anew, with timm's own random initialisation. The caller's random state stays.

    timm's constructors initialise better than ``reset_parameters``, which shrinks VGG16's pool5 33 times.

    Args:
        model: A timm model; its number of classes, input channels and image size are taken over.
        seed: Seed of torch's generators while it is created.

    Raises:
        ModelError: If the model is not timm's.

    Examples:
        >>> model = create_model("test_vit", num_classes=3)
        >>> bool((fresh(model, 0).head.weight == fresh(model, 0).head.weight).all())
        True
    """
    model = names.unwrap(model)
    if not is_timm(model):
        raise ModelError(f"{title(model)} is not a timm model, so it cannot be created anew")
    config = _config(model)
    arguments: dict[str, Any] = {}
    if hasattr(model, "num_classes"):
        arguments["num_classes"] = model.num_classes
    channels = getattr(model, "in_chans", None) or _input_channels(model)
    if channels and channels != config.get("input_size", (3,))[0]:
        arguments["in_chans"] = channels
    size = _image_size(model, config)
    if size:
        arguments["img_size"] = size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(str(config["architecture"]), **arguments)


def _image_size(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size in pixels that the model was made for, if that is not the architecture's own."""
    import timm

    own = timm.get_pretrained_cfg(f"{config['architecture']}.{config.get('tag') or ''}".rstrip("."))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 0, 0))[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return None if own is None or size == tuple(own.input_size[1:]) else size


def _input_channels(model: nn.Module) -> int | None:
    return getattr(dict(model.named_modules()).get(_first_conv(model)), "in_channels", None)
