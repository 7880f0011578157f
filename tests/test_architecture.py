"""A module imports only what stands above it; timm, rich and matplotlib each have their one place in the core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import freezeplan

PACKAGE = Path(freezeplan.__file__).parent

CORE = [
    "errors",
    "source",
    "patterns",
    "plan",
    "toml_places",
    "catalogue",
    "load",
    "dump",
    "description",
    "select",
    "hints",
    "resolution",
    "resolve",
    "names",
    "stages",
    "zoo",
    "sharded",
    "apply",
    "rates",
    "phases",
    "evidence",
    "statefile",
    "guard",
    "schedules",
    "faults",
    "steps",
    "delta",
    "prefix",
    "replay",
    "store",
    "cache",
    "facade",
    "forecast",
    "report",
    "explain",
    "difference",
    "infer",
    "render",
    "picture",
]
"""The core, in the order in which it can be read: each module imports only what stands above it."""

ORDER = [
    *CORE,
    "importers",
    "integrations",
    "experiment",
    "proof_commands",
    "settings_file",
    "completion",
    "cli",
    "__main__",
]

ONLY = {"timm": {"zoo"}, "rich": {"render"}, "matplotlib": {"picture"}, "typer": set()}
"""Package -> the modules of the core that may import it."""

NO_TORCH = {
    "patterns",
    "store",
    "resolution",
    "dump",
    "picture",
    "toml_places",
    "catalogue",
    "explain",
    "difference",
    "stages",
    "errors",
    "source",
    "plan",
    "load",
    "description",
    "select",
    "hints",
    "resolve",
    "report",
    "render",
}


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
    """A new module gets a place in the order."""
    assert {layer_of(file) for file in MODULES} <= set(ORDER)
    assert {f"{name}.py" for name in CORE} <= {file.name for file in PACKAGE.iterdir()}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(file):
    """The arrows between modules point one way; the runner uses the core, never the other way round."""
    layer = layer_of(file)
    above = set(ORDER[: ORDER.index(layer)]) | ({layer} if layer in ("experiment", "integrations") else set())

    assert layers(file.read_text(encoding="utf-8")) - above == set()


@pytest.mark.parametrize("name", CORE)
def test_each_package_has_its_one_place_in_the_core(name):
    """In the core only zoo imports timm, and only render imports rich, only picture matplotlib."""
    found = packages((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))

    assert [package for package, homes in ONLY.items() if package in found and name not in homes] == []
    assert name not in NO_TORCH or "torch" not in found


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
