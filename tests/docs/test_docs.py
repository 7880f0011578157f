"""The site builds with strict links, offline; what its blocks say is in test_blocks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: pip install -e '.[docs]'")
def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/tutorial/index.html").read_text(encoding="utf-8")
    assert "From a linear probe to phases" in page
    assert "pictures/head_then_all.svg" in page
    assert "fonts.googleapis.com" not in page
