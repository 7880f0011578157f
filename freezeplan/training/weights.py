"""The model that trainings of a seed start from: a head that the seed alone decides, everything else from weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from freezeplan.errors import ModelError, WeightsError
from freezeplan.model.describer import describe, is_timm, title
from freezeplan.model.image_config import image_config
from freezeplan.model.source import is_function, load_model
from freezeplan.proof.weights_file import read_state


@dataclass(frozen=True)
class Base:
    """What is built for a model's name, and what of it comes from weights."""

    architecture: str
    """timm's name of it, or ``package.module:function``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to timm or to the function."""
    below: str = ""
    """Module whose tensors alone come from weights; empty: all but the classifier."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the weights change of the model's ``pretrained_cfg``, such as its normalisation."""


def default_image_size(name: str) -> int:
    """Return the width in pixels of the images that a model was trained on, as timm knows it. Downloads nothing.

    Raises:
        ModelError: If there is no such model, or it is not timm's and holds none.

    Examples:
        >>> default_image_size("vgg16"), default_image_size("tf_efficientnet_lite1")
        (224, 240)
    """
    return _native_size(blank(name))


def blank(name: str, classes: int | None = None) -> nn.Module:
    """Return a model without values, on the meta device, for checking plans.

    Args:
        name: A timm model name, or ``package.module:function``.
        classes: Number of classes; None: the model's own.

    Raises:
        ModelError: If there is no such model, or it cannot be built with this number of classes.
    """
    return load_model(name, num_classes=classes, meta=True)


def build(
    name: str,
    *,
    classes: int,
    image_size: int,
    weights: str | Path | None,
    seed: int,
    base: Base | None = None,
    read: Callable[[Path], Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Build a model whose head depends on the seed only and whose other tensors come from ``weights``.

    The classifier is timm's ``reset_classifier``, and every other floating-point tensor must be in the weights, unless
    ``base`` says otherwise. A model made for one size, such as a ViT, takes its weights at that size and is then
    resampled to ``image_size``.
    A model of one's own is what its function returns: all that is in no timm model is its head, with the values that
    the function gives it under the seed.

    The caller's random state is not touched.

    Args:
        name: A timm model name, or ``package.module:function``: called with ``num_classes``, it returns a model that
            is timm's or holds one, and that gives logits.
        classes: Number of classes.
        image_size: Side of the square images in pixels.
        weights: A safetensors file, or a checkpoint (an average of weights in it goes first); ``random`` for none at
            all; None for timm's pretrained weights, or for what the function returns.
        seed: Seed of the initialisation.
        base: What is built; None: the model of this name.
        read: Reads a file of weights; None: ``read_weights``.

    Returns:
        The model on the CPU in train mode.

    Raises:
        ModelError: If there is no such model, it has no classifier, it does not take images of this size, or it gives
            no logits.
        WeightsError: If the weights are missing, damaged or another architecture's (the first tensor that differs is
            named), timm's cannot be downloaded, or ``random`` was asked of a function.

    Examples:
        >>> one = build("test_resnet", classes=3, image_size=32, weights="random", seed=0)
        >>> two = build("test_resnet", classes=3, image_size=32, weights="random", seed=0)
        >>> torch.equal(one.fc.weight, two.fc.weight)
        True
    """
    base = base or Base(name)
    own = is_function(base.architecture)
    blueprint = blank(base.architecture, classes)
    native, head = _native_size(blueprint), _head(blueprint)
    fixed = is_timm(blueprint) and bool(image_config(blueprint)["fixed_input_size"]) and native != image_size
    resample = fixed and hasattr(blueprint, "set_input_size")
    size: dict[str, Any] = {"img_size": image_size} if fixed and not resample else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(base.architecture, {**size, **base.arguments}, num_classes=classes)
        # What timm gives whoever fine-tunes. The constructor's values can be of another kind: EfficientNet's start a
        # classifier of five classes at a loss of 13, from which five epochs do not recover.
        if hasattr(type(model), "reset_classifier"):
            model.reset_classifier(classes)  # type: ignore[operator]
    if own and str(weights) == "random":
        raise WeightsError(
            f"--weights random: the values of {name} are those that its function gives it",
            notes=["leave --weights out, or give a file"],
        )
    if str(weights) != "random" and not (own and weights is None):
        from_file = _below(base.below) if base.below else _outside(head)
        state = pretrained_state(name) if weights is None else (read or read_weights)(Path(weights))
        load_into(model, state, from_file, origin=str(weights or weights_title(name, weights)))
        if base.config:
            model.pretrained_cfg = {**image_config(model), **base.config}  # type: ignore[assignment]
    if resample:
        try:
            model.set_input_size(img_size=image_size)  # type: ignore[operator]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ModelError(f"{name} cannot take images of {image_size} x {image_size} pixels: {error}") from None
    if own:
        _check_logits(model, name, classes, image_size)
    return model


def check_size(model: nn.Module, name: str, image_size: int) -> None:
    """Refuse a size of images that a model does not take. No value is computed, and the model is left as it was.

    Of what cannot be run without numbers at its own size either nothing is said.

    Args:
        model: What ``build`` returned.
        name: As ``build`` took it; a function's model was tried there.
        image_size: Side of the square images in pixels.

    Raises:
        ModelError: With what the model says, and its own size.

    Examples:
        >>> check_size(build("test_vit", classes=3, image_size=33, weights="random", seed=0), "test_vit", 33)
        Traceback (most recent call last):
        ...
        freezeplan.errors.ModelError: test_vit cannot take images of 33 x 33 pixels: Input height (33) should be \
divisible by patch size (16).
          it was made for 160
    """
    if is_function(name):
        return
    native, shapes = _native_size(model), _without_values(model)
    if not (message := _refused(shapes, image_size)) or _refused(shapes, native):
        return
    raise ModelError(
        f"{name} cannot take images of {image_size} x {image_size} pixels: {message}",
        notes=[f"it was made for {native}"],
    )


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, in eval."""
    copied: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    copied |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, copied).eval()


