"""One model of each architecture module of timm, as the tests take them."""

from __future__ import annotations

import json
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
QUICK = frozenset(list(ZOO)[::12]) - {"pnasnet"}
"""Every twelfth belongs to the quick suite, but for a slow one."""
FAMILIES = [pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow]) for family in ZOO]
"""All of them, as parameters of a test."""
