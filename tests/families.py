"""One model of each architecture module of timm, as the tests take them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm

ZOO: dict[str, dict[str, Any]] = {
    family: entry
    for family, entry in json.loads(Path(__file__).with_name("zoo.json").read_text()).items()
    if timm.is_model(entry["model"])
}
"""Those that an older timm lacks are left out."""
QUICK = frozenset(list(ZOO)[::4])
"""Every fourth; the others are slow tests, where each takes a model as a whole."""


def each(families: Iterable[str] = ZOO) -> list[Any]:
    """Return the families as parameters of a test."""
    return [pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in families]
