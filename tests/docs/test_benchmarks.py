"""Benchmarks that need a GPU run small on the CPU; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_small_on_the_cpu(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "gpu.json").read_text()) if done.returncode == 0 else {}

    assert done.returncode == 0, done.stderr
    assert list(found["arms"]) == ["scratch", "frozen_convs", "low_conv_lr", "same_lr"]
    assert all(value > 0 for value in (*found["seconds"].values(), *found["goals"].values()))
    assert done.stdout.count("met") + done.stdout.count("MISSED") == 4
