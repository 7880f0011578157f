"""A run that is stopped at any moment goes on to the same bits, and a damaged checkpoint is named and passed by."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import suppress

import pytest
import torch

from freezeplan.errors import FreezePlanError, OutputError
from freezeplan.training.checkpoint import FOLDER, Checkpoint, open_checkpoints
from freezeplan.voc_vgg16.command import voc_vgg16
from freezeplan.voc_vgg16.results import finished
from freezeplan.voc_vgg16.sample import weights_path, write_sample

SMALL = {"epochs": 2, "arm": ["frozen_convs", "low_conv_lr"], "image_size": 32, "batch_size": 50}


def figures(out):
    """Everything in ``results.json`` but what a clock said, and what kept features spared this process."""
    clocks = {"seconds", "train_seconds", "eval_seconds", "features_seconds", "features_computed", "features_epochs"}

    def without(value):
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if key not in clocks}
        return [without(part) for part in value] if isinstance(value, list) else value

    return without(json.loads((out / "results.json").read_text()))


class StopHere(Exception):  # noqa: N818  # it is none
    """In place of a kill."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    voc_vgg16(**SMALL, out=out)
    return figures(out)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_figures(whole, tmp_path, monkeypatch, capsys):
    """Stopped after each of its first five checkpoints in turn: two arms, each with two epochs and an end."""
    save, saved = Checkpoint.save, []

    def stop(self, state):
        save(self, state)
        saved.append(self.path.name)
        raise StopHere

    monkeypatch.setattr(Checkpoint, "save", stop)
    for _ in range(5):
        with pytest.raises(StopHere):
            voc_vgg16(**SMALL, out=tmp_path / "run", resume=True)
    monkeypatch.setattr(Checkpoint, "save", save)
    voc_vgg16(**SMALL, out=tmp_path / "run", resume=True)

    assert saved == ["frozen_convs-seed0.checkpoint"] * 3 + ["low_conv_lr-seed0.checkpoint"] * 2
    assert figures(tmp_path / "run") == whole
    files = ["curves.png", "report.html", "results.csv", "results.json", "summary.csv"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files
    capsys.readouterr()
    voc_vgg16(**SMALL, out=tmp_path / "run", resume=True)
    assert capsys.readouterr().out.replace("\n", "") == f"{tmp_path / 'run'}: finished already"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    """Cut off, or one bit changed; without any, the arm starts anew."""
    told = []
    checkpoint = Checkpoint(tmp_path / "arm.checkpoint", told.append)
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 1, "weights": torch.ones(3)})
    checkpoint.save({"epoch": 2, "weights": torch.ones(3)})
    assert checkpoint.load()["epoch"] == 2
    content = bytearray((tmp_path / "arm.checkpoint").read_bytes())
    content[100] ^= 1
    (tmp_path / "arm.checkpoint").write_bytes(content)

    assert checkpoint.load()["epoch"] == 1
    assert told == [f"{tmp_path / 'arm.checkpoint'}: damaged, left aside; what was written before it is used"]
    (tmp_path / "arm.previous").write_bytes(b"")
    assert checkpoint.load() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm.checkpoint", "arm.previous"]


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("state", [Harmful(), [1, 2]], ids=["code", "no-state"])
def test_a_right_digest_makes_no_checkpoint_of_another_file(tmp_path, capsys, state):
    """A digest is no signature: a file that asks for code is damaged, and the code does not run."""
    told = []
    checkpoint = Checkpoint(tmp_path / "arm.checkpoint", told.append)
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch})
    content = io.BytesIO()
    torch.save(state, content)
    written = hashlib.sha256(content.getvalue()).digest() + content.getvalue()
    (tmp_path / "arm.checkpoint").write_bytes(written)

    assert checkpoint.load() == {"epoch": 1}
    assert told == [f"{tmp_path / 'arm.checkpoint'}: damaged, left aside; what was written before it is used"]
    assert capsys.readouterr().out == ""


