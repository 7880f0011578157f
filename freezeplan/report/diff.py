"""What two plans do differently to one model, by tensor and folded to modules. Plain data from two Resolutions."""

from __future__ import annotations

from dataclasses import dataclass

from freezeplan.errors import PlanError
from freezeplan.resolve.resolution import Resolution, Row


@dataclass(frozen=True)
class Change:
    """One difference that all tensors below a module share."""

    name: str
    """A module, or a tensor where its module does not agree."""
    phase: str
    """The phase of the second plan, or ``NUMBER`` where it has none; empty without phases."""
    before: str
    after: str
    tensors: int
    elements: int


def compare(first: Resolution, second: Resolution) -> tuple[Change, ...]:
    """Return what two plans decide differently for the same model; nothing if they are equivalent.

    Rates, weight decay, modes and ``reinit`` are compared, phase by phase; which rule decided is not. A plan without
    phases is compared with each phase of the other.

    Args:
        first: One plan on the model.
        second: Another plan on the same model.

    Raises:
        PlanError: If the models differ, or both have phases and not the same number of them, or other ends.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model
        >>> model = create_model("vgg16", meta=True)
        >>> frozen, low = (resolve_plan(f"voc_vgg16/{name}", model) for name in ("frozen_convs", "low_conv_lr"))
        >>> compare(frozen, low)[0]  # doctest: +NORMALIZE_WHITESPACE
        Change(name='features', phase='', before='frozen, eval', after='lr x 0.2, train', tensors=26,
               elements=14714688)
        >>> compare(low, low)
        ()
    """
    if [(row.name, row.shape) for row in first.rows] != [(row.name, row.shape) for row in second.rows]:
        raise PlanError(f"two plans are compared on one model; these are {first.model} and {second.model}")
    ends = [[phase.until for phase in resolution.plan.phases] for resolution in (first, second)]
    if all(ends) and ends[0] != ends[1]:
        raise PlanError(f"the phases do not end at the same places: {ends[0]} and {ends[1]}")
    count = max(len(first.parts), len(second.parts))
    pairs = (
        (first.parts[min(i, len(first.parts) - 1)], second.parts[min(i, len(second.parts) - 1)]) for i in range(count)
    )
    return tuple(change for before, after in pairs for change in _changes(before, after))


def _changes(before: Resolution, after: Resolution) -> list[Change]:
    rows = [(one, other, _text(one, other)) for one, other in zip(before.rows, after.rows, strict=True)]
    return _fold("", 0, rows, after.phase or before.phase)


_Compared = tuple[Row, Row, tuple[str, str]]


def _fold(name: str, depth: int, rows: list[_Compared], phase: str) -> list[Change]:
    texts = {text for _, _, text in rows}
    if texts == {("", "")}:
        return []
    if len(texts) == 1 and name:
        ((old, new),) = texts
        return [Change(name, phase, old, new, len(rows), sum(row.elements for row, _, _ in rows))]
    parts: dict[str, list[_Compared]] = {}
    for compared in rows:
        path = compared[0].name.split(".")
        parts.setdefault(".".join(path[: depth + 1]), []).append(compared)
    return [change for part, inner in parts.items() for change in _fold(part, depth + 1, inner, phase)]


def _text(one: Row, other: Row) -> tuple[str, str]:
    """What is said of each side; empty on both where they agree. Weight decay and reinit are said where they differ."""
    if _decided(one) == _decided(other):
        return "", ""
    extra = [key for key in ("wd_mult", "reinit") if getattr(one, key) != getattr(other, key)]

    def said(row: Row) -> str:
        rate = "frozen" if row.frozen else f"lr x {row.lr_mult:g}"
        return ", ".join([rate, row.mode, *(f"{key} {getattr(row, key)}" for key in extra)])

    return said(one), said(other)


def _decided(row: Row) -> tuple[object, ...]:
    return row.frozen, row.lr_mult, row.wd_mult, row.mode, row.reinit
