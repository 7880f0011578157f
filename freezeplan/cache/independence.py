"""The proof that an image's features depend on nothing but the image: not on its batch, and not on chance.

Every comparison is between two passes that are the same computation: as many images, each at the same place, in the
same precision. Such passes ask for equality, bit by bit. A GPU chooses kernels by shape, so passes over different
numbers of images round differently, and are never compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan.cache.calls import intercepted, named, tensors
from freezeplan.errors import ApplyError

NOT_TWICE = "its output is not the same for the same batch twice: it is random, or its kernels are not deterministic"
ON_BATCH = "its output for an image depends on the other images of the batch"


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers in the same shape; not a number equals itself.

    Examples:
        >>> same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])), same(torch.ones(1), torch.zeros(1))
        (True, False)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def exchanged(images: Tensor, place: int) -> Tensor:
    """Return a batch with one image where it was, and all others exchanged for noise of the same mean and deviation.

    Args:
        images: (N, ...), floating-point.
        place: Which image stays.

    Returns:
        A batch of the same shape, type and memory format.

    Examples:
        >>> batch = torch.arange(6.0).view(3, 2)
        >>> other = exchanged(batch, 1)
        >>> torch.equal(other[1], batch[1]), bool((other[[0, 2]] == batch[[0, 2]]).any())
        (True, False)
    """
    random = torch.Generator().manual_seed(place + 1)
    noise = torch.randn(images.shape, generator=random).to(images.device)
    spread = images.float().std() if images.numel() > 1 else images.new_zeros(())
    found = torch.empty_like(images).copy_(images.float().mean() + (spread + 1e-3) * noise)
    found[place] = images[place]
    return found


def same_autocast(device: torch.device) -> torch.autocast:
    """Return the caller's autocast, without its cache of weights: checks change weights between passes."""
    kind = device.type
    on = torch.is_autocast_enabled(kind)
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=on, cache_enabled=False)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest number of the first.

    Examples:
        >>> largest_difference(torch.tensor([4.0, -8.0]), torch.tensor([4.0, -7.0]))
        0.125
    """
    if not a.numel():
        return 0.0
    a, b = (tensor.detach().double().nan_to_num(0.0, 0.0, 0.0) for tensor in (a, b))
    scale = float(a.abs().max())
    return float((a - b).abs().max()) / scale if scale else 0.0


def check_independent(
    model: nn.Module, modules: Sequence[str], images: Tensor, features: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compare the features of each image with those that it has among other images.

    Args:
        model: In the mode in which the features are computed. It is not changed.
        modules: Names of those that compute them, in the order of the pass.
        images: A batch of two images or more, (N, C, H, W), on the model's device.
        features: Images to features, (N, E).

    Returns:
        The features of ``images``.

    Raises:
        ApplyError: If they differ, with the name of the first module whose output differs: for the same batch twice, or
            for an image with all its companions exchanged.
    """
    found = features(images)
    for place in range(len(images)):
        others = exchanged(images, place)
        if same(features(others)[place], found[place]):
            continue
        if not same(features(images), found):
            raise _dependent(_first(model, modules, images, images, None, features), NOT_TWICE)
        raise _dependent(_first(model, modules, images, others, place, features), ON_BATCH)
    return found


def _dependent(module: str, why: str) -> ApplyError:
    return ApplyError(
        f"{module}: {why}, so features cannot be cached",
        notes=["train on images with the same plan; freezeplan run --no-cache"],
    )


def _first(
    model: nn.Module,
    modules: Sequence[str],
    one: Tensor,
    other: Tensor,
    place: int | None,
    run: Callable[[Tensor], Any],
) -> str:
    """Name of the first module whose output differs between two passes: all of it, or the rows of one image."""
    name = named(model)
    live = [m for m in model.modules() if id(m) in name and _at_or_below(name[id(m)], modules)]
    seen: list[list[tuple[str, list[Tensor]]]] = []

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        seen[-1].append((name[id(module)], [rows(tensor, place, len(one)).clone() for tensor in tensors(answer)]))
        return answer

    for images in (one, other):
        seen.append([])
        with intercepted(live, around), torch.no_grad():
            run(images)
    for (module, first), (_, second) in zip(*seen, strict=False):
        if not all(map(same, first, second)):
            return str(module)
    return " or ".join(modules)


def rows(tensor: Tensor, place: int | None, images: int) -> Tensor:
    """Return the part of an output that belongs to one image of a batch; all of it where it has no such part.

    Examples:
        >>> rows(torch.arange(6), 1, 3)
        tensor([2, 3])
    """
    if place is None or not tensor.ndim or len(tensor) % images:
        return tensor
    each = len(tensor) // images
    return tensor[place * each : (place + 1) * each]


def _at_or_below(name: str, above: Sequence[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in above)
