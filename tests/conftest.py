"""Shared by all tests: goldens that regenerate with ``--update-golden``, and a quiet, deterministic Hypothesis."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an unreachable hub costs a minute of retries; read when it is imported

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: a thread each, or they wait for each other's threads
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("freezeplan", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("quick", settings.get_profile("freezeplan"), max_examples=15)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; review them as text")


SECONDS_TO_IMPORT = ("huggingface", "lightning", "hosts", "hosts_processes")
"""Ends of the names of files that import packages which take seconds to import; their tests are slow."""


class WithoutSlowTests:
    """What ``-m "not slow"`` does besides: packages that take seconds to import are not imported."""

    def pytest_ignore_collect(self, collection_path):
        heavy = collection_path.parent.name == "integrations" and collection_path.stem.endswith(SECONDS_TO_IMPORT)
        return True if heavy else None


def pytest_configure(config):
    """A plugin of its own, as the hooks of this file see no other folder than this one; and fewer examples."""
    quick = config.option.markexpr == "not slow"
    settings.load_profile("quick" if quick else "freezeplan")
    if quick:
        config.pluginmanager.register(WithoutSlowTests())


def pytest_collection_modifyitems(config, items):
    """Leave out what takes a quarter of an hour, unless it is asked for."""
    if "contained" in (config.option.markexpr or ""):
        return
    left = [item for item in items if item.get_closest_marker("contained")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("contained")]


def pytest_collection_finish():
    """What the imports made lives as long as the process: the garbage collector need not walk it in each test."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def forked():
    """Processes that begin at once: they are forked from one that has imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["freezeplan.voc_vgg16.command", "torchmetrics.functional.classification", "matplotlib.figure", "jinja2"]
    )
    return context


@pytest.fixture
def toy():
    """A body with batch norm and dropout, and a head; the same numbers in each test."""
    import torch
    from toy import Toy

    torch.manual_seed(0)
    return Toy()


@pytest.fixture(scope="session")
def plain():
    """The loop that every trainer is compared with: images, labels, and a training on them in their order."""
    import torch

    generator = torch.Generator().manual_seed(7)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 3, (24,), generator=generator)

    class Plain:
        """24 images of three classes, 8 a batch."""

        data = (images, labels)
        scores = (0.5, 0.6, 0.6, 0.6, 0.7)
        """What a validation gives after each epoch, for phases that end at a plateau."""

        @staticmethod
        def train(model, live, optimizer, epochs, *, after_step=lambda: None, after_epoch=lambda: None):
            for epoch in epochs:
                metrics = {"score": Plain.scores[epoch - 1]} if epoch else {}
                live.step(epoch=epoch, metrics=metrics)
                model.train()
                for batch in torch.arange(24).split(8):
                    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    after_step()
                after_epoch()

        @staticmethod
        def difference(one, two):
            """Largest absolute difference between two state dicts, in the weights' own units."""
            assert list(one) == list(two)
            return max(
                (a.double() - b.double()).abs().max().item() for a, b in zip(one.values(), two.values(), strict=True)
            )

    return Plain
