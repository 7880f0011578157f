"""What ``compare`` and ``suggest`` say and leave behind where something is wrong, or nothing was learned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from freezeplan.cli import app
from freezeplan.report.terminal import print_table
from freezeplan.training.compare_report import COLUMNS
from freezeplan.training.ranking import Place, verdict
from freezeplan.training.suggest import decide
from freezeplan.training.weights import build, check_size

MODEL = "test_resnet"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of six images; one more image of the first class does not decode."""
    for name, colour in (("rose", (200, 0, 0)), ("tulip", (0, 0, 200))):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    return tmp_path / "photos"


def run(tmp_path: Path, photos: Path, *words: str, command: str = "compare"):
    fixed = ["--data", str(photos), "--epochs", "1", "--threads", "1", "--cache-dir", str(tmp_path / "cache")]
    plans = ["linear_probe"] if command == "compare" else []
    return CliRunner().invoke(app, [command, *plans, *fixed, *words])


def given(**changes: str) -> list[str]:
    options = {"model": MODEL, "weights": "random", "image-size": "32", **changes}
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("command", ["compare", "suggest"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "nosuch.safetensors"}, "no such file"),
        ({"model": "test_vit", "image-size": "33"}, "test_vit cannot take images of 33 x 33 pixels: Input height (33)"),
    ],
    ids=["weights", "size"],
)
def test_what_cannot_start_is_said_before_images_are_read(
    tmp_path: Path, photos: Path, command: str, changes: dict[str, str], message: str
) -> None:
    """Nothing is left behind, so the corrected command takes the same folder."""
    out = tmp_path / "out"
    (photos / "rose" / "broken.png").write_bytes(b"no image")
    found = run(tmp_path, photos, *given(**changes), "--out", str(out), command=command)

    assert found.exit_code == 1
    assert message in str(found.exception)
    assert not out.exists()


@pytest.mark.parametrize("command", ["compare", "suggest"])
def test_an_output_folder_that_is_a_file(tmp_path: Path, photos: Path, command: str) -> None:
    out = tmp_path / "plan.yaml"
    out.write_text("mine")
    for where, message in ((out, "is a file, expected a folder"), (out / "below", "cannot be written: Not a dir")):
        found = run(tmp_path, photos, *given(), "--out", str(where), command=command)

        assert found.exit_code == 1
        assert message in str(found.exception)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("command", ["compare", "suggest"])
def test_images_that_do_not_decode_are_named(tmp_path: Path, photos: Path, command: str) -> None:
    """The folder of a comparison that ended there is free, and with ``--skip-bad`` they are named and not counted."""
    out = tmp_path / "out"
    (photos / "rose" / "broken.png").write_bytes(b"no image")
    ended = run(tmp_path, photos, *given(), "--out", str(out), command=command)
    more = ["--lr", "0.01"] if command == "compare" else ["--budget", "1s"]
    done = run(tmp_path, photos, *given(), *more, "--skip-bad", "--out", str(out), command=command)

    assert ended.exit_code == 1
    assert done.exit_code == 0, done.exception
    assert re.search(r"left out +1 image does not decode: rose/broken.png|left out: 1 image does not", done.output)
    results = json.loads((out / ("results.json" if command == "compare" else "suggestion.json")).read_text())
    assert results["facts"]["left out"] == "1 image does not decode: rose/broken.png"
    if command == "compare":
        assert results["skipped"] == ["rose/broken.png"]
        assert "10 training and 2 validation images" in results["facts"]["data"]


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-1"])
def test_a_rate_that_is_none(tmp_path: Path, photos: Path, rate: str) -> None:
    found = run(tmp_path, photos, *given(), "--lr", rate, "--out", str(tmp_path / "out"))

    assert found.exit_code == 2
    assert not (tmp_path / "out").exists()


def place(plan: str, train_error: float, seconds: float = 1.0) -> Place:
    behind = None if plan == "full" else (-0.1, 0.1)
    return Place(plan, 1e-3, 0.8, (0.7, 0.9), 0.8, train_error, seconds, None, 10, False, behind)


class TestLearning:
    def test_nothing_learned_is_no_best_plan(self) -> None:
        places = [place("full", 0.8), place("linear_probe", 0.81)]

        assert verdict(places, 0.8) == (
            "nothing was learned: all 2 plans have a training error that is no better than naming the commonest class "
            "each time (80.0 %); train for more epochs or at other rates, or look at the labels"
        )
        assert verdict(places[:1], 0.8).startswith("nothing was learned: the plan has a training error")
        found = decide(places, 0.8)
        assert (found.plan, found.lr) == ("linear_probe", None)
        assert found.sentence.startswith("nothing was learned: all 2 plans")
        assert found.sentence.endswith("; linear_probe is named because it is the cheapest, without evidence")

    def test_one_that_did_is_enough_for_a_ranking(self) -> None:
        places = [place("full", 0.5), place("linear_probe", 0.8, seconds=0.5)]

        assert verdict(places, 0.8).startswith("no evidence of a difference between full, linear_probe")
        assert decide(places, 0.8).sentence.startswith("linear_probe is enough")

    def test_a_plan_alone_is_not_the_best(self) -> None:
        assert verdict([place("full", 0.1)], 0.8) == "full alone was trained, its best rate is 0.001"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", ["full", "discriminative_lr_first_two_stages_frozen"])
def test_no_number_is_cut(capsys: pytest.CaptureFixture[str], width: int, name: str) -> None:
    """A long name goes on in the next line, and where that is not enough, lines run on past the edge."""
    cells = ("0.00015", "77.5", "65.0 to 90.0", "73.8", "1009.7", "827 MB", "310.8 k", "*~")
    console = Console(width=width, markup=False, highlight=False)
    print_table(console, [title for title, _ in COLUMNS], [(name, *cells)], left=["plan", ""])
    header, line, *further = capsys.readouterr().out.splitlines()

    assert line.split()[1:] == " ".join(cells).split()
    assert "".join([line.split()[0], *map(str.strip, further)]) == name
    assert header.split() == [
        "plan",
        "lr",
        "error",
        "%",
        "95",
        "%",
        "interval",
        "train",
        "%",
        "seconds",
        "peak",
        "trained",
    ]
    assert len(line) <= max(width, 84)


def test_a_model_that_needs_numbers_is_not_refused() -> None:
    """Only what a model says of this size, and not of its own, is a reason."""
    check_size(build(MODEL, classes=2, image_size=33, weights="random", seed=0), MODEL, 33)
