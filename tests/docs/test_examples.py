"""The examples run as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from freezeplan import load_plan

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def run(*arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other tests, two threads wait for each other
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_plan_in_a_loop_of_your_own_holds() -> None:
    """examples/own_loop.py trains, and ends with the proof."""
    assert run("examples/own_loop.py").splitlines()[-1] == "held: 90 frozen tensors and buffers are bit-identical"


def test_the_example_plan_is_valid() -> None:
    """examples/low_conv_lr.yaml is the plan that the README shows."""
    plan = load_plan(ROOT / "examples/low_conv_lr.yaml")

    assert [(rule.match, rule.lr_mult) for rule in plan.rules] == [(("features",), 0.2), ((".*",), 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="drawn"),
        pytest.param({"--data": "data/fruit3_voc.tar"}, id="photos", marks=pytest.mark.data),
        pytest.param(
            {"--data": "data/fruit3_voc.tar", "--weights": "weights/tf_efficientnet_lite0.safetensors"},
            id="photos-and-weights",
            marks=pytest.mark.data,
        ),
    ],
)
def test_a_detectors_first_stages_stay(files: dict[str, str]) -> None:
    """examples/detection.py on shapes that it draws, on real photos, and with real weights."""
    for file in files.values():
        if not (SHARED / file).exists():
            pytest.skip(f"needs {file}, which does not come with freezeplan")
    options = [word for option, file in files.items() for word in (option, str(SHARED / file))]
    *_, losses, held = run("examples/detection.py", *options).splitlines()
    first, last = (float(words.split()[-1]) for words in losses.split(", "))

    assert last < first
    assert held == "held: 90 frozen tensors and buffers are bit-identical"


@pytest.mark.slow
def test_a_grey_model_gives_what_the_one_for_colour_does() -> None:
    """examples/grey.py: the same features; then stem, norms and head learn."""
    features, _, loss, held = run("examples/grey.py").splitlines()

    assert float(features.split()[-1]) < 1e-4
    first, last = (float(number) for number in loss.removeprefix("loss ").split(" -> "))
    assert last < first / 2
    assert held.startswith("held: ")


@pytest.mark.slow
def test_a_regression_finds_the_disc() -> None:
    """examples/regression.py is better than the mean, on discs that it has not seen."""
    _, distances, held = run("examples/regression.py").splitlines()
    error, mean = (float(part.split()[-1 if "mean" in part else 5]) for part in distances.split(", by "))

    assert error < 0.7 * mean
    assert held.startswith("held: ")


@pytest.mark.slow
def test_one_plan_on_four_architectures() -> None:
    """examples/architectures.py; what each freezes is in the documentation of the preset."""
    first, *lines = run("examples/architectures.py").splitlines()

    assert first.split() == ["frozen_stages_2", "frozen", "trained", "frozen", "up", "to"]
    assert [line.split()[0] for line in lines] == ["vgg16", "resnet50", "vit_base_patch16_224", "convnext_tiny"]
    assert lines[0].split()[1:] == ["260,160", "134,082,324", "features.7.bias"]


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs() -> None:
    """benchmarks/step.py prints all ways; how fast they are is not a test."""
    printed = run("benchmarks/step.py", "--model", "test_resnet", "--image-size", "32", "--rounds", "2")

    assert [line.split("  ")[0] for line in printed.splitlines()[2:] if line] == [
        "everything trained",
        "head in the optimizer",
        "requires_grad=False",
        "timm.utils.freeze",
        "Lightning's freeze",
        "plan",
        "plan, kept features",
    ]
