"""What a run says while it lasts: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from freezeplan.report import terminal as render
from freezeplan.training.train import Epoch
from freezeplan.voc_vgg16.screen import QUIET, Screen


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, no_color=True)


def said(there: Console) -> str:
    assert isinstance(there.file, io.StringIO)
    return there.file.getvalue()


def epoch(number: int) -> Epoch:
    return Epoch(number, train_loss=0.5, val_top1_error=0.25, train_seconds=1, eval_seconds=1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_where_one_is_due() -> None:
    """Of reading, features and epochs, half a minute after the last one; never more."""
    there, clock = console(terminal=False), Clock()
    with Screen(there, 20, clock=clock) as screen:
        for done in range(1, 101):
            clock.now += 1
            screen.decoded(done, 100)
        screen.started("scratch", 0, 2_000)
        clock.now += QUIET
        screen.kept(64, 128)
        screen.epoch(epoch(1))
        clock.now += QUIET / 2
        screen.epoch(epoch(2))
        clock.now += QUIET / 2
        screen.epoch(epoch(3))

    assert said(there).splitlines() == [
        "reading images 30/100",
        "reading images 60/100",
        "reading images 90/100",
        "scratch: features 64/128",
        "scratch, seed 0: epoch 3 of 20, training loss 0.500, validation top-1 error 25.0 %",
    ]


def test_a_terminal_has_a_bar_from_the_first_moment() -> None:
    """Weights, images, features, epochs; and no lines."""
    there, clock = console(terminal=True), Clock()
    shown: list[str] = []

    def look(screen: Screen) -> None:
        clock.now += 2 * QUIET
        with there.capture() as capture:
            there.print(screen._view())
        shown.append(capture.get())

    with Screen(there, 3, clock=clock) as screen:
        look(screen)
        screen.decoded(7, 10)
        look(screen)
        screen.started("scratch", 0, 30)
        screen.kept(5, 10)
        look(screen)
        screen.batch(10, torch.tensor(0.25))
        screen.epoch(epoch(1))
        look(screen)

    words = ["reading weights", "reading images", "scratch: features 5/10", "scratch, seed 0"]
    assert [word in text for word, text in zip(words, shown, strict=True)] == [True] * 4
    assert "loss 0.250" in shown[3]
    assert "1/3" in shown[3]
    assert "epoch 1 of 3" not in said(there)


@pytest.mark.parametrize(("terminal", "expected"), [(True, True), (False, False)])
def test_what_takes_a_while_is_said_on_a_terminal_alone(terminal: bool, expected: bool, monkeypatch: Any) -> None:
    """On stderr, and gone afterwards."""
    there = console(terminal=terminal)
    monkeypatch.setattr(render, "stderr", lambda: there)
    with render.waiting("comparing weights"):
        pass

    assert ("comparing weights" in said(there)) is expected
    assert terminal or not said(there)
