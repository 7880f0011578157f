"""Benchmarks that need a GPU run small on the CPU; no time is asserted."""

from __future__ import annotations

import importlib.util
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


def record(data: str, errors: dict[str, float], suggested: str, lr: float = 1e-3) -> dict:
    """A setting of ``benchmarks/suggest.py`` whose presets took a second at each of two rates, one of them bad."""
    presets = (
        "linear_probe",
        "surgical_last",
        "frozen_stages_2",
        "discriminative",
        "llrd",
        "norm_and_head",
        "lp_ft",
        "full",
    )
    all_errors = {plan: errors.get(plan, 0.9) for plan in presets}
    trials = [
        {"plan": plan, "lr": rate, "val_error": error + (rate == 3e-3) * 0.05, "seconds": 1.0}
        for plan, error in all_errors.items()
        for rate in (1e-3, 3e-3)
    ]
    ranking = [{"plan": plan, "val_error": error, "lr": 1e-3} for plan, error in all_errors.items()]
    return {
        "data": data, "shift": "as it is", "seed": 0, "images": [4, 4], "all_seconds": 16.0, "ranking": ranking,
        "trials": trials, "suggest_seconds": 4.0,
        "suggested": {"plan": suggested, "lr": lr, "ranking": [{"plan": suggested, "lr": lr}]},
    }  # fmt: skip


@pytest.fixture
def suggest_benchmark(monkeypatch, tmp_path):
    """Run ``benchmarks/suggest.py`` in this process, which saves the import of torch; each setting is looked up."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("suggest_benchmark", ROOT / "benchmarks" / "suggest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: str, records: dict[str, dict]) -> None:
        monkeypatch.setattr(module, "run", lambda data, *_: records[data.name])
        monkeypatch.setattr("sys.argv", ["suggest.py", *words, "--json", str(tmp_path / "suggest.json")])
        module.main()

    return run


def test_the_regret_of_suggestions_is_counted_against_the_best_preset(suggest_benchmark, capsys):
    """Nothing is computed where the results are there; the static preset is chosen on the other data sets alone."""
    records = {
        "one_voc.tar": record("one", {"full": 0.1, "llrd": 0.2, "linear_probe": 0.3}, "llrd"),
        "two_voc.tar": record("two", {"full": 0.4, "llrd": 0.2, "linear_probe": 0.3}, "llrd", lr=3e-3),
    }
    words = ("one_voc.tar", "two_voc.tar", "--shift", "as it is")
    suggest_benchmark(*words, records=records)
    first = capsys.readouterr().out

    suggest_benchmark(*words, records={})

    assert capsys.readouterr().out == first
    with pytest.raises(KeyError):
        suggest_benchmark(*words, "--again", records={})
    with pytest.raises(SystemExit, match="has other options"):
        suggest_benchmark(*words, "--epochs", "9", records={})
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    assert table["one, as it is"][-3:] == ["llrd, 0.001", "20.0", "4 of 16"]
    assert table["two, as it is"][-3:] == ["llrd, 0.003", "25.0", "4 of 16"]
    assert table["suggest"] == ["2", "7.5", "3.5", "10.0", "0", "25 %"]
    assert table["always full"] == ["2", "10.0", "14.1", "20.0", "1", "12 %", "-2.5 (-15.0 to +10.0)"]
    assert table["always linear_probe"] == ["2", "15.0", "7.1", "20.0", "0", "12 %", "-7.5 (-10.0 to -5.0)"]
    assert table["best static preset"] == ["2", "15.0", "7.1", "20.0", "0", "12 %", "-7.5 (-15.0 to +0.0)"]
