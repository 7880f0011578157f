"""The examples run as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from freezeplan import load_plan

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_in_a_loop_of_your_own_holds() -> None:
    """examples/own_loop.py trains, and ends with the proof."""
    assert run("examples/own_loop.py").splitlines()[-1] == "held: 90 frozen tensors and buffers are bit-identical"


def test_the_example_plan_is_valid() -> None:
    """examples/low_conv_lr.yaml is the plan that the README shows."""
    plan = load_plan(ROOT / "examples/low_conv_lr.yaml")

    assert [(rule.match, rule.lr_mult) for rule in plan.rules] == [(("features",), 0.2), ((".*",), 1.0)]


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs() -> None:
    """benchmarks/step.py prints three ways; how fast they are is not a test."""
    printed = run("benchmarks/step.py", "--model", "test_resnet", "--image-size", "32", "--rounds", "2")

    assert [line.split("  ")[0] for line in printed.splitlines()[2:]] == ["full", "optimizer only", "plan"]
