"""Packages of other tools, which tests compare with."""

from __future__ import annotations

import warnings

import pytest


def peer(name: str):
    """The real package, or a skip that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'freezeplan[peers]'")
