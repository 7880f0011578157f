"""Several processes train one arm: what one would, and a clear word when one of them ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from freezeplan.errors import FreezePlanError, ModelError
from freezeplan.training import processes
from freezeplan.training.processes import Processes, join
from freezeplan.training.settings import Settings
from freezeplan.training.train import Epoch, Run, train_arm
from freezeplan.training.voc import Split
from freezeplan.voc_vgg16.arms import load_arms
from freezeplan.voc_vgg16.sample import weights_path, write_sample
from freezeplan.voc_vgg16.weights import build

SETTINGS = Settings(epochs=3, batch_size=8, image_size=160, lr=1e-4, optimizer="rmsprop")
gloo = pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch is built without gloo")


class Recorder:
    def __init__(self, end_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.end_after = end_after

    def batch(self, images: int, loss: Tensor) -> None:
        self.losses.append(float(loss))

    def kept(self, done: int, images: int) -> None:
        """Not of interest here."""

    def epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == self.end_after:
            os._exit(9)


def split(count: int) -> Split:
    random = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 80, (count, 3, 160, 160), generator=random)
    images = (noise + labels[:, None, None, None] * 80).to(torch.uint8)
    return Split(images, {"largest": labels, "first": labels}, nn.functional.one_hot(labels, 3), "largest")


def train(processes: Processes, arm: str, model: str, progress: Recorder, **changes: Any) -> Run:
    start = build(model, classes=3, image_size=160, weights="random", seed=0)
    data = split(26), split(11)
    settings = replace(SETTINGS, **changes)
    return train_arm(start, load_arms([arm])[arm], data, settings, seed=0, progress=progress, processes=processes)


def _share(rank: int, folder: Path, arm: str, model: str, ends: bool) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    progress = Recorder(end_after=1 if ends and rank == 1 else None)
    try:
        run = train(Processes(rank, 2), arm, model, progress, cache=arm != "same_lr")
        found: dict[str, Any] = {"losses": progress.losses, "run": run}
    except FreezePlanError as error:
        found = {"error": str(error)}
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def two(folder: Path, arm: str, model: str) -> list[dict[str, Any]]:
    folder.mkdir()
    multiprocessing.spawn(_share, (folder, arm, model, False), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_one_process_is_alone() -> None:
    """Without torchrun nothing is joined, and nothing is waited for."""
    alone = join(cuda=False)
    value = torch.ones(2)
    alone.sum([value])

    assert alone == Processes(0, 1)
    assert alone.agreed("x") == "x"
    assert value.tolist() == [1, 1]
    with alone.in_turn():
        assert alone.first


def test_the_others_are_waited_for_longer_and_torchruns_signal_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ten minutes with NCCL would end a run in which one process reads or computes longer than the others."""
    asked: list[Any] = []
    monkeypatch.setattr(distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, timeout: asked.append((backend, timeout)))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(processes.atexit, "register", lambda _: None)
    told: list[Any] = []
    monkeypatch.setattr(processes.signal, "signal", lambda number, handler: told.append((number, handler)))

    assert join(cuda=False) == Processes(1, 3)
    assert asked == [("gloo", processes.PATIENCE)]
    assert processes.PATIENCE.total_seconds() >= 2 * 3600
    (number, handler) = told[0]
    assert number == signal.SIGTERM
    with pytest.raises(FreezePlanError) as raised:
        handler()
    assert str(raised.value) == (
        "torchrun was stopped, or another process of this run has ended\n"
        "  what it said is above; go on with the same command and --resume --out DIR"
    )


def test_fewer_images_than_processes_are_refused() -> None:
    with pytest.raises(ModelError) as raised:
        train(Processes(0, 16), "same_lr", "test_vit", Recorder())

    assert str(raised.value) == (
        "16 processes share batches of 6 images\n  --batch-size 16 or more, or fewer processes"
    )


@gloo
@pytest.mark.slow
@pytest.mark.parametrize("arm", ["same_lr", "frozen_convs"])
def test_two_processes_train_what_one_does(arm: str, tmp_path: Path) -> None:
    """On images and on features that the two compute together; a model without batch norm and dropout."""
    progress = Recorder()
    alone = train(Processes(), arm, "test_vit", progress, cache=arm != "same_lr")
    found = two(tmp_path / "two", arm, "test_vit")

    assert len(set(progress.losses)) > 5
    for one in found:
        assert one["losses"][:5] == pytest.approx(progress.losses[:5], abs=1e-5)
        assert one["losses"] == pytest.approx(progress.losses, rel=1e-2)
        assert abs(one["run"].val.top1_error - alone.val.top1_error) <= 0.01
        assert one["run"].train_error == found[0]["run"].train_error
        assert one["run"].features_computed == alone.features_computed
    assert (alone.features > 0) == (arm == "frozen_convs")


@gloo
@pytest.mark.slow
def test_statistics_of_batch_norm_are_the_same_in_all_processes(tmp_path: Path) -> None:
    first, second = two(tmp_path / "two", "same_lr", "test_resnet")

    assert first["losses"] == second["losses"]
    assert first["run"].val == second["run"].val
    assert first["run"].train_error == second["run"].train_error


@gloo
@pytest.mark.slow
def test_a_process_that_ends_is_noticed_by_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_share, args=(rank, tmp_path, "same_lr", "test_vit", True)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)

    assert [process.exitcode for process in both] == [0, 9]
    assert torch.load(tmp_path / "0.pt")["error"] == (
        "another process of this run has ended\n"
        "  what it said is above; go on with the same command and --resume --out DIR"
    )


def children(process: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@gloo
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes by /proc")
def test_torchrun_is_killed_and_goes_on(tmp_path: Path) -> None:
    """A part of the sample, two processes; one is killed after an epoch, and --resume gives what a whole run does."""
    data, model = str(write_sample(tmp_path / "data", train=200, val=100)), ["--model", "vgg16_slim_fc256"]
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "freezeplan"]
    given = ["--data", data, *model, "--weights", str(weights_path()), "--image-size", "64"]
    run = [*base, "run", "voc_vgg16", *given, "--arm", "low_conv_lr", "--epochs", "5"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out: Path, *more: str) -> subprocess.Popen[str]:
        command = [*run, "--out", str(out), *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    whole = start(tmp_path / "whole")
    said, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, said
    assert said.count("Written to") == 1
    assert "2, each with its share of a batch" in said

    cut = start(tmp_path / "cut")
    checkpoint = tmp_path / "cut" / "unfinished" / "low_conv_lr-seed0.checkpoint"
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(children(cut.pid)[1], signal.SIGKILL)
    said, _ = cut.communicate(timeout=200)
    assert cut.returncode != 0
    assert "another process of this run has ended" in said
    assert not (tmp_path / "cut" / "results.json").exists()

    again = start(tmp_path / "cut", "--resume")
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    runs = [found["arms"]["low_conv_lr"]["runs"][0] for found in results]
    for found in runs:
        del found["seconds"]
        for epoch in found["epochs"]:
            del epoch["train_seconds"], epoch["eval_seconds"]
    assert runs[0] == runs[1]
