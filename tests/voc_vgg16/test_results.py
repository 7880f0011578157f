"""The files of a run: their shape, and that they are whole or not there."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from freezeplan.errors import OutputError
from freezeplan.training.measures import Measured
from freezeplan.training.settings import Settings
from freezeplan.training.train import Epoch, Run
from freezeplan.training.voc import VocData
from freezeplan.voc_vgg16.arms import ARMS, Outcome, load_arms
from freezeplan.voc_vgg16.results import FILES, check_free, summarise, to_csv, to_png, to_summary, write_results
from freezeplan.voc_vgg16.statistics import rates_too_high

SETTINGS = Settings(epochs=2, batch_size=8, image_size=16)
ASKED = {"data": "toy.tar", "download": False, "weights": "random", "plans": [], "processes": 1}
VAL = tuple((f"JPEGImages/{number}.jpg", number % 2) for number in range(2, 8))


def run(seed: int, error: float, *, loss: float = 0.5, learned: bool = True) -> Run:
    epochs = tuple(Epoch(number, loss / number, error, 1.5, 0.5) for number in (1, 2))
    measured = Measured(error, None, error / 2, (0.5, None), error, error * 0.9)
    return Run(seed, epochs, measured, error / 4, learned, 4.0, predicted=(0, 1, 1, 0, 1, seed))


def results(**changes: Any) -> dict[str, Any]:
    plans = load_arms(ARMS)
    runs = {arm: (run(0, 0.5), run(1, 0.3)) for arm in plans} | changes
    outcome = Outcome(plans, runs, train_images=10, val_images=6, skipped=("JPEGImages/1.jpg",), val=VAL)
    data = VocData("toy", ("cat", "dog"), (), (), None)  # type: ignore[arg-type]
    return summarise(outcome, data, SETTINGS, model="vgg16", weights="random", sample=False, asked=ASKED)


def test_results_have_the_agreed_shape() -> None:
    found = results()

    assert set(found) - {"pairs"} == {
        "versions", "asked", "val", "data", "model", "weights", "label", "settings", "published", "arms"
    }  # fmt: skip
    assert found["asked"] == ASKED
    assert found["data"] == {
        "name": "toy",
        "train": 10,
        "val": 6,
        "classes": ["cat", "dog"],
        "sample": False,
        "skipped": ["JPEGImages/1.jpg"],
    }
    arm = found["arms"]["frozen_convs"]
    assert arm["plan"]["rules"][2] == {"match": [".*"], "frozen": True} or arm["plan"]["rules"][2]["frozen"] is True
    assert {key: arm[key] for key in ("top1_error", "top5_error", "any_error", "train_error", "learned")} == {
        "top1_error": pytest.approx(0.4),
        "top5_error": None,
        "any_error": pytest.approx(0.2),
        "train_error": pytest.approx(0.1),
        "learned": True,
    }
    deviation = 0.2 / 2**0.5
    assert arm["deviation"] == {
        "top1_error": pytest.approx(deviation),
        "top5_error": None,
        "largest_error": pytest.approx(deviation),
        "first_error": pytest.approx(0.9 * deviation),
        "any_error": pytest.approx(deviation / 2),
        "train_error": pytest.approx(deviation / 4),
    }
    assert arm["average_precision"] == {"cat": 0.5, "dog": None}
    assert [one["seed"] for one in arm["runs"]] == [0, 1]
    assert arm["runs"][0] == {
        "seed": 0,
        "top1_error": 0.5,
        "top5_error": None,
        "largest_error": 0.5,
        "first_error": 0.45,
        "any_error": 0.25,
        "train_error": 0.125,
        "learned": True,
        "mean_average_precision": 0.5,
        "average_precision": {"cat": 0.5, "dog": None},
        "predicted": [0, 1, 1, 0, 1, 0],
        "seconds": 4.0,
        "features": 0,
        "features_computed": 0,
        "features_seconds": 0.0,
        "features_epochs": 0,
        "features_difference": 0.0,
        "graphed_steps": 0,
        "graph_reason": "",
        "epochs": [
            {"epoch": 1, "train_loss": 0.5, "val_top1_error": 0.5, "train_seconds": 1.5, "eval_seconds": 0.5},
            {"epoch": 2, "train_loss": 0.25, "val_top1_error": 0.5, "train_seconds": 1.5, "eval_seconds": 0.5},
        ],
    }


def test_the_published_figures_are_the_lectures() -> None:
    published = results()["published"]

    assert {arm: (published[arm]["top1_error"], published[arm]["top5_error"]) for arm in ARMS} == {
        "scratch": (0.309, 0.042),
        "frozen_convs": (0.191, 0.0179),
        "low_conv_lr": (0.204, 0.0208),
        "same_lr": (0.167, 0.0153),
    }


def test_a_loss_that_is_no_number_is_null_and_drawn(tmp_path: Path) -> None:
    found = results(scratch=(run(0, 0.5, loss=math.nan, learned=False),))

    write_results(tmp_path, found)

    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["scratch"]
    assert (arm["runs"][0]["epochs"][0]["train_loss"], arm["learned"]) == (None, False)


def test_the_table_has_one_row_an_arm_and_seed() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(results()))))

    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for arm in ARMS for seed in "01"]
    assert (rows[0]["top1_error"], rows[0]["top5_error"], rows[0]["epochs"]) == ("0.5", "", "2")


def test_the_summary_has_one_row_an_arm() -> None:
    rows = list(csv.DictReader(io.StringIO(to_summary(results(scratch=(run(0, 0.75, learned=False),))))))

    assert [row["arm"] for row in rows] == list(ARMS)
    scratch, frozen = rows[:2]
    assert (scratch["seeds"], scratch["top1_error_mean"], scratch["top1_error_deviation"]) == ("1", "0.75", "")
    assert (frozen["seeds"], frozen["top5_error_mean"], frozen["top5_error_deviation"]) == ("2", "", "")
    assert float(frozen["top1_error_mean"]) == pytest.approx(0.4)
    assert float(frozen["top1_error_deviation"]) == pytest.approx(0.2 / 2**0.5)
    assert (scratch["learned"], frozen["learned"]) == ("False", "True")


def test_differences_are_seed_by_seed_and_none_is_of_an_arm_that_did_not_learn() -> None:
    found = results(
        scratch=(run(0, 0.9, learned=False), run(1, 0.8)),
        frozen_convs=(run(0, 0.5), run(1, 0.25)),
        same_lr=(run(1, 0.75), run(2, 0.1)),
        low_conv_lr=(run(3, 0.1),),
    )["pairs"]

    pair = {(one["arm"], one["base"]): one for one in found}
    assert len(pair) == len(found) == 6
    assert all(pair[arm, "scratch"]["reason"] == "scratch did not learn" for arm in ARMS[1:])
    assert all(pair[arm, "scratch"]["mean"] is None for arm in ARMS[1:])
    assert pair["same_lr", "frozen_convs"] == {
        "arm": "same_lr", "base": "frozen_convs", "seeds": [1], "mean": 0.5, "deviation": None, "reason": None
    }  # fmt: skip
    assert pair["low_conv_lr", "frozen_convs"]["reason"] == "no seed in common"
    both = {(one["arm"], one["base"]): one for one in results()["pairs"]}["same_lr", "low_conv_lr"]
    assert (both["seeds"], both["mean"], both["deviation"]) == ([0, 1], 0, 0)


def test_the_curves_are_a_picture() -> None:
    picture = Image.open(io.BytesIO(to_png(results())))

    assert picture.format == "PNG"
    assert picture.width > picture.height > 400


def test_a_folder_that_holds_results_is_refused_unless_they_may_go(tmp_path: Path) -> None:
    write_results(tmp_path / "out", results())

    with pytest.raises(OutputError) as caught:
        check_free(tmp_path / "out", overwrite=False)

    assert str(caught.value) == (
        f"{tmp_path / 'out'}: already holds results.json, results.csv, summary.csv, curves.png\n"
        "  --overwrite replaces them, or give another folder with --out"
    )
    check_free(tmp_path / "out", overwrite=True)
    check_free(tmp_path / "new" / "folder", overwrite=False)
    check_free(tmp_path, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")

    with pytest.raises(OutputError) as caught:
        check_free(tmp_path / "out" / "here", overwrite=True)

    assert str(caught.value) == f"{tmp_path / 'out' / 'here'}: {tmp_path / 'out'} is a file, expected a folder"


@pytest.mark.parametrize("works", [0, *(pytest.param(works, marks=pytest.mark.slow) for works in range(1, len(FILES)))])
def test_a_full_disk_leaves_nothing_half_written(works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > works:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("freezeplan.voc_vgg16.results.os.fsync", full)

    with pytest.raises(OutputError) as caught:
        write_results(tmp_path, results())

    assert str(caught.value) == (
        f"{tmp_path}: results cannot be written: No space left on device\n"
        "  nothing half-written was left behind; the figures are above"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_results_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, results())
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("freezeplan.voc_vgg16.results.os.fsync", full)
    with pytest.raises(OutputError):
        write_results(tmp_path, results(scratch=(run(0, 0.9),)))

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def arm(errors: list[float], last: float | None, first: float = 2.0) -> dict[str, Any]:
    runs = [
        {"seed": seed, "train_error": error, "epochs": [{"train_loss": first}, {"train_loss": last}]}
        for seed, error in enumerate(errors)
    ]
    return {"runs": runs}


TOO_HIGH = "its rate is probably too high"
ABOVE = f"training error {{}} %, above frozen_convs' 2.0 %: {TOO_HIGH}"
NOT_FALLING = f"its training loss is not below that of its first epoch: {TOO_HIGH}"
ARMS_AND_LINES = [
    pytest.param({"low": arm([0.35], 0.9)}, [f"low: {ABOVE.format(35.0)}"], id="above"),
    pytest.param({"low": arm([0.01], 0.05)}, [], id="below"),
    pytest.param({"low": arm([0.021], 0.05)}, [], id="an-image-more-and-a-lower-loss"),
    pytest.param({"low": arm([0.35, 0.01], 0.9)}, [], id="one-seed-of-two"),
    pytest.param({"low": arm([0.35, 0.25], 0.9)}, [f"low: {ABOVE.format(30.0)}"], id="both-seeds"),
    pytest.param({"scratch": arm([0.9], 2.9)}, [], id="scratch"),
    pytest.param({"own": arm([0.01], 2.5)}, [f"own: {NOT_FALLING}"], id="not-falling"),
    pytest.param({"own": arm([0.01], None)}, [f"own: {NOT_FALLING}"], id="not-finite"),
]


@pytest.mark.parametrize(("arms", "lines"), ARMS_AND_LINES)
def test_an_arm_that_unlearns_is_named(arms: dict[str, Any], lines: list[str]) -> None:
    found = rates_too_high({"arms": {"frozen_convs": arm([0.02, 0.02], 0.1), **arms}})

    assert found == lines


def test_without_a_frozen_arm_nothing_is_compared() -> None:
    assert rates_too_high({"arms": {"same_lr": arm([0.9], 0.9)}}) == []
