"""The site builds with strict links, offline; the tutorial's code runs as it is written."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: pip install -e '.[docs]'")
def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/tutorial/index.html").read_text(encoding="utf-8")
    assert "From a linear probe to phases" in page
    assert "fonts.googleapis.com" not in page


def test_the_tutorials_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks in order, in one namespace."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    exec("\n".join(blocks), {"__name__": "tutorial"})
    printed = capsys.readouterr().out.splitlines()

    assert printed[0] == "<AppliedPlan 'linear_probe' on test_resnet: 45 tensors frozen, 2 trained>"
    assert printed[1] == "held: 90 frozen tensors and buffers are bit-identical"
    assert printed[-1] == "epoch 1: phase all"
