"""Faults put into a training on purpose: each is caught and named by its cause, and a clean training says nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.optim import lr_scheduler

DOCS = Path(__file__).parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("proof", DOCS / "proof.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["proof"] = module  # its dataclass looks its module up
    spec.loader.exec_module(module)
    return module


proof = load()


@pytest.fixture
def one_thread():
    """Models this small are slower in several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SCHEDULERS = {
    "torch": lambda run: lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=10),
    "timm": lambda run: CosineLRScheduler(run.optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.01),
    "any": lambda run: lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.1, total_steps=10),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("model", sorted({*proof.MODELS, *proof.WITH_NORM}))
def test_a_clean_run_says_nothing(one_thread, model, kind):
    """The same training without a fault, in each of the three ways to multiply rates, with a scheduler for it."""
    run = proof.Run(model, scheduler=kind)
    if kind == "any":
        run.live.attach(run.optimizer)
    scheduler = SCHEDULERS[kind](run)

    assert run.said(lambda _: scheduler.step(1) if kind == "timm" else scheduler.step(), late=False) == ""


def test_the_page_is_of_these_faults():
    """``docs/proof.md`` has a row for each fault in its order, each named by its cause on three architectures."""
    page = (DOCS / "proof.md").read_text(encoding="utf-8")
    table = page[page.index("| fault |") :].splitlines()
    rows = [line.split(" | ") for line in table if line.startswith("| ")][2:]

    assert [row[0].removeprefix("| ") for row in rows] == [fault.title for fault in proof.FAULTS]
    assert [row[-1] for row in rows if row[-1] != "3 of 3 |"] == []
    assert [fault.title for fault, row in zip(proof.FAULTS, rows, strict=True) if fault.cause not in row[2]] == []
    assert "says nothing on 4 of 4 models" in page


@pytest.mark.slow
def test_the_page_says_what_is_said(one_thread):
    """``python docs/proof.py`` would change nothing; amounts, which depend on the machine's arithmetic, aside."""

    def words(text):
        return [word for word in text.split() if not any(sign.isdigit() for sign in word)]

    assert words(proof.page()) == words((DOCS / "proof.md").read_text(encoding="utf-8"))
