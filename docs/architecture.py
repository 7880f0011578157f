"""Draw the packages and their imports, and write the tables of docs/architecture.md.

``python docs/architecture.py`` writes both; ``--check`` exits with 1 if one of them is stale.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import grimp
import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "freezeplan"
PAGE = HERE / "architecture.md"
PICTURE = HERE / "pictures" / "architecture.svg"
ROWS = [
    ["errors", "atomic"], ["plan"], ["model"], ["resolve"], ["apply"], ["guard", "proof", "cache"], ["lifetime"],
    ["applied_plan"], ["api"], ["importers", "report", "integrations"], ["training"], ["voc_vgg16"], ["cli"],
]  # fmt: skip
"""The layers, the lowest first, as in pyproject.toml."""
INK, LINE, FILL = "#1b2a38", "#8fa3b5", "#e8f1f8"


def summary(file: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).removesuffix(".")


def arrows() -> set[tuple[str, str]]:
    """Return (importer, imported) for the units of ``ROWS``, without those that follow from others."""
    units = [name for row in ROWS for name in row]
    graph = grimp.build_graph("freezeplan", cache_dir=None, exclude_type_checking_imports=True)
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            one, other = (module.removeprefix("freezeplan.").partition(".")[0] for module in (importer, imported))
            if one != other and one in units and other in units:
                found.add((one, other))
    below: dict[str, set[str]] = {}
    for name in units:
        direct = {other for one, other in found if one == name}
        below[name] = direct.union(*(below.get(other, set()) for other in direct))
    return {
        (one, other)
        for one, other in found
        if not any(other in below[between] for first, between in found if first == one and between != other)
    }


def picture() -> bytes:
    """Draw the layers from the lowest up, an arrow from each importer to what it imports."""
    figure = Figure(figsize=(7.2, 7.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-1.75, 1.75)
    axes.set_ylim(-0.7, len(ROWS) - 0.3)
    axes.axis("off")
    places: dict[str, tuple[float, float]] = {}
    for height, row in enumerate(ROWS):
        for column, name in enumerate(row):
            x = (column - (len(row) - 1) / 2) * 1.12
            places[name] = (x, height)
            axes.add_patch(
                FancyBboxPatch((x - 0.42, height - 0.24), 0.84, 0.48, boxstyle="round,pad=0.02,rounding_size=0.08",
                               facecolor=FILL, edgecolor=LINE, linewidth=1, mutation_aspect=2.2, zorder=2)
            )  # fmt: skip
            axes.text(x, height, name, ha="center", va="center", color=INK, fontsize=10, zorder=3)
    for one, other in sorted(arrows()):
        if other in ROWS[0]:  # everything may import these
            continue
        (x, top), (to, bottom) = places[one], places[other]
        bend = 0.0 if top - bottom <= 1 or x != to else 0.3
        axes.annotate(
            "", xy=(to, bottom + 0.27), xytext=(x, top - 0.27),
            arrowprops={"arrowstyle": "-|>", "color": LINE, "lw": 1.1, "connectionstyle": f"arc3,rad={bend}"}, zorder=1,
        )  # fmt: skip
    found = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "freezeplan", "svg.fonttype": "none"}):
        figure.savefig(found, format="svg", metadata={"Date": None, "Creator": None})
    return found.getvalue()


def table() -> str:
    """Return a table of the packages from the lowest up, each file with its first sentence."""
    lines = ["| where | what |", "|---|---|"]
    for name in (name for row in ROWS for name in row):
        folder = PACKAGE / name
        if not folder.is_dir():
            lines.append(f"| **`{name}.py`** | {summary(folder.with_suffix('.py'))} |")
            continue
        lines.append(f"| **`{name}/`** | **{summary(folder / '__init__.py')}** |")
        files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
        lines += [f"| `{name}/{file.name}` | {summary(file)} |" for file in files]
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with its table written anew."""
    return re.sub(
        r"(<!-- packages -->\n).*?(<!-- end -->)", lambda m: m[1] + table() + "\n" + m[2], text, flags=re.DOTALL
    )


def main() -> None:
    """Write the page and its picture, or say whether they are stale."""
    old = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        stale = page(old) != old or not PICTURE.exists() or arrows_drawn(PICTURE) != drawn()
        sys.exit("docs/architecture.md is stale: python docs/architecture.py" if stale else 0)
    PAGE.write_text(page(old), encoding="utf-8")
    PICTURE.write_bytes(picture())


def drawn() -> int:
    """Return the number of arrows that the picture has today."""
    return sum(other not in ROWS[0] for _, other in arrows())


def arrows_drawn(file: Path) -> int:
    """Return the number of arrows in a picture; fonts and versions of matplotlib change the rest."""
    return len(re.findall(r'<path d="[^"]*" style="fill: none; stroke: #8fa3b5', file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
