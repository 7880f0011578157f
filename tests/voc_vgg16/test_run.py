"""The whole run, from options to figures on the screen and files in a folder."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
import shlex
import shutil
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from freezeplan import cli, load_plan
from freezeplan.cli import run as run_commands
from freezeplan.errors import DataError, FreezePlanError, ModelError, OutputError, PlanError
from freezeplan.model.describer import create_model
from freezeplan.training.settings import Settings
from freezeplan.training.train import Run
from freezeplan.training.voc import load_split, read_voc
from freezeplan.voc_vgg16 import arms, command
from freezeplan.voc_vgg16.arms import ARMS
from freezeplan.voc_vgg16.command import voc_vgg16
from freezeplan.voc_vgg16.download import VOC2012
from freezeplan.voc_vgg16.report import NAME, repeat
from freezeplan.voc_vgg16.results import FILES
from freezeplan.voc_vgg16.sample import write_sample
from freezeplan.voc_vgg16.screen import print_results

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
QUICK: dict[str, Any] = {
    "model": "test_resnet",
    "weights": "random",
    "image_size": 16,
    "epochs": 1,
    "threads": 1,
    "workers": 1,
}


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample"), train=20, val=20)


@pytest.mark.slow
def test_a_run_prints_its_figures_and_writes_them(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = voc_vgg16(data=voc, out=tmp_path / "out", seed=[0, 1], **QUICK)

    printed = capsys.readouterr()
    found = json.loads((out / "results.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted((*FILES, "report.html"))
    assert list(found["arms"]) == list(ARMS)
    assert found["settings"]["epochs"] == 1
    assert (found["data"]["name"], found["data"]["sample"], found["label"]) == ("VOCdevkit", False, "largest")
    assert all([run["seed"] for run in arm["runs"]] == [0, 1] for arm in found["arms"].values())
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert {"optimizer rmsprop (default)", "image-size 16", "augment none (default)"} <= set(lines)
    assert "loss softmax cross-entropy (fixed)" in lines
    assert found["settings"]["normalisation"] == "RGB, less 0.5, 0.5, 0.5, by 0.5, 0.5, 0.5"
    assert "19.1" in printed.out
    assert "mean ± standard deviation of 2 seeds" in " ".join(printed.out.split())
    assert f"Written to {out}" in printed.out
    assert "EMBEDDED SAMPLE" not in printed.out
    assert [line.split(":")[0] for line in printed.err.splitlines()] == [
        f"{arm}, seed {seed}" for seed in (0, 1) for arm in ARMS
    ]


@pytest.mark.slow
def test_all_arms_of_a_seed_start_from_the_same_head_and_body(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[int, list[dict[str, Tensor]]] = {}
    train_arm = arms.train_arm

    def record(model: nn.Module, *args: Any, seed: int, **kwargs: Any) -> Run:
        started.setdefault(seed, []).append({name: value.clone() for name, value in model.state_dict().items()})
        return train_arm(model, *args, seed=seed, **kwargs)

    monkeypatch.setattr(arms, "train_arm", record)
    voc_vgg16(data=voc, out=tmp_path, seed=[0, 1], **QUICK)

    for states in started.values():
        assert len(states) == 4
        assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    assert not torch.equal(started[0][0]["fc.weight"], started[1][0]["fc.weight"])


@pytest.mark.slow
def test_arms_are_trained_in_the_order_they_are_given(voc: Path, tmp_path: Path) -> None:
    out = voc_vgg16(data=voc, out=tmp_path, arm=["same_lr", "frozen_convs", "same_lr"], **QUICK)

    assert list(json.loads((out / "results.json").read_text())["arms"]) == ["same_lr", "frozen_convs"]


@pytest.mark.slow
def test_the_number_of_threads_is_put_back(voc: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()

    voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], **{**QUICK, "threads": before + 1})

    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_an_arm_that_did_not_learn_is_marked(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], lr=1e-30, label="first", seed=[2], **QUICK)

    arm = json.loads((out / "results.json").read_text())["arms"]["frozen_convs"]
    printed = capsys.readouterr()
    assert arm["train_error"] >= 0.95
    assert arm["learned"] is False
    assert "did not learn: its training error is no better" in printed.out
    assert "(did not learn)" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["20", "40", "80"])
def test_narrow_screens_and_no_colour(
    columns: str, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")

    voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], **QUICK)

    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    table = printed[: printed.index("Written to")]
    assert max(map(len, table.splitlines())) <= int(columns)


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"arm": ["frozen"]}, PlanError, "no arm is called 'frozen'"),
        ({"model": "resnet5O"}, ModelError, "timm has no model called 'resnet5O'"),
        ({"data": Path("nowhere.tar")}, DataError, "nowhere.tar: no such file or folder"),
        ({"epochs": 0}, FreezePlanError, "--epochs is a whole number of at least 1, found 0"),
        ({"lr": 0.0}, FreezePlanError, "--lr is a number above 0, found 0"),
        ({"clip": float("nan")}, FreezePlanError, "--clip is a number above 0, found nan"),
        ({"cache_limit": "much"}, FreezePlanError, "--cache-limit is a size above 0, found 'much'"),
        ({"model": "a:b"}, FreezePlanError, "--model: expected the name of a timm model, found 'a:b'"),
        ({"flatten": "hwc"}, FreezePlanError, "--flatten: test_resnet flattens nothing"),
        ({"device": "cuda"}, FreezePlanError, "--device cuda: torch finds no CUDA device"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    options: dict[str, Any],
    kind: type[FreezePlanError],
    sentence: str,
    voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(arms, "train_arm", None)

    with pytest.raises(kind) as caught:
        voc_vgg16(**{"data": voc, "out": tmp_path / "out", **QUICK, **options})

    assert str(caught.value).splitlines()[0] == sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_results_are_not_overwritten_by_accident(voc: Path, tmp_path: Path) -> None:
    voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], **QUICK)

    with pytest.raises(OutputError, match="already holds"):
        voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], **QUICK)
    voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], overwrite=True, **QUICK)


@pytest.mark.slow
def test_bad_images_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sample(tmp_path, train=40, val=20)
    bad = sorted((data / "VOC2012" / "JPEGImages").iterdir())[3]
    bad.write_bytes(b"nothing")

    with pytest.raises(DataError, match="does not decode"):
        voc_vgg16(data=data, out=tmp_path / "out", arm=["frozen_convs"], **QUICK)
    out = voc_vgg16(data=data, out=tmp_path / "out", arm=["frozen_convs"], skip_bad=True, **QUICK)

    found = json.loads((out / "results.json").read_text())["data"]
    assert (found["train"], found["skipped"]) == (39, [f"JPEGImages/{bad.name}"])
    assert f"1 image does not decode and was left out: JPEGImages/{bad.name}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_without_a_description_is_an_arm(voc: Path, tmp_path: Path) -> None:
    convs = tmp_path / "convs.yaml"
    convs.write_text("version: 1\nrules: [{role: head, lr_mult: 1}, {match: .*, lr_mult: 0.2}]\n")

    out = voc_vgg16(data=voc, out=tmp_path / "out", arm=["frozen_convs"], plan=[convs], **QUICK)

    assert load_plan(convs).description is None
    assert sorted(path.name for path in out.iterdir()) == sorted((*FILES, NAME))
    assert list(json.loads((out / "results.json").read_text())["arms"]) == ["frozen_convs", "convs"]


@pytest.mark.slow
def test_a_page_that_fails_costs_no_figures(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> str:
        raise RuntimeError("no page")

    with monkeypatch.context() as patch:
        patch.setattr(command, "to_html", fails)
        with pytest.raises(RuntimeError, match="no page"):
            voc_vgg16(data=voc, out=tmp_path / "out", arm=["frozen_convs"], **QUICK)
    assert all((tmp_path / "out" / name).exists() for name in FILES)

    voc_vgg16(data=voc, out=tmp_path / "out", arm=["frozen_convs"], resume=True, **QUICK)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted((*FILES, NAME))


@pytest.mark.slow
def test_the_command_on_the_page_repeats_the_run(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = tmp_path / "my plans"
    plans.mkdir()
    (plans / "convs.yaml").write_text("version: 1\nrules: [{role: head, lr_mult: 1}, {match: .*, lr_mult: 0.2}]\n")
    (tmp_path / "data").symlink_to(voc)
    monkeypatch.chdir(tmp_path)
    given = {**QUICK, "epochs": 2, "lr": 0.003, "label": "first", "warmup": 2, "clip": 1.0, "cache": False}
    one = voc_vgg16(
        data=Path("data"), out=Path("one"), arm=["same_lr"], plan=["my plans/convs.yaml"], seed=[3, 1], **given
    )
    found = json.loads((one / "results.json").read_text())

    words = shlex.split(repeat(found))
    assert words[0] == "freezeplan"
    cli.app([*words[1:], "--out", "two"], standalone_mode=False)

    again = json.loads(Path("two/results.json").read_text())
    assert again["asked"] == found["asked"]
    assert {**again["settings"], "workers": 1} == found["settings"]
    assert list(again["arms"]) == ["same_lr", "convs"]
    for arm in again["arms"]:
        assert [run["seed"] for run in again["arms"][arm]["runs"]] == [3, 1]
        mine, theirs = ([run["predicted"] for run in one["arms"][arm]["runs"]] for one in (again, found))
        assert mine == theirs
        assert again["arms"][arm]["top1_error"] == found["arms"][arm]["top1_error"]
        assert again["arms"][arm]["train_error"] == found["arms"][arm]["train_error"]


def test_every_setting_is_an_option() -> None:
    """The command that repeats a run is built from the settings, so each has the name of its option."""
    options = inspect.signature(run_commands.run).parameters

    assert {field.name for field in fields(Settings)} <= set(options)


@pytest.mark.slow
def test_what_freezes_the_same_shares_its_features_and_all_share_the_decoded_images(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arms, seeds and rates that freeze the same thing; the second seed runs no frozen layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(arms, "load_split", Mock(wraps=arms.load_split))
    slower = tmp_path / "slower.yaml"
    slower.write_text("version: 1\nrules: [{role: head, lr_mult: 0.5}, {match: .*, frozen: true}]\n")
    weights = tmp_path / "weights.safetensors"  # random ones would be others for each seed
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    given = {
        **QUICK,
        "weights": str(weights),
        "epochs": 2,
        "image_size": 64,
        "arm": ["frozen_convs", "same_lr"],
        "plan": [slower],
    }

    one = voc_vgg16(data=voc, out=tmp_path / "one", seed=[0, 1], **given)
    printed = capsys.readouterr().out
    two = voc_vgg16(data=voc, out=tmp_path / "two", seed=[2], lr=0.1, **given)

    computed = {
        (arm, run["seed"]): (run["features"], run["features_computed"])
        for out in (one, two)
        for arm, found in json.loads((out / "results.json").read_text())["arms"].items()
        for run in found["runs"]
    }
    assert computed.pop(("frozen_convs", 0)) == (40, 40)
    assert {computed.pop(("same_lr", seed)) for seed in range(3)} == {(0, 0)}
    assert set(computed.values()) == {(40, 0)}
    assert len(computed) == 5
    assert [call.args[1] for call in arms.load_split.call_args_list] == ["train", "val"] * 2  # type: ignore[attr-defined]
    lines = " ".join(printed.split())
    assert re.search(
        r"frozen_convs: features of 40 images computed in \d+\.\d s and cached, "
        r"which saves about -?\d+ s of frozen layers",
        lines,
    )
    assert "slower: the features of all 40 images were there: no frozen layer was run" in lines
    assert "same_lr: " not in lines


@pytest.mark.parametrize("terminal", [False, True])
def test_what_kept_features_spared_is_printed_on_a_terminal_too(terminal: bool) -> None:
    once = {"seed": 0, "top1_error": 0.5, "features": 40, "features_epochs": 3, "epochs": []}
    runs = [
        {**once, "features_computed": 40, "features_seconds": 2.0, "features_difference": 0.0161},
        {**once, "features_computed": 0, "features_seconds": 0.0, "features_difference": 0.0},
    ]
    means = {"top5_error": None, "largest_error": 0.5, "any_error": 0.5, "train_error": 0.5, "learned": True}
    console = Console(force_terminal=terminal, width=200, record=True, file=io.StringIO())

    print_results(
        console,
        {"arms": {"kept": {**means, "runs": runs}}, "data": {"sample": True}, "model": "vgg16", "label": "first"},
    )

    assert console.export_text().splitlines()[-1] == (
        "kept: features of 40 images computed in 2.0 s and cached, which saves about 10 s of frozen layers; "
        "they differ by 1.6e-02 of the largest from those of a plain step"
    )


@pytest.mark.slow
def test_errors_are_measured_under_both_rules_and_any(voc: Path, tmp_path: Path) -> None:
    """The first validation image shows a small object first and a large one of another class behind it."""
    data = read_voc(voc)
    photo = data.val[0]
    small = next(name for name in data.classes if name != photo.objects[0].name)
    copied = tmp_path / "voc"
    shutil.copytree(voc, copied)
    path = copied / "VOC2012" / "Annotations" / f"{photo.id}.xml"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    text = path.read_text().replace("<object>", f"<object><name>{small}</name>{box}</object><object>", 1)
    path.write_text(text)

    out = voc_vgg16(data=copied, out=tmp_path / "out", arm=["frozen_convs"], **QUICK)

    run = json.loads((out / "results.json").read_text())["arms"]["frozen_convs"]["runs"][0]
    split = load_split(read_voc(copied), "val", image_size=16, rule="largest")
    by_rule = {rule: labels.tolist() for rule, labels in split.by_rule.items()}
    wrong = {
        rule: sum(guess != label for guess, label in zip(run["predicted"], labels, strict=True)) / 20
        for rule, labels in by_rule.items()
    }
    assert by_rule["largest"][0] != by_rule["first"][0]
    assert (run["largest_error"], run["first_error"], run["top1_error"]) == (
        wrong["largest"],
        wrong["first"],
        wrong["largest"],
    )
    assert run["any_error"] <= min(wrong.values())
    assert "largest_error,first_error,any_error" in (out / "results.csv").read_text()
    assert "by first" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_plan_with_phases_is_an_arm(voc: Path, tmp_path: Path) -> None:
    out = voc_vgg16(data=voc, out=tmp_path, arm=["frozen_convs"], plan=["gradual_unfreeze"], **QUICK | {"epochs": 2})

    assert list(json.loads((out / "results.json").read_text())["arms"]) == ["frozen_convs", "gradual_unfreeze"]


def stopped(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that ends after its first epoch, with a checkpoint."""
    train_arm = arms.train_arm

    def once(*args: Any, checkpoint: Any, **kwargs: Any) -> Run:
        run = train_arm(*args, checkpoint=checkpoint, **kwargs)
        raise KeyboardInterrupt(run.seed)

    with monkeypatch.context() as patch:
        patch.setattr(arms, "train_arm", once)
        with pytest.raises(KeyboardInterrupt):
            voc_vgg16(**options)


