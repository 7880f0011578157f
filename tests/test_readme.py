"""What the README shows is what the commands print, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from freezeplan import apply_plan, cli, load_plan
from freezeplan.errors import FreezePlanError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
TYPO = "version: 1\nrules:\n  - {match: featuers, frozen: true}\n  - {match: .*, lr_mult: 1}\n"


def printed(command: str) -> str:
    """What follows a command in the README, up to the next one."""
    (block,) = (text for kind, text in BLOCKS if kind == "console" and f"$ {command}\n" in text)
    return block.partition(f"$ {command}\n")[2].partition("\n$ ")[0].rstrip()


def test_show_prints_what_the_readme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree, counts, groups and rules of the first example."""
    command = "freezeplan show examples/low_conv_lr.yaml vgg16 --num-classes 20 --lr 5e-4"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(cli.app, command.split()[1:])

    assert "\n".join(line.rstrip() for line in result.stdout.splitlines()) == printed(command)


def test_a_mistake_looks_as_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a misspelt module."""
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text(TYPO)
    result = CliRunner().invoke(cli.app, ["check", "typo.yaml", "vgg16"])

    assert isinstance(result.exception, FreezePlanError)
    assert f"error: {result.exception}" == printed("freezeplan check typo.yaml vgg16")


def test_the_example_plan_is_the_one_in_the_readme(tmp_path: Path) -> None:
    """examples/low_conv_lr.yaml says what the README's plan says."""
    (plan,) = (text for kind, text in BLOCKS if kind == "yaml")
    (tmp_path / "plan.yaml").write_text(plan)

    assert load_plan(tmp_path / "plan.yaml") == load_plan(ROOT / "examples/low_conv_lr.yaml")


def test_the_lines_for_your_own_code_run() -> None:
    """The block under 'In your code', as written."""
    (block,) = (text for kind, text in BLOCKS if kind == "python" and "applied.seal()" in text)
    model = timm.create_model("test_resnet", num_classes=3)
    exec(block, {"model": model, "torch": torch, "apply_plan": apply_plan})

    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_readme_says_how_to_start_and_how_to_test() -> None:
    """The first screen runs the sample; the tests' command is the one that CI runs."""
    first = README.splitlines()[:12]

    assert "$ pip install '.[run]' && freezeplan run voc_vgg16" in first
    assert "$ pip install -e '.[dev]' && pytest -n 2 --dist worksteal" in README
    assert len(README.splitlines()) <= 150
