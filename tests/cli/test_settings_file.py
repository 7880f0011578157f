"""``--settings FILE``: options from a file, and more arms by ``--plan``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from freezeplan import cli
from freezeplan.errors import PlanError
from freezeplan.voc_vgg16 import command
from freezeplan.voc_vgg16.arms import load_arms


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command hands on, instead of training."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(command, "voc_vgg16", lambda **given: found.update(given))
    return found


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["freezeplan", "run", "voc_vgg16", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "epochs: 5\nbatch-size: 8\narm: [scratch, same_lr]\nseed: 3\ncache: false\nout: results\n"),
        (
            "run.toml",
            'epochs = 5\nbatch_size = 8\narm = ["scratch", "same_lr"]\nseed = 3\ncache = false\nout = "results"\n',
        ),
    ],
)
def test_a_file_gives_options_and_what_is_typed_wins(
    name: str, text: str, taken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text)
    assert call(monkeypatch, "--epochs", "7", "--settings", str(tmp_path / name)) == 0

    assert (taken["epochs"], taken["batch_size"], taken["seed"]) == (7, 8, [3])
    assert (taken["arm"], taken["cache"], taken["out"]) == (["scratch", "same_lr"], False, Path("results"))
    assert taken["lr"] is None


def test_mistakes_are_said_with_their_place(
    taken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epoch: 5\nbatch-size: many\noptimizer: rmsprp\nlabel: 3\n")
    assert call(monkeypatch, "--settings", str(file)) == 1

    said = " ".join(capsys.readouterr().err.split())
    assert f"{file}:1:1: no option is called 'epoch'" in said
    assert "did you mean 'epochs'" in said
    assert (
        f"{file}:2:13: batch-size: should be a valid integer, unable to parse string as an integer, found 'many'"
        in said
    )
    assert (
        f"{file}:3:12: optimizer: 'rmsprp' is not one of 'rmsprop-tf1', 'rmsprop', 'adamw', 'sgd'; "
        "did you mean 'rmsprop'" in said
    )
    assert f"{file}:4:8: label: '3' is not one of 'largest', 'first'" in said
    assert not taken


@pytest.mark.parametrize("text", ["- epochs\n", "5\n"])
def test_a_file_that_holds_no_options(
    text: str,
    taken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text(text)

    assert call(monkeypatch, "--settings", str(tmp_path / "run.yaml")) == 1
    assert "expected options, such as epochs: 5" in capsys.readouterr().err


def test_plans_are_more_arms(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nrules:\n  - match: .*\n    lr_mult: 0.5\n")

    assert list(load_arms(["scratch"], [file, "linear_probe"])) == ["scratch", "mine", "linear_probe"]


def test_two_arms_of_one_name_are_refused() -> None:
    with pytest.raises(PlanError) as raised:
        load_arms(["scratch"], ["voc_vgg16/scratch"])

    assert str(raised.value) == ("voc_vgg16/scratch: two arms would be called 'scratch'\n  give the file another name")
