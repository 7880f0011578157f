"""A run that is stopped at any moment goes on to the same bits, and a damaged checkpoint is named and passed by."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time

import pytest
import torch

from freezeplan.errors import FreezePlanError, OutputError
from freezeplan.experiment.checkpoint import FOLDER, Checkpoint, open_checkpoints
from freezeplan.experiment.command import voc_vgg16

SMALL = {"epochs": 2, "arm": ["frozen_convs", "low_conv_lr"], "image_size": 32, "batch_size": 50}


def figures(out):
    """Everything in ``results.json`` but what a clock said, and how many features were found."""
    clocks = {"seconds", "train_seconds", "eval_seconds", "features_seconds", "features_computed"}

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
    files = ["curves.png", "report.html", "results.csv", "results.json"]
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


@pytest.mark.slow
def test_killed_25_times(whole, tmp_path):
    """``kill -9`` at random moments, 25 times, and 25 times the figures of an uninterrupted run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["freezeplan.experiment.command"])
    chance, partly = random.Random(0), 0
    for number in range(25):
        out = tmp_path / f"run{number}"
        run = context.Process(target=voc_vgg16, kwargs={**SMALL, "out": out, "resume": True})
        run.start()
        while not (out / FOLDER / "run.json").exists() and run.is_alive():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3))
        run.kill()
        run.join()
        partly += any(out.glob(f"{FOLDER}/*.checkpoint"))
        again = context.Process(target=voc_vgg16, kwargs={**SMALL, "out": out, "resume": True})
        again.start()
        again.join()

        assert again.exitcode == 0
        assert figures(out) == whole
        assert not (out / FOLDER).exists()
    assert partly >= 5
