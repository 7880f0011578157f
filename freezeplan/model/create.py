"""timm models made by their names, and the values that a freshly created model has."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from freezeplan.errors import ModelError, did_you_mean
from freezeplan.model import names
from freezeplan.model.meta import meta_device
from freezeplan.model.timm_facts import LivePart, config, find_parts, first_conv, is_timm

T = TypeVar("T")


def create_model(name: str, /, *, num_classes: int | None = None, meta: bool = False, **arguments: Any) -> nn.Module:
    """Create a timm model by name; nothing is downloaded unless asked for.

    Args:
        name: A timm model name.
        num_classes: Number of classes; None leaves the model's own.
        meta: Create it on the meta device: names and shapes without memory or time.
        arguments: Passed on to timm.

    Raises:
        ModelError: If there is no such model (with the nearest names), or it cannot be built from these arguments.

    Examples:
        >>> create_model("vgg16", num_classes=20, meta=True).head.fc.weight.shape
        torch.Size([20, 4096])
    """
    return timm_model(name, arguments if num_classes is None else {**arguments, "num_classes": num_classes}, meta=meta)


def timm_model(name: str, arguments: Mapping[str, Any], *, meta: bool = False) -> nn.Module:
    """Create a timm model from a mapping of arguments, whatever their names are.

    Args:
        name: A timm model name.
        arguments: Passed on to timm.
        meta: Create it on the meta device.

    Raises:
        ModelError: If there is no such model (with the nearest names), or it cannot be built from these arguments.

    Examples:
        >>> type(timm_model("test_vit", {"num_classes": 3}, meta=True)).__name__
        'VisionTransformer'
    """
    import timm

    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise ModelError(
            f"timm has no model called {name!r}",
            notes=[*did_you_mean(name, known), f"timm knows {len(known)} models; or give package.module:function"],
        )
    try:
        with meta_device() if meta else torch.device("cpu"):
            model: nn.Module = timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ModelError(f"{name} cannot be built with {given or 'no arguments'}: {error}") from error
    return model


def model_names() -> list[str]:
    """Return the names of timm's models, sorted as timm sorts them.

    Examples:
        >>> "resnet50" in model_names()
        True
    """
    import timm

    return list(timm.list_models())


def version() -> str:
    """Return timm's version."""
    return importlib.metadata.version("timm")


def fresh_values(
    live: names.Live, wanted: Collection[str], seed: int
) -> tuple[dict[str, list[nn.Parameter]], dict[str, list[Tensor]]]:
    """Return the values that tensors of a model have when it is freshly created. The model and the random state stay.

    What belongs to a part that timm created has the values of the part's architecture, created anew with timm's own
    initialisation; what does not has those of ``reset_parameters`` of its module, all of whose parameters must be
    wanted.

    Args:
        live: The model as it was looked up.
        wanted: Names of the parameters.
        seed: Seed of the first part; each part after it has one more.

    Returns:
        Name -> parameters, and name -> buffers. What a fresh part has under no name of this model is not in them.

    Raises:
        ModelError: If an architecture cannot be created, or a module cannot be initialised again.
    """
    parameters: dict[str, list[nn.Parameter]] = {}
    buffers: dict[str, list[Tensor]] = {}
    outside = set(wanted)
    for index, part in enumerate(found for found in find_parts(live) if is_timm(found.module)):
        below = f"{part.name}." if part.name else ""
        if not any(name.startswith(below) for name in outside):
            continue
        fresh = names.survey(_fresh(part, seed + index))
        outside -= _take(part, below, live.parameters, fresh.parameters, parameters)
        _take(part, below, live.buffers, fresh.buffers, buffers)
    _reset(live, frozenset(outside), seed, parameters, buffers)
    return parameters, buffers


def _take(part: LivePart, below: str, here: Iterable[str], fresh: Mapping[str, T], found: dict[str, T]) -> set[str]:
    """Add what a fresh part has under the names of this model; return all names that are in the part."""
    inside = {name for name in here if name.startswith(below)}
    for name in inside:
        there = part.in_source(name.removeprefix(below), fresh)
        if there is not None:
            found[name] = fresh[there]
    return inside


def _fresh(part: LivePart, seed: int) -> nn.Module:
    """Create a part's architecture anew, with timm's own random initialisation."""
    model, known = part.module, config(part.module)
    arguments: dict[str, Any] = {}
    if hasattr(model, "num_classes"):
        arguments["num_classes"] = model.num_classes
    channels = getattr(model, "in_chans", None) or _input_channels(part)
    if channels and channels != known.get("input_size", (3,))[0]:
        arguments["in_chans"] = channels
    size = _image_size(model, known)
    if size:
        arguments["img_size"] = size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(str(known["architecture"]), **arguments)


def _image_size(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size in pixels that the model was made for, if that is not the architecture's own."""
    import timm

    own = timm.get_pretrained_cfg(f"{config['architecture']}.{config.get('tag') or ''}".rstrip("."))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 0, 0))[1:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return None if own is None or size == tuple(own.input_size[1:]) else size


def _input_channels(part: LivePart) -> int | None:
    modules = names.survey(part.module).inner
    there = next((name for name in modules if part.in_source(name, {first_conv(part.module)}) is not None), "")
    return getattr(modules.get(there), "in_channels", None)


def _reset(
    live: names.Live,
    wanted: frozenset[str],
    seed: int,
    parameters: dict[str, list[nn.Parameter]],
    buffers: dict[str, list[Tensor]],
) -> None:
    """Add the values of modules that are in no part of timm's, as their ``reset_parameters`` gives them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, found in live.modules.items():
            below = f"{name}." if name else ""
            own = {below + key for key, _ in found[-1].named_parameters(recurse=False)}
            if own.isdisjoint(wanted):
                continue
            if not own <= wanted or not hasattr(found[-1], "reset_parameters"):
                raise ModelError(
                    f"cannot reinit {min(own & wanted)!r}: "
                    + (
                        f"{type(found[-1]).__name__} has no reset_parameters"
                        if own <= wanted
                        else f"reset_parameters would also change {min(own - wanted)!r}"
                    ),
                    notes=["for models that are not timm's, reinit works on whole modules that have reset_parameters"],
                )
            fresh = copy.deepcopy(found[-1])
            fresh.reset_parameters()  # type: ignore[operator]
            parameters |= {below + key: [value] for key, value in fresh.named_parameters(recurse=False)}
            buffers |= {below + key: [value] for key, value in fresh.named_buffers(recurse=False)}
