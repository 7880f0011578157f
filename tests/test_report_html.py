"""The page of a run: what is on it, that it is whole and alone, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freezeplan.errors import DataError, OutputError
from freezeplan.experiment.arms import Outcome, load_arms
from freezeplan.experiment.command import report, voc_vgg16
from freezeplan.experiment.report import read_results, repeat, to_html, write_report
from freezeplan.experiment.results import summarise
from freezeplan.experiment.statistics import (
    class_errors,
    confusion,
    error_spread,
    merge,
    mistakes,
    paired,
)
from freezeplan.experiment.train import Epoch, Measured, Run, Settings
from freezeplan.experiment.voc import VocData

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SETTINGS = Settings(epochs=2, batch_size=8, image_size=32)
LABELS = (0, 0, 1, 1, 2, 2)


def run(seed: int, predicted: tuple[int, ...]) -> Run:
    wrong = sum(a != b for a, b in zip(predicted, LABELS, strict=True)) / len(LABELS)
    epochs = tuple(Epoch(number, 1.0 / number, wrong, 1.0, 0.5) for number in (1, 2))
    return Run(
        seed, epochs, Measured(wrong, None, wrong, (0.5, 0.25, None), wrong, wrong), 0.1, True, 4.0, predicted=predicted
    )


def results(runs: Mapping[str, tuple[Run, ...]], classes: tuple[str, ...] = ("cat", "dog", "owl")) -> dict[str, Any]:
    val = tuple((f"JPEGImages/{row}.jpg", label) for row, label in enumerate(LABELS))
    outcome = Outcome(load_arms(list(runs)), runs, train_images=10, val_images=6, skipped=(), val=val)
    data = VocData("pets", classes, (), (), None)  # type: ignore[arg-type]
    return summarise(outcome, data, SETTINGS, model="test_resnet", weights="random", sample=False)


RESULTS = {
    "scratch": (run(0, (1, 1, 1, 0, 2, 0)), run(1, (0, 1, 1, 0, 2, 0))),
    "same_lr": (run(0, (0, 0, 1, 1, 2, 0)), run(1, (0, 0, 1, 1, 2, 2))),
}


def test_spreads_and_differences() -> None:
    found = results(RESULTS)

    first = error_spread(found, "scratch")
    assert first is not None
    assert (first.mean, first.deviation) == (pytest.approx((4 / 6 + 3 / 6) / 2), pytest.approx(1 / 6 / 2**0.5))
    assert error_spread(found, "scratch", "top5_error") is None
    difference = paired(found, "same_lr", "scratch")
    assert difference is not None
    assert (difference.mean, difference.deviation) == (pytest.approx(-0.5), pytest.approx(0))
    assert (
        paired(results({"scratch": RESULTS["scratch"][:1], "same_lr": RESULTS["same_lr"][1:]}), "same_lr", "scratch")
        is None
    )


def test_classes_and_mistakes() -> None:
    found = results(RESULTS)

    assert confusion(found, "scratch") == [[1, 3, 0], [2, 2, 0], [2, 0, 2]]
    assert class_errors(found, "scratch") == {"cat": 0.75, "dog": 0.5, "owl": 0.5}
    wrong = mistakes(found, "scratch", limit=2)
    assert [(one.file, one.label, one.predicted, one.right) for one in wrong] == [
        ("JPEGImages/0.jpg", "cat", "dog", ("same_lr",)),
        ("JPEGImages/1.jpg", "cat", "dog", ("same_lr",)),
    ]
    assert mistakes(found, "same_lr", limit=2) == []


def test_runs_of_other_arms_and_seeds_are_merged() -> None:
    whole = results(RESULTS)
    parts = [("a", results({"scratch": RESULTS["scratch"][:1]})), ("b", results({"same_lr": RESULTS["same_lr"]}))]
    found = merge([*parts, ("c", results({"scratch": RESULTS["scratch"][1:]}))])

    assert found == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"model": "resnet18"},
            "b: is another experiment than a: its model differs\n  a has test_resnet, b has resnet18",
            id="model",
        ),
        pytest.param(
            {"settings": {"lr": 0.5}},
            "b: is another experiment than a: its lr differs\n  a has 0.0005, b has 0.5",
            id="settings",
        ),
        pytest.param(
            {},
            "b: holds arm 'scratch' with seed 0 again\n"
            "  give one of the two, or runs of other seeds: the first is in a",
            id="again",
        ),
        pytest.param(
            {"arms": {"scratch": {"plan": {"version": 1}, "runs": []}}},
            "b: its arm 'scratch' has another plan than in a",
            id="plan",
        ),
    ],
)
def test_runs_that_do_not_go_together_are_refused(change: dict[str, Any], message: str) -> None:
    first, second = (results({"scratch": RESULTS["scratch"][:1]}) for _ in range(2))
    for key, value in change.items():
        second[key] = {**second[key], **value} if isinstance(value, dict) else value
    with pytest.raises(DataError) as raised:
        merge([("a", first), ("b", second)])

    assert str(raised.value) == message


def test_settings_that_change_no_figure_may_differ() -> None:
    first, second = (results({arm: RESULTS[arm]}) for arm in RESULTS)
    second["settings"]["threads"] = 64

    assert list(merge([("a", first), ("b", second)])["arms"]) == ["scratch", "same_lr"]


def test_the_page_is_alone_and_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>"
    page = to_html(results(RESULTS, (evil, 'o"wl', "{{ 7 * 7 }}")), {"scratch": [], "same_lr": []})

    assert "<script" not in page
    assert html.escape(evil).replace("&#x27;", "&#39;") in page
    assert "{{ 7 * 7 }}" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("<h1>") == 1
    assert page.count("published top-1") == 1
    assert "55" not in re.findall(r"<td class=\"theirs\">([^<]+)</td>", page)
    assert re.findall(r"<td class=\"theirs\">([^<]+)</td>", page) == ["30.9", "4.20", "16.7", "1.53"]
    assert "58.3 ± 11.8" in page
    assert page.count("data:image/svg+xml") == 3
    assert repeat(results(RESULTS)) in html.unescape(page)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_results(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: holds no results.json (No such file or directory)\n"
        "  expected the folder of a finished run: freezeplan run voc_vgg16 --out DIR"
    )
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json: is no JSON \(Expecting property name"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"data": 1}')
    with pytest.raises(DataError) as raised:
        read_results(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path / 'results.json'}: has no 'val'\n  it was not written by this version's freezeplan run"
    )


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised:
        write_report(tmp_path / "no" / "report.html", "")

    assert str(raised.value) == f"{tmp_path / 'no' / 'report.html'}: cannot be written: No such file or directory"
    assert list(tmp_path.iterdir()) == []


PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.documentElement.dataset.probe = JSON.stringify({
    images: images.length,
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    unnamed: images.filter(image => !image.alt).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    levels: [...document.querySelectorAll("h1,h2,h3")].map(heading => +heading.tagName[1]),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
  });
});
</script></body>"""


