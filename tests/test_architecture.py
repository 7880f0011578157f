"""The directions between packages hold, docs/architecture.md is as the code is, and no file is long."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter comes with the extra dev")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "freezeplan"
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


def lint(folder: Path) -> tuple[int, str]:
    """Run ``lint-imports`` in a folder with a package and a pyproject.toml."""
    env = {"PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "200", "PATH": ""}
    done = subprocess.run(LINT, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, " ".join(done.stdout.split())


def test_packages_import_only_what_stands_below_them():
    code, text = lint(ROOT)

    assert (code, "0 broken" in text) == (0, True), text


TURNED = [
    ("plan/schema.py", "from freezeplan.apply import freeze", "plan", "apply"),
    ("resolve/hints.py", "import torch", "resolve", "torch"),
    ("apply/freeze.py", "import timm", "apply", "timm"),
    ("cache/store.py", "from freezeplan.proof import seal", "cache", "proof"),
    ("training/feed.py", "import freezeplan.voc_vgg16.command", "training", "voc_vgg16"),
    ("integrations/plans.py", "import freezeplan.apply.freeze", "integrations", "apply"),
]


@pytest.mark.parametrize(
    ("file", "line", "importer", "imported"),
    [
        pytest.param(*turned, id=turned[0], marks=[pytest.mark.slow] if turned in TURNED[3:] else [])
        for turned in TURNED
    ],
)
def test_an_import_that_is_turned_round_is_found(file: str, line: str, importer: str, imported: str, tmp_path: Path):
    shutil.copytree(PACKAGE, tmp_path / "freezeplan", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "freezeplan" / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")

    code, text = lint(tmp_path)

    inside = imported if imported in ("torch", "timm") else f"freezeplan.{imported}"
    said = f"freezeplan.{importer} is not allowed to import {inside}"
    assert (code, said in text) == (1, True), text


def test_the_page_and_its_picture_are_as_the_code_is():
    done = subprocess.run(
        [sys.executable, "docs/architecture.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_long_and_each_says_what_it_is_for(file: Path):
    text = file.read_text(encoding="utf-8")

    assert len(text.splitlines()) <= 400
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_each_package_says_what_it_imports_and_where_to_begin():
    packages = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    said = {
        path.name: ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8"))) for path in packages
    }

    assert len(said) == 13
    for name, text in said.items():
        assert text is not None, name
        assert re.search(r"Import|import", text), name
        assert "Begin with ``" in text, name
