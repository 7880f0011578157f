"""Shared by all tests: goldens that regenerate with ``--update-golden``, and a quiet, deterministic Hypothesis."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an unreachable hub costs a minute of retries; read when it is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: a thread each, or they wait for each other's threads
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("freezeplan", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("freezeplan")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; review them as text")


@pytest.fixture(scope="session")
def golden(request):
    """Compare a text with a file beside the tests, or write that file."""

    def compare(file: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

        assert text == file.read_text(encoding="utf-8")

    return compare


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Keep features of tests out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def a_thread_a_worker():
    """Torch may have been imported before the environment was set."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
