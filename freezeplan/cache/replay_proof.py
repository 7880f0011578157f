"""The proof that a pass over cached features is the plain pass: the same answers and gradients, bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from freezeplan.cache.calls import intercepted, named, tensors, undisturbed
from freezeplan.cache.independence import check_independent, largest_difference, same, same_autocast
from freezeplan.cache.prefix import Prefix
from freezeplan.cache.replay import Rest, capture
from freezeplan.errors import ApplyError
from freezeplan.model import names


def prove(model: nn.Module, rest: Rest, prefix: Prefix, images: Tensor) -> float:
    """Compare the pass over features with the plain one: answers in eval mode, answers and gradients in train mode.

    First ``check_independent``. Then both passes over the same batch, as the model is, and with every trained parameter
    changed at random, which shows what depends on it without autograd knowing. All comparisons ask for equal bits under
    the caller's autocast. What differs between two equal passes, such as a gradient that a GPU sums in no fixed order,
    cannot be compared; by how much it differs is returned. Weights, buffers, modes and random states are as before
    afterwards.

    Args:
        model: With a live plan.
        rest: What is to be trained on features of it.
        prefix: What was found on it.
        images: A batch of three, (3, C, H, W), on the model's device.

    Returns:
        The largest difference between two equal passes, relative to the largest number of the tensor that differs; 0
        where the device repeats itself.

    Raises:
        ApplyError: If one of them differs, with the name of the first module that does.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trained]
    with undisturbed(model), same_autocast(images.device), torch.enable_grad():
        model.train()
        names = list(dict.fromkeys(call.module for call in prefix.calls))
        features = check_independent(model, names, images, lambda given: capture(model, [prefix], given)[0])
        generator = torch.Generator().manual_seed(0)
        difference = 0.0
        try:
            for changed in (False, True):
                if changed:
                    for parameter in trained:
                        noise = torch.rand(parameter.shape, generator=generator).to(parameter)
                        parameter.data.mul_(1 + 0.2 * noise).add_(0.01 * noise)
                for mode in (False, True):
                    model.train(mode)
                    difference = max(difference, _check_same(model, rest, prefix, images, features, trained))
        finally:
            for parameter, value in zip(trained, values, strict=True):
                parameter.data.copy_(value)
    return difference


def _check_same(
    model: nn.Module, rest: Rest, prefix: Prefix, images: Tensor, features: Tensor, trained: list[nn.Parameter]
) -> float:
    def replayed() -> list[Tensor | None]:
        return _results(rest, features, model.training, trained)

    first = replayed()
    if _alike(_results(model, images, model.training, trained), first):
        return 0.0
    with _computed_as_features_are(model, prefix):
        plain, again = (_results(model, images, model.training, trained) for _ in range(2))
    pairs = list(zip(first, replayed(), strict=True)), list(zip(plain, again, strict=True))
    fixed = [at for at, (one, two) in enumerate(zip(*pairs, strict=False)) if _same(*one) and _same(*two)]
    if len(plain) == len(first) and all(_same(plain[at], first[at]) for at in fixed):
        return max(largest_difference(a, b) for pair in pairs for a, b in pair if a is not None and b is not None)
    where = _first_difference(model, rest, prefix, images, features)
    raise ApplyError(
        f"cached features give different results, first at {where}",
        notes=["this model cannot be trained on cached features; train it on images, with the same plan"],
    )


def _computed_as_features_are(model: nn.Module, prefix: Prefix) -> contextlib.AbstractContextManager[None]:
    """Let cached calls run without gradients: a CPU has other kernels for an LSTM that could be trained."""
    cached = {call.module for call in prefix.calls}

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad():
            return forward(*args, **kwargs)

    return intercepted([m for name, live in names.modules(model).items() if name in cached for m in live], around)


def _results(run: nn.Module, given: Tensor, training: bool, trained: list[nn.Parameter]) -> list[Tensor | None]:
    """The answers of a pass, then the gradient of each trained parameter; None where it has none."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):  # some models keep a graph from one pass in eval to the next
        answers = [tensor for tensor in tensors(run(given)) if tensor.is_floating_point()]
        total = sum((a.float().square().sum() for a in answers if a.requires_grad), given.new_zeros(()))
    gradients: tuple[Tensor | None, ...] = ()
    if total.requires_grad:
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    return [*answers, *gradients]


def _alike(one: list[Tensor | None], two: list[Tensor | None]) -> bool:
    return len(one) == len(two) and all(map(_same, one, two))


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two if one is None or two is None else same(one, two)


def _first_difference(model: nn.Module, rest: Rest, prefix: Prefix, images: Tensor, features: Tensor) -> str:
    """Name of the first module that both passes run and that answers differently."""
    name = named(model)
    cached = {call.module for call in prefix.calls}
    seen: list[list[tuple[str, list[Tensor]]]] = []

    def around(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        seen[-1].append((name[id(module)], [tensor.detach().clone() for tensor in tensors(answer)]))
        return answer

    live = [m for m in model.modules() if id(m) in name and not _below(name[id(m)], cached)]
    for run, given in ((model, images), (rest, features)):
        torch.manual_seed(0)
        seen.append([])
        with intercepted(live, around), torch.no_grad():
            run(given)
    for (plain, a), (replayed, b) in zip(*seen, strict=False):
        if plain != replayed or not all(same(x, y) for x, y in zip(a, b, strict=True)):
            return repr(plain)
    return "the model's own code, behind all modules"


def _below(name: str, above: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in above)
