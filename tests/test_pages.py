"""The computed pages of the documentation are those that their command writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["presets.md", "zoo.md"])
def test_a_computed_page_is_up_to_date(name):
    """``python docs/pages.py`` would change nothing."""
    pages = load().PAGES

    assert sorted(pages) == ["presets.md", "zoo.md"]
    assert pages[name]() == (DOCS / name).read_text(encoding="utf-8")
