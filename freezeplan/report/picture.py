"""A picture of a plan: the network from input to output as blocks, from ice (frozen) to fire (full rate).

What the blocks are is plain data; drawing them is the one place in the core that imports matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freezeplan.atomic import whole_file
from freezeplan.errors import FreezePlanError, MissingExtraError, OutputError
from freezeplan.model.description import Description
from freezeplan.report.rows import phase_end
from freezeplan.resolve.resolution import Resolution, Row

LIMIT = 64
"""Blocks of a picture, at most where the model's parts allow: more are not readable."""

_CONTAINERS = frozenset({"Sequential", "ModuleList", "ModuleDict"})
_ICE, _EDGE = "#bfe0f5", "#3b83b5"
_FIRE = ("#fff1b8", "#fdbb4a", "#f0701f", "#b30f1a")
_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class Block:
    """A module or a tensor of a picture."""

    name: str
    elements: int
    shares: tuple[tuple[float | None, float], ...]
    """(``lr_mult`` or None where frozen, fraction of the elements), frozen first, then the slowest; they add to 1."""


def blocks(part: Resolution, model: Description) -> tuple[Block, ...]:
    """Return the blocks of one phase of a plan, in the model's order.

    Containers are opened, and so is what mostly consists of one or holds a fifth of the model; modules of one class are
    opened together or not at all, and none where the picture would get more than ``LIMIT`` blocks.

    Args:
        part: What the plan, or one phase of it, means for the model.
        model: The model.

    Examples:
        >>> from freezeplan import resolve_plan
        >>> from freezeplan.model import create_model, describe
        >>> vgg = create_model("vgg16", meta=True)
        >>> found = blocks(resolve_plan("linear_probe", vgg), describe(vgg))
        >>> len(found), found[-1].name, found[-1].shares, found[0].elements
        (16, 'head', ((1.0, 1.0),), 1792)
    """
    rows = {row.name: row for row in part.rows}
    return tuple(_block(name, [rows[tensor] for tensor in tensors]) for name, tensors in _cut(model).items())


def _block(name: str, rows: Sequence[Row]) -> Block:
    total = sum(row.elements for row in rows)
    counts: dict[float | None, int] = {}
    for row in rows:
        counts[row.lr_mult] = counts.get(row.lr_mult, 0) + row.elements
    ordered = sorted(counts.items(), key=lambda item: item[0] or 0.0)
    return Block(name, total, tuple((rate, count / total) for rate, count in ordered))


def _cut(model: Description) -> dict[str, list[str]]:
    """Block -> its tensors, in the model's order."""
    kinds = {module.name: module.types for module in model.modules}
    elements = {tensor.name: tensor.elements for tensor in model.tensors}
    opened = {""}
    shut: set[str] = set()
    while True:
        found: dict[str, list[str]] = {}
        for tensor in model.tensors:
            found.setdefault(_place(tensor.name, opened), []).append(tensor.name)
        sizes = {name: sum(elements[t] for t in tensors) for name, tensors in found.items()}
        waiting = [n for n in found if n in kinds and n not in shut and _opens(n, kinds, elements, model)]
        if not waiting:
            return found
        largest = max(waiting, key=lambda name: sizes[name])
        together = [name for name in waiting if kinds[name] == kinds[largest]]
        after = {_place(tensor.name, opened | set(together)) for tensor in model.tensors}
        (opened if len(after) <= LIMIT else shut).update(together)


def _place(tensor: str, opened: set[str]) -> str:
    """The block of a tensor: the outermost module above it that is not opened, or its own name."""
    name = ""
    for part in tensor.split("."):
        name = f"{name}.{part}" if name else part
        if name not in opened:
            break
    return name


def _opens(name: str, kinds: Mapping[str, tuple[str, ...]], elements: Mapping[str, int], model: Description) -> bool:
    """Whether a module is shown by its parts."""
    children = [child for child in kinds if child.rpartition(".")[0] == name and model.below[child]]
    if not children:
        return False
    if _CONTAINERS.intersection(kinds[name]):
        return True

    def size(module: str) -> int:
        return sum(elements[tensor] for tensor in model.below[module])

    held = max((size(child) for child in children if _CONTAINERS.intersection(kinds[child])), default=0)
    return 2 * held >= size(name) or ("." not in name and 5 * size(name) >= sum(elements.values()))