@pytest.mark.slow
def test_another_text_of_a_plan_is_another_run(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "mine.yaml"
    plan.write_text("version: 1\nrules: [{match: .*, lr_mult: 1}]\n")
    given: dict[str, Any] = {"data": voc, "out": tmp_path / "out", "arm": ["frozen_convs"], "plan": [plan], **QUICK}
    stopped(monkeypatch, **given)
    plan.write_text("version: 1\nrules: [{match: .*, lr_mult: 0.5}]\n")

    with pytest.raises(OutputError) as caught:
        voc_vgg16(**given, resume=True)

    assert str(caught.value) == (
        f"{tmp_path / 'out'}: holds another run: its plan of mine is "
        "{'version': 1, 'rules': [{'match': '.*', 'lr_mult': 1.0}]}, "
        "now it is {'version': 1, 'rules': [{'match': '.*', 'lr_mult': 0.5}]}\n"
        "  give what it was begun with, or another --out"
    )


def test_another_file_of_weights_is_another_run(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "w.safetensors"
    state = create_model("test_resnet").state_dict()
    save_file(state, weights)
    before = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    given = {"data": voc, "out": tmp_path / "out", "arm": ["frozen_convs"], **QUICK, "weights": str(weights)}
    stopped(monkeypatch, **given)
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    after = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]

    with pytest.raises(OutputError) as caught:
        voc_vgg16(**given, resume=True)

    assert str(caught.value) == (
        f"{tmp_path / 'out'}: holds another run: its model is test_resnet; weights: w.safetensors (sha256 {before}), "
        f"now it is test_resnet; weights: w.safetensors (sha256 {after})\n"
        "  give what it was begun with, or another --out"
    )


@pytest.fixture
def done(voc: Path, tmp_path: Path) -> dict[str, Any]:
    """A finished run, by what was given to it."""
    weights, plan = tmp_path / "w.safetensors", tmp_path / "mine.yaml"
    save_file(create_model("test_resnet").state_dict(), weights)
    plan.write_text("version: 1\nrules: [{match: .*, lr_mult: 1}]\n")
    given = {"data": voc, "out": tmp_path / "out", "arm": ["frozen_convs"], "plan": [plan], **QUICK}
    given["weights"] = str(weights)
    voc_vgg16(**given)
    return given


def test_a_finished_run_is_finished_for_what_it_was_begun_with_alone(
    done: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, seeds, arms, data, the text of a plan and the content of weights; what decides nothing may differ."""
    before = (done["out"] / "results.json").read_bytes()
    changes: dict[str, dict[str, Any]] = {
        "epochs is 1, now it is 4": {"epochs": 4},
        "label is largest, now it is first": {"label": "first"},
        "seeds is 0, now it is 0, 1": {"seed": [0, 1]},
        "arms is frozen_convs, mine, now it is frozen_convs, same_lr, mine": {"arm": ["frozen_convs", "same_lr"]},
        "data is VOCdevkit: 20 training and 20 validation images, now it is VOCdevkit: 20 training and 21": {
            "data": write_sample(tmp_path / "other", train=20, val=21)
        },
        f"data is VOCdevkit: 20 training and 20 validation images, now it is {VOC2012.name}": {
            "data": tmp_path / "nowhere", "download": True
        },
    }  # fmt: skip
    for said, change in changes.items():
        with pytest.raises(OutputError) as caught:
            voc_vgg16(**{**done, **change}, resume=True)
        assert str(caught.value).startswith(f"{done['out']}: holds another run: its {said}")
        assert str(caught.value).endswith("\n  give what it was begun with, or another --out")
    assert not (tmp_path / "nowhere").exists()  # nothing was downloaded to say so

    capsys.readouterr()
    voc_vgg16(**{**done, "workers": 2, "cache_limit": "20G"}, resume=True)
    assert capsys.readouterr().out.replace("\n", "") == f"{done['out']}: finished already"

    text = done["plan"][0].read_text()
    done["plan"][0].write_text(text.replace("lr_mult: 1", "lr_mult: 0.5"))
    with pytest.raises(OutputError, match="holds another run: its plan of mine is"):
        voc_vgg16(**done, resume=True)
    done["plan"][0].write_text(text)
    save_file({name: tensor + 1 for name, tensor in create_model("test_resnet").state_dict().items()}, done["weights"])
    with pytest.raises(OutputError, match="holds another run: its model is test_resnet; weights: "):
        voc_vgg16(**done, resume=True)
    assert (done["out"] / "results.json").read_bytes() == before


def test_resume_replaces_no_results_that_it_cannot_compare(done: dict[str, Any]) -> None:
    """Of an earlier version, or a part of the files is gone."""
    path = done["out"] / "results.json"
    found = json.loads(path.read_text())
    del found["facts"]
    path.write_text(json.dumps(found))
    with pytest.raises(OutputError) as unknown:
        voc_vgg16(**done, resume=True)
    (done["out"] / "report.html").unlink()
    with pytest.raises(OutputError) as part:
        voc_vgg16(**done, resume=True)

    assert str(unknown.value) == (
        f"{path}: does not say what the run was begun with\n  --overwrite starts anew, or give another --out"
    )
    assert str(part.value) == (
        f"{done['out']}: already holds results.json, results.csv, summary.csv, curves.png\n"
        "  --overwrite replaces them, or give another folder with --out"
    )


@pytest.mark.slow
def test_features_go_to_the_folder_and_under_the_bound(voc: Path, tmp_path: Path) -> None:
    given = {"data": voc, "arm": ["frozen_convs"], "cache_dir": tmp_path / "features", **QUICK}
    voc_vgg16(out=tmp_path / "one", **given)

    assert list((tmp_path / "features").rglob("*.safetensors"))
    with pytest.raises(FreezePlanError, match=r"limit"):
        voc_vgg16(out=tmp_path / "two", **{**given, "cache_dir": tmp_path / "other"}, cache_limit="0.1K")


@pytest.mark.slow
def test_a_part_of_voc_2012_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_sample(tmp_path, train=20, val=20)
    voc_names = dict(zip(read_voc(data).classes, VOC2012.classes, strict=True))
    for path in (data / "VOC2012" / "Annotations").iterdir():
        text = path.read_text()
        for name, other in voc_names.items():
            text = text.replace(f"<name>{name}</name>", f"<name>-{other}</name>")
        path.write_text(text.replace("<name>-", "<name>"))

    voc_vgg16(data=data, out=tmp_path / "out", arm=["frozen_convs"], **QUICK)

    assert (
        f"{data}: 20 training and 20 validation images; all of VOC 2012 has 5,717 and 5,823\n"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def flowers() -> dict[str, Any]:
    data, weights = SHARED / "data" / "flowers5_voc.tar", SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
    if not (data.exists() and weights.exists()):
        pytest.skip("needs flowers5_voc.tar and tf_efficientnet_lite0.safetensors in ../shared")
    return {"data": data, "model": "tf_efficientnet_lite0", "weights": str(weights), "threads": 1}


@pytest.mark.slow
@pytest.mark.data
def test_a_head_on_real_features_is_as_good_as_a_linear_probe(flowers: dict[str, Any], tmp_path: Path) -> None:
    """Three seeds at the default epochs; a probe by other means has 29.9 %."""
    out = voc_vgg16(**flowers, image_size=128, arm=["frozen_convs"], seed=[0, 1, 2], out=tmp_path)

    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["epochs"] == command.default_settings("tf_efficientnet_lite0", sample=False).epochs
    assert len(found["arms"]["frozen_convs"]["runs"]) == 3
    assert found["arms"]["frozen_convs"]["top1_error"] <= 0.305


@pytest.mark.slow
@pytest.mark.data
def test_real_photos_gain_from_real_weights(flowers: dict[str, Any], tmp_path: Path) -> None:
    out = voc_vgg16(**flowers, image_size=128, epochs=5, arm=["scratch", "frozen_convs"], out=tmp_path)

    error = {name: arm["top1_error"] for name, arm in json.loads((out / "results.json").read_text())["arms"].items()}
    assert error["frozen_convs"] <= 0.35
    assert error["frozen_convs"] <= error["scratch"] - 0.1


@pytest.mark.slow
@pytest.mark.data
def test_photos_with_several_objects(tmp_path: Path) -> None:
    data = SHARED / "data" / "fruit3_voc.tar"
    if not data.exists():
        pytest.skip("needs fruit3_voc.tar in ../shared/data")

    out = voc_vgg16(data=data, out=tmp_path, arm=["frozen_convs"], **QUICK)

    arm = json.loads((out / "results.json").read_text())["arms"]["frozen_convs"]
    assert arm["top5_error"] is None
    assert arm["any_error"] <= arm["top1_error"]


@pytest.mark.slow
def test_without_data_the_sample_is_run_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "write_sample", partial(write_sample, train=20, val=20))

    out = voc_vgg16(weights="random", arm=["frozen_convs"], epochs=1, out=tmp_path)

    found = json.loads((out / "results.json").read_text())
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "EMBEDDED SAMPLE, NOT VOC: drawn shapes; its figures say nothing about VOC."
    assert "Error in % of vgg16_slim_fc256 on the embedded sample" in printed
    assert (found["data"]["sample"], len(found["data"]["classes"]), found["model"]) == (True, 20, "vgg16_slim_fc256")
    chosen = {key: found["settings"][key] for key in ("batch_size", "image_size", "optimizer", "threads")}
    assert chosen == {"batch_size": 16, "image_size": 64, "optimizer": "rmsprop-tf1", "threads": 1}
    assert found["arms"]["frozen_convs"]["top5_error"] is not None


def test_help_states_the_defaults_that_a_run_takes():
    """What --help says is what happens; it is stated apart only so that help need not wait for torch."""
    real, sample = command.default_settings("vgg16", sample=False), command.default_settings("vgg16", sample=True)

    assert f"{real.epochs}; sample: {sample.epochs}" == run_commands.EPOCHS
    assert f"{real.batch_size}; sample: {sample.batch_size}" == run_commands.BATCH_SIZE
    assert (real.image_size, real.lr, real.optimizer, real.label) == (224, 5e-4, "rmsprop-tf1", "largest")


def test_what_can_be_typed_is_what_a_run_takes() -> None:
    """Each option is an argument of the run, by the same name and with the same default."""
    typed = {name: option.default for name, option in inspect.signature(run_commands.run).parameters.items()}
    del typed["experiment"], typed["settings"]

    assert typed == {name: taken.default for name, taken in inspect.signature(voc_vgg16).parameters.items()}


@pytest.mark.slow
def test_on_the_sample_every_transfer_arm_is_far_ahead_of_scratch(tmp_path: Path) -> None:
    """At least ten points below scratch, which has learnt its training images. The page has three seeds."""
    out = voc_vgg16(out=tmp_path)

    found = json.loads((out / "results.json").read_text())["arms"]
    errors = {arm: entry["runs"][0]["top1_error"] for arm, entry in found.items()}
    assert found["scratch"]["runs"][0]["learned"]
    assert all(errors[arm] <= errors["scratch"] - 0.1 for arm in ARMS[1:])
