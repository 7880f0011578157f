"""Photos that a colour tells apart, as class folders."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}


def coloured(colour: tuple[int, int, int], number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 32), tuple(min(255, value + number) for value in colour)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[[tuple[int, int, int], int], bytes]:
    """A PNG of one colour; each number gives another one that is nearly the same."""
    return coloured


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Three classes, twelve images each; two reds are called blue, so that nothing is perfect."""
    folder = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(12):
            shown = COLOURS["red"] if name == "blue" and number > 9 else colour
            (folder / name / f"{number}.png").write_bytes(coloured(shown, number))
    return folder