DAMAGES = [
    pytest.param(lambda path: path.write_text('{"epo'), "is damaged", id="cut"),
    pytest.param(lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged", id="no-text"),
    pytest.param(lambda path: path.write_text("[" * 100_000), "is damaged", id="deep"),
    pytest.param(lambda path: path.write_text('["epochs", 2]'), "is damaged", id="no-object"),
    pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_run_that_nobody_can_name_is_refused_and_kept(tmp_path, damage, said):
    """Without a whole run.json nothing says whose the checkpoints are; they stay where they are."""
    facts = {"epochs": 2}
    checkpoints = open_checkpoints(tmp_path, facts, resume=False, overwrite=False, warn=print)
    checkpoints.of("arm", 0).save({"epoch": 1})
    about = checkpoints.folder / "run.json"
    damage(about)
    before = sorted(path.name for path in checkpoints.folder.iterdir())
    with pytest.raises(OutputError) as error:
        open_checkpoints(tmp_path, facts, resume=True, overwrite=False, warn=print)

    assert str(error.value) == (
        f"{about}: {said}, and it says which run the checkpoints are of\n"
        "  --overwrite starts anew, or give another --out"
    )
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == before
    open_checkpoints(tmp_path, facts, resume=False, overwrite=True, warn=print)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert [path.name for path in checkpoints.folder.iterdir()] == ["run.json"]


def test_a_kill_between_two_renames_leaves_an_unfinished_run(tmp_path):
    """Only the checkpoint before the last is there under its name: it is no empty folder."""
    checkpoints = open_checkpoints(tmp_path, {}, resume=False, overwrite=False, warn=print)
    for epoch in (1, 2):
        checkpoints.of("arm", 0).save({"epoch": epoch})
    (checkpoints.folder / "arm-seed0.checkpoint").unlink()
    with pytest.raises(OutputError, match="holds an unfinished run"):
        open_checkpoints(tmp_path, {}, resume=False, overwrite=False, warn=print)

    again = open_checkpoints(tmp_path, {}, resume=True, overwrite=False, warn=print)
    assert again.of("arm", 0).load() == {"epoch": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of a second: 20 images of 16 pixels."""
    data = write_sample(tmp_path_factory.mktemp("tiny"), train=20, val=20)
    numbers = {"image_size": 16, "epochs": 3, "threads": 1, "workers": 1, "cache": False}
    return {"data": data, "model": "test_resnet", "weights": "random", "arm": ["frozen_convs"], **numbers}


def stopped(monkeypatch, after):
    """Let the checkpoint of this number be the last thing that a run does."""
    save, saved = Checkpoint.save, []

    def stop(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) == after:
            raise StopHere

    monkeypatch.setattr(Checkpoint, "save", stop)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path, monkeypatch, capsys):
    """Through the runner: the damaged file is named, and the figures are those of a run that was not stopped."""
    voc_vgg16(**tiny, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped(patch, after=2)
        with pytest.raises(StopHere):
            voc_vgg16(**tiny, out=tmp_path / "run")
    newest = tmp_path / "run" / FOLDER / "frozen_convs-seed0.checkpoint"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    voc_vgg16(**tiny, out=tmp_path / "run", resume=True)

    assert f"{newest}: damaged, left aside; what was written before it is used" in capsys.readouterr().err
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert not (tmp_path / "run" / FOLDER).exists()


@pytest.mark.slow
def test_results_of_before_do_not_finish_a_run_that_replaces_them(tiny, tmp_path, monkeypatch):
    """A run with ``overwrite`` that was stopped is gone on with, although the folder holds results."""
    voc_vgg16(**tiny, out=tmp_path)
    with monkeypatch.context() as patch:
        stopped(patch, after=1)
        with pytest.raises(StopHere):
            voc_vgg16(**{**tiny, "epochs": 2}, out=tmp_path, overwrite=True)
    assert figures(tmp_path)["settings"]["epochs"] == 3
    voc_vgg16(**{**tiny, "epochs": 2}, out=tmp_path, resume=True)

    assert figures(tmp_path)["settings"]["epochs"] == 2


def test_another_run_is_not_gone_on_with(tmp_path):
    """What differs is named; an unfinished run is not thrown away unasked."""
    checkpoints = open_checkpoints(tmp_path, {"epochs": 2, "lr": 0.1}, resume=False, overwrite=False, warn=print)
    checkpoints.of("arm", 0).save({"epoch": 1})
    folder = checkpoints.folder
    messages = []
    for facts, resume in (({"epochs": 3, "lr": 0.1}, True), ({"epochs": 2, "lr": 0.1}, False)):
        with pytest.raises(OutputError) as error:
            open_checkpoints(tmp_path, facts, resume=resume, overwrite=False, warn=print)
        messages.append(str(error.value))
    with pytest.raises(FreezePlanError) as nowhere:
        voc_vgg16(resume=True)

    assert folder == tmp_path / FOLDER
    assert messages == [
        f"{tmp_path}: holds another run: its epochs is 2, now it is 3\n  give what it was begun with, or another --out",
        f"{tmp_path}: holds an unfinished run\n  --resume goes on with it, --overwrite starts anew",
    ]
    assert str(nowhere.value) == (
        "--resume goes on with the run in --out, which has to be given, and overwrites nothing\n"
        "  freezeplan run voc_vgg16 --resume --out DIR"
    )
    open_checkpoints(tmp_path, {"epochs": 3}, resume=False, overwrite=True, warn=print)
    assert json.loads((folder / "run.json").read_text()) == {"epochs": 3}


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The error says so."""
    checkpoint = Checkpoint(tmp_path / "arm.checkpoint", print)
    checkpoint.save({"epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError) as error:
            checkpoint.save({"epoch": 2})

    assert str(error.value) == (
        f"{tmp_path / 'arm.checkpoint'}: no checkpoint can be written: No space left on device\n"
        "  make room and go on with --resume"
    )
    assert checkpoint.load() == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["arm.checkpoint"]


def moment(out):
    """In which part of a run of two arms a folder was left."""
    if not (out / FOLDER / "run.json").exists():
        return "written" if (out / "results.json").exists() else "before run.json"
    first = Checkpoint(out / FOLDER / "frozen_convs-seed0.checkpoint", print).load()
    return "second arm" if first is not None and "run" in first else "first arm"


def work(process, until=math.inf):
    """Let a process run for so many seconds of processor time, which other work on the machine does not change."""
    done = 0.0
    while process.is_alive() and done < until:
        with suppress(OSError):  # it may have ended just now
            done = time.clock_gettime((~process.pid << 3) | 2)  # Linux: the clock of another process
        time.sleep(0.005)
    return done


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the clock of another process")
def test_killed_7_times(tmp_path, forked):
    """``kill -9`` at moments of the whole run and a little more, and 7 times the figures of an uninterrupted run.

    One moment at random in each quarter, and one in each part of a run, however short it is beside the others.
    """
    data = write_sample(tmp_path / "data", train=120, val=60)  # once, so that more of a run is training
    given = {"data": data, "model": "vgg16_slim_fc256", "weights": str(weights_path()), "threads": 1, "workers": 1}

    def start(out):
        more = {"epochs": 6, "out": out, "resume": True}
        process = forked.Process(target=voc_vgg16, kwargs={**SMALL, **given, **more})
        process.start()
        return process

    seconds = min(work(start(tmp_path / name)) for name in ("first", "whole"))
    whole = figures(tmp_path / "whole")
    assert figures(tmp_path / "first") == whole
    chance, moments, parts = random.Random(1), [], ("before run.json", "first arm", "second arm")
    for number, at in enumerate([*parts, *((quarter + chance.random()) / 4 for quarter in range(4))]):
        out = tmp_path / f"run{number}"
        run = start(out)
        if isinstance(at, str):
            while run.is_alive() and moment(out) != at:
                time.sleep(0.005)
        spent = work(run, until=0 if isinstance(at, str) else 1.05 * seconds * at)
        run.kill()
        run.join()
        if run.exitcode == -signal.SIGKILL and (not finished(out) or (out / FOLDER).exists()):
            moments.append(moment(out))
        else:
            seconds = min(seconds, spent)  # it had ended: a run takes less than the first two did
        again = start(out)
        again.join()

        assert again.exitcode == 0
        assert figures(out) == whole
        assert not (out / FOLDER).exists()
    assert len(moments) >= 5
    assert set(parts) <= set(moments)
