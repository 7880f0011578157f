"""A module imports only what stands above it in docs/architecture.md, and of the large packages those of its row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import freezeplan

PACKAGE = Path(freezeplan.__file__).parent

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def table(title):
    """The modules of a section's table in their order, each with its last cell as a set."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|(.*)\|$", section, flags=re.MULTILINE)
    return {name: set(re.findall(r"\w+", cells.rpartition("|")[2])) for name, cells in rows}


CORE = table("The core")
"""The core in the order in which it can be read: module -> which of ``WATCHED`` it imports."""
ORDER = [*CORE, *table("Around the core")]
WATCHED = {"torch", "timm", "rich", "matplotlib", "typer"}


def imports(source):
    """Every module that a source imports anywhere, with the names taken from it: ``a.b`` and ``a.b.name``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layers(source):
    """The parts of freezeplan that a source imports."""
    parts = (name.split(".") for name in imports(source))
    return {name[1] for name in parts if name[0] == "freezeplan" and name[1:] and name[1] in ORDER}


def packages(source):
    return {name.partition(".")[0] for name in imports(source)}


MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def layer_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_its_place():
    """A new module gets a row, and one that is gone has none."""
    assert {layer_of(file) for file in MODULES} | {"presets"} == set(ORDER)
    assert len(ORDER) > 40


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(file):
    """The arrows between modules point one way; the runner uses the core, never the other way round."""
    layer = layer_of(file)
    own = {layer} & {"experiment", "importers", "integrations"}
    above = set(ORDER[: ORDER.index(layer)]) | own

    assert layers(file.read_text(encoding="utf-8")) - above == set()


@pytest.mark.parametrize("name", CORE)
def test_a_module_of_the_core_imports_the_packages_of_its_row(name):
    """No more, so that much of it needs no torch, and no less, so that the page is true."""
    assert packages((PACKAGE / f"{name}.py").read_text(encoding="utf-8")) & WATCHED == CORE[name]


def test_timm_rich_and_matplotlib_have_one_place_each():
    homes = {package: [name for name, found in CORE.items() if package in found] for package in WATCHED - {"torch"}}

    assert homes == {"timm": ["timm_facts", "create"], "rich": ["render"], "matplotlib": ["picture"], "typer": []}


def test_integrations_see_the_facade_alone_and_nobody_sees_them():
    """Each is thin: it names the facade and the errors, and stands between nothing."""
    inside = [file for file in MODULES if layer_of(file) == "integrations"]
    outside = [file for file in MODULES if layer_of(file) != "integrations"]

    assert {part for file in inside for part in layers(file.read_text())} == {"errors", "facade", "integrations"}
    assert all("integrations" not in layers(file.read_text()) for file in outside)
    assert all(len(file.read_text().splitlines()) < 80 for file in inside)


SEEN = [
    pytest.param("from freezeplan import render, Plan", {"render"}, {"freezeplan"}, id="from-the-package"),
    pytest.param("import freezeplan.cli as c", {"cli"}, {"freezeplan"}, id="with-an-alias"),
    pytest.param("def f():\n    from freezeplan.experiment.voc import g", {"experiment"}, {"freezeplan"}, id="inside"),
    pytest.param("from timm.optim import a\nimport rich.table", set(), {"timm", "rich"}, id="others"),
]


@pytest.mark.parametrize(("source", "found", "outside"), SEEN)
def test_the_check_of_arrows_can_fail(source, found, outside):
    """The checks above see an import wherever it stands."""
    assert (layers(source), packages(source)) == (found, outside)
