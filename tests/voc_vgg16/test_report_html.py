"""The page of a run: what is on it, that it is whole and alone, and how a browser shows it."""

from __future__ import annotations

import html
import io
import json
import math
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freezeplan.errors import DataError, FreezePlanError, OutputError
from freezeplan.training.archive import open_files
from freezeplan.training.measures import Measured
from freezeplan.training.settings import Settings
from freezeplan.training.train import Epoch, Run
from freezeplan.training.voc import VocData
from freezeplan.voc_vgg16.arms import Outcome, load_arms
from freezeplan.voc_vgg16.command import report, voc_vgg16
from freezeplan.voc_vgg16.report import PHOTOS, gallery, read_results, repeat, to_html, write_report
from freezeplan.voc_vgg16.results import summarise
from freezeplan.voc_vgg16.statistics import class_errors, confusion, merge, mistakes

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
SETTINGS = Settings(epochs=2, batch_size=8, image_size=32)
LABELS = (0, 0, 1, 1, 2, 2)
ASKED = {"data": "pets.tar", "download": False, "weights": "random", "plans": [], "processes": 1}


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
    return summarise(outcome, data, SETTINGS, model="test_resnet", weights="random", sample=False, asked=ASKED)


RESULTS = {
    "scratch": (run(0, (1, 1, 1, 0, 2, 0)), run(1, (0, 1, 1, 0, 2, 0))),
    "same_lr": (run(0, (0, 0, 1, 1, 2, 0)), run(1, (0, 0, 1, 1, 2, 2))),
}


def test_classes_and_mistakes() -> None:
    found = results(RESULTS)

    assert confusion(found, "scratch") == [[1, 3, 0], [2, 2, 0], [2, 0, 2]]
    assert class_errors(found, "scratch") == {"cat": 0.75, "dog": 0.5, "owl": 0.5}
    wrong = mistakes(found, "scratch")
    assert len(wrong) == 3
    assert [(one.file, one.label, one.predicted, one.right) for one in wrong[:2]] == [
        ("JPEGImages/0.jpg", "cat", "dog", ("same_lr",)),
        ("JPEGImages/1.jpg", "cat", "dog", ("same_lr",)),
    ]
    assert mistakes(found, "same_lr") == []


def test_runs_of_other_arms_and_seeds_are_merged() -> None:
    whole = results(RESULTS)
    parts = [("a", results({"scratch": RESULTS["scratch"][:1]})), ("b", results({"same_lr": RESULTS["same_lr"]}))]
    parts.append(("c", results({"scratch": RESULTS["scratch"][1:]})))
    found = merge(parts)

    assert found.pop("origins") == dict(parts)
    assert found == {key: value for key, value in whole.items() if key not in ("versions", "asked")}


@pytest.mark.slow
def test_what_differs_between_merged_runs_is_told_apart() -> None:
    first, second = (results({"same_lr": RESULTS["same_lr"][seed : seed + 1]}) for seed in (0, 1))
    second["versions"] = {**second["versions"], "torch": "9.8.7"}
    second["settings"]["threads"] = 64
    second["asked"] = {**ASKED, "processes": 4}
    page = html.unescape(to_html(merge([("a", first), ("b", second)]), None))

    assert f"<dd>a: {first['versions']['torch']}</dd>\n<dd>b: 9.8.7</dd>" in page
    assert "<dd>a: 1</dd>\n<dd>b: 64</dd>" in page
    assert page.count(f"<dd>{first['versions']['timm']}</dd>") == 1
    assert f"<h3>a</h3>\n<pre>{repeat(first)}</pre>\n<h3>b</h3>\n<pre>{repeat(second)}</pre>" in page
    assert repeat(second).startswith("torchrun --nproc-per-node 4 -m freezeplan run voc_vgg16 --data pets.tar ")


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


@pytest.mark.slow
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
    assert "<td>scratch</td>\n<td>\N{MINUS SIGN}50.0 ± 0.0</td><td>2</td>" in page
    idle = {**RESULTS, "scratch": tuple(replace(one, learned=False) for one in RESULTS["scratch"])}
    page = to_html(results(idle), None)
    assert '<td class="dim">none: scratch did not learn</td><td>-</td>' in page
    assert "\N{MINUS SIGN}50.0" not in page