def browse(page: Path, width: int, dark: bool, *what: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={width},2000"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, scheme, *what]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    logs = ["--enable-logging=stderr", "--virtual-time-budget=5000"]
    return subprocess.run([*command, *logs, profile, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    voc_vgg16(arm=["frozen_convs", "same_lr"], epochs=2, seed=[0], out=folder / "zero")
    voc_vgg16(arm=["same_lr"], epochs=2, seed=[1], out=folder / "one")
    return folder


@pytest.mark.slow
def test_runs_of_the_sample_are_merged_with_a_gallery(sample: Path) -> None:
    merged = report([sample / "zero", sample / "one"], out=sample / "both.html")
    page = (sample / "both.html").read_text(encoding="utf-8")

    assert [one["seed"] for one in merged["arms"]["same_lr"]["runs"]] == [0, 1]
    assert page.count("data:image/jpeg") > 4
    assert "Embedded sample, not VOC" in page
    assert (
        merged["arms"]["frozen_convs"] == json.loads((sample / "zero/results.json").read_text())["arms"]["frozen_convs"]
    )


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280])  # Chromium's narrowest window is 500 pixels; a phone's is tried below
def test_a_browser_shows_the_page(sample: Path, width: int, dark: bool) -> None:
    page = sample / "zero/report.html"
    assert page.stat().st_size < 5_000_000
    probed = sample / f"probed-{width}-{dark}.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    done = browse(probed, width, dark, "--dump-dom")
    found = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', done.stdout)[1]))  # type: ignore[index]

    assert "CONSOLE" not in done.stderr
    assert found["images"] > 4
    assert (found["broken"], found["unnamed"]) == (0, 0)
    assert found["overflow"] <= 0
    assert found["dark"] == dark
    assert found["paper"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    levels = found["levels"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))

    shot = sample / f"shot-{width}-{dark}.png"
    browse(page, width, dark, f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2000, width)
    assert pixels.std() > 10
    assert (pixels.mean() < 128) == dark


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_phone_needs_no_scrolling_sideways(sample: Path) -> None:
    """A frame of 390 pixels in a wider window."""
    page = (sample / "zero/report.html").read_text(encoding="utf-8").replace("</body>", PROBE)
    frame = sample / "phone.html"
    frame.write_text(
        f"<iframe style='width:390px;height:800px;border:0' srcdoc='{html.escape(page)}'></iframe>"
        "<script>addEventListener('load', () => setTimeout(() => { document.documentElement.dataset.probe = "
        "document.querySelector('iframe').contentDocument.documentElement.dataset.probe }, 500))</script>",
        encoding="utf-8",
    )
    done = browse(frame, 800, False, "--dump-dom")
    found = json.loads(html.unescape(re.findall(r'<html data-probe="([^"]*)"', done.stdout)[0]))

    assert found["overflow"] <= 0
    assert found["broken"] == 0
