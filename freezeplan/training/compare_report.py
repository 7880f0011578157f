"""A comparison for people: the ranking as a table, error against cost as a picture, both as a page; data as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.text import Text

from freezeplan.atomic import write_all
from freezeplan.errors import OutputError
from freezeplan.report.terminal import print_table
from freezeplan.training.ranking import Place, as_rows, front

FILES = ("results.json", "results.csv", "comparison.svg", "report.html")
ACCENT, OTHER = "#0072b2", "#8a94a0"
COLUMNS = (
    ("plan", "left"), ("lr", "right"), ("error %", "right"), ("95 % interval", "right"), ("train %", "right"),
    ("seconds", "right"), ("peak", "right"), ("trained", "right"), ("", "left"),
)  # fmt: skip
FRONT, NOISE = "*", "~"
LEGEND = f"{FRONT} no other plan is both more accurate and faster   {NOISE} within noise of the first plan"


def cells(place: Place, on_front: bool) -> tuple[str, ...]:
    """Return a plan's row of the table, in the order of ``COLUMNS``.

    Examples:
        >>> place = Place("full", 1e-3, 0.286, (0.26, 0.31), 0.3, 0.01, 35.2, None, 9_000_000, False, None)
        >>> cells(place, on_front=True)
        ('full', '0.001', '28.6', '26.0 to 31.0', '1.0', '35.2', '', '9.0 M', '*')
    """
    low, high = place.interval
    return (
        place.plan, f"{place.lr:g}", percent(place.val_error), f"{percent(low)} to {percent(high)}",
        percent(place.train_error), f"{place.seconds:.1f}", "" if place.peak_bytes is None else size(place.peak_bytes),
        short(place.trained), FRONT * on_front + NOISE * place.within_noise,
    )  # fmt: skip


def short(count: int) -> str:
    """Return a number of parameters in thousands or millions.

    Examples:
        >>> short(6_405), short(12), short(3_400_000)
        ('6.4 k', '12', '3.4 M')
    """
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.1f} k" if count >= 1e3 else str(count)


def percent(fraction: float) -> str:
    """Return a fraction in percent, with one decimal.

    Examples:
        >>> percent(0.2861)
        '28.6'
    """
    return f"{100 * fraction:.1f}"


def size(count: int) -> str:
    """Return bytes in units that people read.

    Examples:
        >>> size(1_300_000_000), size(70_000_000)
        ('1.3 GB', '70 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def print_ranking(console: Console, places: Sequence[Place], sentence: str) -> None:
    """Print the ranking as a table, and the verdict."""
    on_front = front(places)
    rows = [
        [Text(cell, "" if number else "bold") for cell in cells(place, place.plan in on_front)]
        for number, place in enumerate(places)
    ]
    print_table(console, [name for name, _ in COLUMNS], rows, left=[name for name, side in COLUMNS if side == "left"])
    console.print(Text(LEGEND, "dim"), soft_wrap=True)
    console.print()
    console.print(Text(sentence), soft_wrap=True)


def to_svg(places: Sequence[Place], title: str) -> bytes:
    """Draw validation error against seconds, a point a plan with its interval; the front is marked and joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    on_front = front(places)
    by_name = {place.plan: place for place in places}
    line = [by_name[name] for name in on_front]
    axes.plot([p.seconds for p in line], [100 * p.val_error for p in line], color=ACCENT, lw=1, alpha=0.5, zorder=1)
    for place in places:
        colour = ACCENT if place.plan in on_front else OTHER
        error, (low, high) = 100 * place.val_error, (100 * edge for edge in place.interval)
        axes.vlines(place.seconds, low, high, color=colour, lw=1, alpha=0.6, zorder=2)
        axes.plot([place.seconds], [error], "o", color=colour, ms=7, zorder=3)
        axes.annotate(
            place.plan, (place.seconds, error), xytext=(7, 4), textcoords="offset points", color=colour, fontsize=9
        )
    axes.set(xlabel="seconds of one training", ylabel="validation error, %", xscale="log" if places else "linear")
    axes.margins(x=0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    return svg(figure, "compare")


def svg(figure: Any, salt: str) -> bytes:
    """Write a matplotlib figure as SVG, the same bytes each time; text is drawn as paths.

    Args:
        figure: A ``matplotlib.figure.Figure``.
        salt: Decides the ids in the file.
    """
    import matplotlib

    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def to_csv(places: Sequence[Place]) -> str:
    """Write one row a plan, a header first."""
    rows = as_rows(places)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["plan"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(out: Path, places: Sequence[Place], results: Mapping[str, Any], title: str, sentence: str) -> None:
    """Write the four files, all of them or none.

    Args:
        out: The folder; it is made.
        places: The ranking.
        results: Facts and settings, for ``results.json`` and the page.
        title: Of the picture and the page.
        sentence: The verdict.

    Raises:
        OutputError: If they cannot be written.
    """
    picture = to_svg(places, title)
    environment = Environment(
        loader=PackageLoader("freezeplan.training", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    on_front = front(places)
    page = environment.get_template("compare.html.jinja").render(
        title=title, verdict=sentence, columns=COLUMNS, legend=LEGEND, results=results,
        rows=[cells(place, place.plan in on_front) for place in places],
        picture=picture.decode().partition("<svg")[2],
    )  # fmt: skip
    text = json.dumps({**results, "ranking": as_rows(places)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = dict(zip(FILES, (text.encode(), to_csv(places).encode(), picture, page.encode()), strict=True))
    try:
        write_all(out, contents)
    except OSError as error:
        raise OutputError(f"results cannot be written: {error.strerror or error}", where=str(out)) from error