def draw(resolution: Resolution, model: Description, path: Path) -> None:
    """Draw a plan on a model, the input on the left, the parameters of each block as height, a strip for each phase.

    Of phases that follow each other and decide the same the last one is drawn.

    Args:
        resolution: What the plan means for the model.
        model: The same model's description.
        path: Where the picture goes, ``.png`` or ``.svg``; written under a temporary name first.

    Raises:
        MissingExtraError: If matplotlib is not installed.
        FreezePlanError: If the file would have another suffix.
        OutputError: If the folder does not exist or cannot be written.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise FreezePlanError(f"a picture is a .png or a .svg, found {path.name!r}", notes=[f"--image {path.stem}.svg"])
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {str(path.parent)!r} for the picture")
    figure = paint(resolution, model)
    import matplotlib

    kind = path.suffix.lower()[1:]
    title = f"{resolution.plan.title} on {resolution.subject}"
    metadata = {"Title": title, "Date": None} if kind == "svg" else {"Title": title}
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), whole_file(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from None


def paint(resolution: Resolution, model: Description) -> Any:
    """Return the picture as a ``matplotlib.figure.Figure``; what ``draw`` writes.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "run") from None
    strips = [(part, blocks(part, model)) for part in resolution.distinct]
    rates = {rate for _, found in strips for block in found for rate, _ in block.shares}
    scale = _Scale(sorted(rate for rate in rates if rate is not None))
    names, sizes = zip(*((block.name, block.elements) for block in strips[0][1]), strict=True)
    floor = 10.0 ** (math.floor(math.log10(max(min(sizes), 1))) - 1)
    height = 2.4 if len(strips) > 1 else 3.4
    figure = Figure(figsize=(max(7.0, 1.3 + 0.24 * len(names)), 1.9 + height * len(strips)), layout="constrained")
    figure.patch.set_facecolor("white")
    figure.suptitle(f"{resolution.plan.title} on {resolution.subject}", fontsize=12, fontweight="bold")
    axes = figure.subplots(len(strips), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (part, found) in zip(axes, strips, strict=True):
        for place, block in enumerate(found):
            _bar(axis, place, block, floor, scale)
        axis.set_yscale("log")
        axis.set_ylim(floor, max(sizes) * (max(sizes) / floor) ** 0.24)
        axis.set_ylabel("parameters (log scale)", fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.tick_params(axis="x", length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(_caption(resolution, part), fontsize=8.5, loc="left", color="#444444")
    axes[-1].set_xlim(-0.8, len(names) - 0.2)
    axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes[-1].set_xlabel("from the input to the output", fontsize=8)
    figure.legend(handles=_legend(rates, scale), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return figure


class _Scale:
    """From pale, at the slowest rate and at least at a hundredth of the fastest, to dark red at the fastest."""

    def __init__(self, rates: Sequence[float]):
        self._low, self._top = min(rates[0], rates[-1] / 100), rates[-1]

    def style(self, rate: float | None) -> dict[str, Any]:
        """How a rate looks: frozen is hatched too, so that it is told apart without colours."""
        if rate is None:
            return {"facecolor": _ICE, "edgecolor": _EDGE, "hatch": "////", "linewidth": 0.4}
        place = math.log(rate / self._low) / math.log(self._top / self._low)
        return {"facecolor": colour(min(max(place, 0.0), 1.0)), "edgecolor": "#5a1a0a", "linewidth": 0.4}


def _bar(axis: Any, place: int, block: Block, floor: float, scale: _Scale) -> None:
    """Draw a block beside the others; each rate has a tenth of its width at least, so that biases are seen."""
    widths = [max(share, 0.1) for _, share in block.shares]
    left = place - 0.4
    for (rate, _), width in zip(block.shares, widths, strict=True):
        width *= 0.8 / sum(widths)
        axis.bar(left, block.elements - floor, width, bottom=floor, align="edge", **scale.style(rate))
        left += width
    words = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6.5, "color": "#444444"}
    axis.text(place, block.elements * 1.25, _short(block.elements), **words)


def colour(place: float) -> str:
    """Return a colour of the fire as ``#rrggbb``.

    Args:
        place: From 0, pale, to 1, dark red.

    Examples:
        >>> colour(1.0), colour(0.0)
        ('#b30f1a', '#fff1b8')
    """
    index = min(int(place * (len(_FIRE) - 1)), len(_FIRE) - 2)
    part = place * (len(_FIRE) - 1) - index
    ends = ((int(_FIRE[index][i : i + 2], 16), int(_FIRE[index + 1][i : i + 2], 16)) for i in (1, 3, 5))
    mixed = (round(cold * (1 - part) + hot * part) for cold, hot in ends)
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _legend(rates: set[float | None], scale: _Scale) -> list[Any]:
    from matplotlib.patches import Patch

    trained = sorted(rate for rate in rates if rate is not None)
    if len(trained) > 6:  # a decay by layers has dozens: the ends and four between
        trained = [trained[round(index * (len(trained) - 1) / 5)] for index in range(6)]
    shown: list[float | None] = [*([None] if None in rates else []), *trained]
    return [Patch(label="frozen" if rate is None else f"lr x {rate:.3g}", **scale.style(rate)) for rate in shown]


def _caption(resolution: Resolution, part: Resolution) -> str:
    trained, whole = (sum(row.elements for row in rows) for rows in (part.trained, part.rows))
    counts = f"{trained:,} of {whole:,} parameters trained ({trained / whole:.1%})"
    return f"{part.phase}, {phase_end(resolution, part)}: {counts}" if part.phase else counts


def _short(count: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