@pytest.mark.slow
def test_precision_is_the_mean_over_seeds_and_the_gallery_counts_the_rest() -> None:
    one, two = RESULTS["same_lr"]
    better = replace(two, val=replace(two.val, average_precision=(1.0, 0.25, None)))
    wrong = {"scratch": RESULTS["scratch"][:1], "same_lr": (one, better)}
    found = results(wrong)
    photo = io.BytesIO()
    Image.new("RGB", (200, 100)).save(photo, "JPEG")
    photos = gallery(found, lambda _: photo.getvalue())
    page = to_html(found, {**photos, "scratch": photos["scratch"][:1]})

    assert found["arms"]["same_lr"]["average_precision"] == {"cat": 0.75, "dog": 0.25, "owl": None}
    assert '<span class="dim">(75.0)</span>' in page
    assert len(photos["scratch"]) == len(mistakes(found, "scratch")) == 3 < PHOTOS
    assert page.count("data:image/jpeg") == 1
    assert "And 2 more." in page


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


def one_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["arms"]["scratch"]["runs"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda found: found.pop("versions"), "has no 'versions'", id="versions"),
        pytest.param(lambda found: found.pop("asked"), "has no 'asked'", id="asked"),
        pytest.param(lambda found: found["data"].pop("sample"), "data.sample: field required", id="sample"),
        pytest.param(
            lambda found: found["asked"].update(processes=0),
            "asked.processes: input should be greater than or equal to 1",
            id="processes",
        ),
        pytest.param(
            lambda found: found.update(arms={}),
            "arms: dictionary should have at least 1 item after validation, not 0",
            id="no-arm",
        ),
        pytest.param(
            lambda found: found["data"].update(classes="cat"),
            "data.classes: input should be a valid list",
            id="classes",
        ),
        pytest.param(
            lambda found: found["arms"]["scratch"].update(runs=[]),
            "arms.scratch.runs: list should have at least 1 item after validation, not 0",
            id="no-run",
        ),
        pytest.param(
            lambda found: one_of(found).update(seed="0"),
            "arms.scratch.runs[0].seed: input should be a valid integer",
            id="seed",
        ),
        pytest.param(
            lambda found: one_of(found).pop("features"),
            "arms.scratch.runs[0].features: field required",
            id="features",
        ),
        pytest.param(
            lambda found: one_of(found).update(top1_error=30.9),
            "arms.scratch.runs[0].top1_error: input should be less than or equal to 1",
            id="per-cent",
        ),
        pytest.param(
            lambda found: found["arms"]["scratch"]["deviation"].pop("any_error"),
            "arms.scratch.deviation.any_error: field required",
            id="deviation",
        ),
        pytest.param(
            lambda found: found["arms"]["scratch"].update(average_precision={}),
            "arms.scratch: average_precision: expected a figure for each class",
            id="precision",
        ),
        pytest.param(
            lambda found: found["pairs"][0].update(mean="much"),
            "pairs[0].mean: input should be a valid number",
            id="pairs",
        ),
    ],
)
def test_damaged_results_are_refused_by_file_and_field(
    damage: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(RESULTS)))
    assert read_results(tmp_path) == json.loads(path.read_text())
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))

    with pytest.raises(DataError) as raised:
        report([tmp_path], out=tmp_path / "report.html")

    note = "it was not written by this version's freezeplan run"
    assert str(raised.value) == f"{path}: {message}\n  {note}"
    assert not (tmp_path / "report.html").exists()


SHAPES = [
    pytest.param(lambda f: f["data"]["classes"].append("\x1b[2J"), "data.classes[3]: {name}", id="escape"),
    pytest.param(
        lambda f: f["data"]["classes"].pop(),
        "arms.scratch: average_precision: expected a figure for each class",
        id="a-class-less",
    ),
    pytest.param(
        lambda f: f["val"]["labels"].__setitem__(0, 3),
        "val.labels: expected 6 indices below 3, an image and a class each",
        id="a-class-too-high",
    ),
    pytest.param(
        lambda f: one_of(f)["predicted"].pop(),
        "arms.scratch, seed 0: predicted: expected 6 indices below 3, an image and a class each",
        id="an-image-less",
    ),
    pytest.param(
        lambda f: one_of(f).update(top1_error=math.nan),
        "arms.scratch.runs[0].top1_error: input should be a finite number",
        id="nan",
    ),
    pytest.param(lambda f: f.update(label="\n"), "label: {name}", id="end-of-line"),
    pytest.param(
        lambda f: f["settings"].update(lr=[0.1]), "settings.lr: expected text, a number, true, false or null", id="list"
    ),
    pytest.param(
        lambda f: f["arms"].update({"a\x1b": {}}),
        "arms.a\\x1b.[key]: {name}",
        id="arm",
    ),
    pytest.param(
        lambda f: f["arms"]["scratch"]["plan"].update(rules=[{"match": "(", "frozen": True}]),
        "arms.scratch.plan.rules[0].match[0]: pattern '(' is not a regular expression: "
        "missing ), unterminated subpattern at character 1",
        id="plan",
    ),
    pytest.param(
        lambda f: f["published"].clear(), "published: expected the source of the published figures", id="source"
    ),
    pytest.param(
        lambda f: f.update(model="antigravity:fly"),
        "model: expected the name of a timm model; a report runs nothing of a file's",
        id="model",
    ),
]


