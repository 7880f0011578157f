"""What the values of a tensor before and after say about who moved it. Pure: two tensors in, a sentence out.

The sentences are likely causes. Each rests on a pattern that the other causes do not leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from freezeplan.model.sharded import whole

_ROUNDING = 1e-4
"""Change, relative to the largest value, up to which it is called rounding: an average (decay 0.9999) of a weight that
does not change stays within 6e-4 of one float32 epsilon a step, and is mostly far below it."""


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of tensors of the same shapes, in their own units; 0 for empty ones.

    It is NaN where any difference is.

    Examples:
        >>> largest_change([torch.zeros(2)], [torch.tensor([0.5, -1.0])])
        1.0
    """
    pairs = zip(before, after, strict=True)
    changes = (_double(b) - _double(a).to(b.device) for b, a in pairs if b.numel())
    sizes = [float(change.abs().max()) for change in changes]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Return the largest absolute difference over the largest absolute value before; None where all of that was zero.

    Examples:
        >>> relative_change([torch.tensor([2.0, -4.0])], [torch.tensor([2.0, -3.0])])
        0.25
    """
    size = largest_change(before, [torch.zeros_like(tensor) for tensor in before])
    return largest_change(before, after) / size if size else None


def became_nan(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether a value is no number (NaN) now, where none was before as far as that is known.

    Examples:
        >>> became_nan([torch.ones(1)], [torch.tensor([float("nan")])]), became_nan([], [torch.ones(1)])
        (True, False)
    """
    return _has_nan(after) and not _has_nan(before)


def _has_nan(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.is_floating_point() and bool(_double(tensor).isnan().any()) for tensor in tensors)


def pattern(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    """Say what the change of a weight looks like; empty where it looks like nothing in particular.

    Args:
        before: The tensors, mostly one, as they were.
        after: The same tensors now, of the same shapes.

    Returns:
        One of: ``rounded`` (to a half precision and back), ``shrunk`` (all values by one factor), ``decayed`` (each
        towards zero, by other factors), ``drift`` (by rounding only), ``unrelated`` (other values altogether), or
        nothing.

    Examples:
        >>> weight = torch.linspace(-1, 1, 32)
        >>> pattern([weight], [weight * 0.99]), pattern([weight], [weight.bfloat16().float()])
        ('shrunk', 'rounded')
        >>> pattern([weight], [weight - 0.01 * weight.sign()])
        'decayed'
        >>> pattern([weight], [weight + 1e-6]), pattern([weight], [weight.flip(0)]), pattern([weight], [weight + 0.1])
        ('drift', 'unrelated', '')
    """
    if not all(tensor.is_floating_point() for tensor in (*before, *after)):
        return ""
    if any(_is_rounded(before, after, dtype) for dtype in (torch.bfloat16, torch.float16)):
        return "rounded"
    one, two = (torch.cat([_double(tensor).cpu().reshape(-1) for tensor in part]) for part in (before, after))
    size, product = float(one @ one), float(one @ two)
    if not size:
        return ""
    factor, largest = product / size, float(one.abs().max())
    residual = float((two - factor * one).abs().max())
    one_factor = one.numel() > 1 and residual <= max(0.02 * (1 - factor), 1e-6) * largest
    if one_factor and 1e-3 < factor < 1 - 1e-6:  # what is emptied is shrunk by no decay
        return "shrunk"
    if _towards_zero(one, two):
        return "decayed"
    if float((two - one).abs().max()) <= _ROUNDING * largest:
        return "drift"
    norm = float(two.norm()) * size**0.5
    return "unrelated" if one.numel() >= 16 and product < 0.3 * norm else ""


def _towards_zero(before: Tensor, after: Tensor) -> bool:
    """Whether each value moved towards zero, as a decay in the gradient does under Adam or RMSprop: a step of one size.

    What is smaller than the largest change may cross zero, and what is zero has no decay. Enough values of both signs
    are asked for that chance or a gradient of one sign do not look like it.
    """
    change = after - before
    large = before.abs() > change.abs().max()
    signs, still = before[large].sign(), before == 0
    towards = bool((change[large] * signs < 0).all()) and not bool(change[still].any())
    return towards and signs.numel() >= 16 and int(signs.max()) - int(signs.min()) == 2


def _is_rounded(before: Sequence[Tensor], after: Sequence[Tensor], dtype: torch.dtype) -> bool:
    pairs = list(zip(before, after, strict=True))
    return all(b.dtype == a.dtype != dtype and _survives(b, a, dtype) for b, a in pairs)


def _survives(before: Tensor, after: Tensor, dtype: torch.dtype) -> bool:
    one, two = whole(before), whole(after)
    return torch.equal(one.to(dtype).to(one.dtype), two.to(one.device))


def _double(tensor: Tensor) -> Tensor:
    return whole(tensor).double()