def _refused(model: nn.Module, image_size: int) -> str:
    """What a model on the meta device says of images of a size; empty if it takes them."""
    try:
        with torch.no_grad():
            model(torch.empty(2, 3, image_size, image_size, device="meta"))
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def weights_title(name: str, weights: str | Path | None) -> str:
    """Return what the weights are called in results: the file's name, ``random``, timm's, or the function's.

    Examples:
        >>> weights_title("vgg16", None), weights_title("vgg16", "runs/vgg.safetensors")
        ("timm's pretrained vgg16", 'vgg.safetensors')
        >>> weights_title("models:two_towers", None)
        'those that models:two_towers returns'
    """
    if weights is not None:
        return Path(weights).name
    return f"those that {name} returns" if is_function(name) else f"timm's pretrained {name}"


def pretrained_state(name: str) -> Mapping[str, Tensor]:
    """Download timm's pretrained weights of a model, or take them from its cache.

    Raises:
        WeightsError: If the hub cannot be reached or has none; it names both ways out.
    """
    try:
        state: Mapping[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises errors of several libraries, without a common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notes = [
            "--weights FILE takes a safetensors file or a checkpoint from this machine",
            "--weights random goes without: for timing, not for the experiment's figures",
        ]
        raise WeightsError(f"timm's pretrained weights of {name} cannot be had: {reason}", notes=notes) from error
    return state


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read what a model starts from: a safetensors file or a checkpoint.

    Of a checkpoint an average of the weights (EMA) is taken where it holds one, as timm does; a leading ``module.`` is
    taken off. Nothing in a file is executed.

    Raises:
        WeightsError: If there is no such file or it cannot be read as weights.
    """
    state: Mapping[str, Tensor] = clean_state_dict(read_state(path, averages=True))
    return state


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], wanted: Callable[[str], bool], *, origin: str = ""
) -> None:
    """Copy the wanted tensors into a model, after checking that they are this architecture's and complete.

    Integer tensors (batch norm's counters, tables of positions) are copied where they are given, and may be missing.

    Args:
        model: Changed in place.
        state: Name to tensor.
        wanted: Which names have to agree; others are left alone on both sides.
        origin: Where ``state`` is from, for the error.

    Raises:
        WeightsError: Naming the first tensor that is missing, of another shape, or in ``state`` only.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> load_into(model, {"weight": torch.tensor([[3.0, 4.0]]), "head.weight": torch.zeros(1)}, "weight".__eq__)
        >>> model.weight.tolist()
        [[3.0, 4.0]]
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}
    given = {name: tensor for name, tensor in state.items() if wanted(name)}
    for name in [*own, *(name for name in given if name not in own)]:
        expected, found = own.get(name), given.get(name)
        floating = any(tensor is not None and tensor.is_floating_point() for tensor in (expected, found))
        if floating and _shape(expected) != _shape(found):
            raise WeightsError(
                f"these are weights of another architecture than {title(model)}",
                where=origin,
                notes=[f"the first tensor that differs is {name}: expected {_shape(expected)}, found {_shape(found)}"],
            )
    model.load_state_dict({name: tensor for name, tensor in given.items() if name in own}, strict=False)


def _shape(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"


def _native_size(model: nn.Module) -> int:
    return int(image_config(model)["input_size"][-1])


def _check_logits(model: nn.Module, name: str, classes: int, image_size: int) -> None:
    """Run two black images through a model of one's own, which is left in train mode."""
    model.eval()
    try:
        with torch.no_grad():
            found = model(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # a model of one's own may raise anything
        raise ModelError(
            f"{name} cannot take images of {image_size} x {image_size} pixels: {type(error).__name__}: {error}",
            notes=["its forward gets one tensor of images, (N, 3, S, S)"],
        ) from error
    model.train()
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (2, classes):
        raise ModelError(
            f"{name} gives {shape} for 2 images and {classes} classes, expected logits of shape (2, {classes})",
            notes=[f"its function is called with num_classes={classes}"],
        )


def _head(model: nn.Module) -> frozenset[str]:
    """Names of the modules that own the classifier's tensors; of a tensor that the model itself owns, its name."""
    description = describe(model)
    if "head" not in description.roles:
        raise ModelError(description.unknown["head"], notes=["the experiment trains a new classifier on the model"])
    return frozenset(name.rpartition(".")[0] or name for name in description.roles["head"])


def _below(module: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(f"{module}.")


def _outside(head: frozenset[str]) -> Callable[[str], bool]:
    return lambda name: not any(name == part or name.startswith(f"{part}.") for part in head)