@pytest.mark.parametrize(("change", "said"), SHAPES)
def test_a_file_that_no_run_wrote_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    """The first place that is wrong is named; a model that would be imported is none."""
    found = json.loads(json.dumps(results(RESULTS)))
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert read_results(tmp_path) == found
    change(found)
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(DataError) as raised:
        read_results(tmp_path)

    assert str(raised.value) == (
        f"{tmp_path / 'results.json'}: {said.format(name='expected at most 1,000 printable characters')}\n"
        "  it was not written by this version's freezeplan run"
    )


def test_brackets_without_end_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"results\.json: is no JSON \(maximum recursion depth"):
        read_results(tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_results_of_other_images_make_no_gallery(packed: bool, tmp_path: Path) -> None:
    """A file that the data set lacks, and one that is no image."""
    root = tmp_path / "VOC2012"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "mark").write_text("")
    (root / "JPEGImages/0.jpg").write_text("no picture")
    path = root
    if packed:
        path = tmp_path / "voc.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(root, "VOC2012")
    read = open_files(path, "mark").read
    with pytest.raises(DataError) as raised:
        gallery(results(RESULTS), read)
    assert str(raised.value) == (
        "JPEGImages/0.jpg: is neither a JPEG nor a PNG that decodes\n"
        "  the results are of another data set, or it is damaged"
    )
    with pytest.raises(DataError) as raised:
        read("JPEGImages/1.jpg")
    assert str(raised.value) == f"{path}: there is no JPEGImages/1.jpg"


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
def test_the_page_of_the_sample_is_small_and_can_be_read_aloud(sample: Path) -> None:
    """Under 5 MB; a language, one main part, headers of rows and columns, names of pictures and of what scrolls."""
    page = sample / "zero/report.html"
    text = page.read_text(encoding="utf-8")

    assert page.stat().st_size < 5_000_000
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert text.count("<main>") == text.count("<h1>") == 1
    assert set(re.findall(r"<th\b[^>]*?(scope=\"\w+\")?(?: class=\"theirs\")?>", text)) == {
        'scope="col"',
        'scope="row"',
    }
    assert text.count("<table>") == text.count("<caption>") == text.count("<thead>") > 3
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall(r"<img[^>]*>", text))
    named = re.findall(r'<div class="wide" tabindex="0" role="region" aria-labelledby="([\w-]+)">', text)
    assert len(named) == len(set(named)) == text.count('class="wide"')
    assert all(text.count(f'id="{name}"') == 1 for name in named)


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


def test_data_beside_runs_of_the_sample_are_refused(tmp_path: Path) -> None:
    """They would be passed by in silence, also a folder that is not there."""
    found = results({"same_lr": (run(0, (0, 0, 1, 1, 2, 2)),)})
    found["data"]["sample"] = True
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(FreezePlanError) as error:
        report([tmp_path / "run"], out=tmp_path / "page.html", data=tmp_path / "nosuch")

    assert str(error.value) == "--data: the runs are of the embedded sample\n  leave out --data"
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1280])  # Chromium's narrowest window is 500 pixels; a phone's is tried below
def test_a_browser_shows_the_page(sample: Path, width: int, dark: bool) -> None:
    page = sample / "zero/report.html"
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
    assert (pixels[:400].mean() < 128) == dark  # above the curves, which stand on white


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_the_page_and_needs_no_scrolling_sideways(sample: Path, dark: bool) -> None:
    """A frame of 390 pixels in a wider window, light and dark."""
    page = (sample / "zero/report.html").read_text(encoding="utf-8").replace("</body>", PROBE)
    frame = sample / f"phone-{dark}.html"
    frame.write_text(
        "<body style='margin:0'>"
        f"<iframe style='width:390px;height:2000px;border:0' srcdoc='{html.escape(page)}'></iframe>"
        "<script>addEventListener('load', () => setTimeout(() => { document.documentElement.dataset.probe = "
        "document.querySelector('iframe').contentDocument.documentElement.dataset.probe }, 500))</script>",
        encoding="utf-8",
    )
    done = browse(frame, 800, dark, "--dump-dom")
    found = json.loads(html.unescape(re.findall(r'<html data-probe="([^"]*)"', done.stdout)[0]))

    assert "CONSOLE" not in done.stderr
    assert found["overflow"] <= 0
    assert (found["broken"], found["unnamed"]) == (0, 0)
    assert found["dark"] == dark

    shot = sample / f"phone-{dark}.png"
    browse(frame, 800, dark, f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"))[:, :390]
    assert pixels.std() > 10
    assert (pixels[:400].mean() < 128) == dark  # above the curves, which stand on white
