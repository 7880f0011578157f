"""On a GPU: each switch against float32, resumption, and NCCL. The CPU's part of them is in test_train.py."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import FreezePlanWarning, apply_plan
from freezeplan.cache import fill, memory, writer
from freezeplan.training.checkpoint import Checkpoint
from freezeplan.training.pixels import Normalisation, Prepare
from freezeplan.training.processes import Processes
from freezeplan.training.settings import Settings
from freezeplan.training.train import Epoch, Run, train_arm
from freezeplan.training.voc import Split
from freezeplan.voc_vgg16.arms import load_arms
from freezeplan.voc_vgg16.weights import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none"),
    pytest.mark.filterwarnings("ignore"),
]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
SETTINGS = Settings(epochs=3, batch_size=16, image_size=64, lr=1e-4, optimizer="rmsprop-tf1", device="cuda")


class Recorder:
    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after

    def batch(self, images: int, loss: Tensor) -> None:
        """Not of interest here."""

    def kept(self, done: int, images: int) -> None:
        """Not of interest here."""

    def epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def same_kernels() -> Iterator[None]:
    """So that two runs can be compared."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def split(count: int) -> Split:
    random = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 80, (count, 3, 64, 64), generator=random) + labels[:, None, None, None] * 80
    found = Split(
        images.to(torch.uint8), {"largest": labels, "first": labels}, nn.functional.one_hot(labels, 3), "largest"
    )
    return found.to(torch.device("cuda"))


def train(
    arm: str = "low_conv_lr", progress: Recorder | None = None, checkpoint: Checkpoint | None = None, **changes: Any
) -> Run:
    model = build("vgg16_slim_fc256", classes=3, image_size=64, weights="random", seed=0).cuda()
    return train_arm(
        model, load_arms([arm])[arm], (split(48), split(24)), replace(SETTINGS, **changes), seed=0,
        progress=progress or Recorder(), checkpoint=checkpoint,
    )  # fmt: skip


def losses(run: Run) -> list[float]:
    return [epoch.train_loss for epoch in run.epochs]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"amp": "bf16"}, 0.1),
        ({"amp": "fp16"}, 0.3),  # its first steps may be left out, until the scale fits
        ({"amp": "fp16", "clip": 1.0}, 0.5),
        ({"channels_last": False}, 0.02),
        pytest.param({"compile": True}, 0.02, marks=compiler),
    ],
)
@pytest.mark.parametrize("arm", ["frozen_convs", "low_conv_lr"])
def test_a_switch_is_near_float32(arm: str, changes: dict[str, Any], tolerance: float) -> None:
    """On kept features and on images."""
    plain, switched = train(arm), train(arm, **changes)

    assert losses(switched) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(switched)[-1] < losses(switched)[0]
    assert (switched.features > 0) == (arm == "frozen_convs")


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_steps_are_launched_as_graphs_with_the_same_bits(amp: Any) -> None:
    """48 images in three batches of 16 over three epochs: all but the first step."""
    plain, graphed = train("frozen_convs", amp=amp), train("frozen_convs", amp=amp, cuda_graph=True)

    assert (graphed.graphed_steps, graphed.graph_reason) == (8, "")
    assert losses(graphed) == losses(plain)
    assert graphed.predicted == plain.predicted


@pytest.mark.parametrize("optimizer", ["rmsprop-tf1", "rmsprop", "adamw", "sgd"])
def test_an_optimizer_learns(optimizer: str) -> None:
    found = losses(train(optimizer=optimizer, epochs=4))

    assert found[-1] < found[0]


@pytest.mark.parametrize("augment", ["flip", "crop-flip"])
def test_an_augmented_run_is_the_same_again_and_another_than_the_plain_one(augment: str) -> None:
    first, again = train(augment=augment), train(augment=augment)

    assert losses(first) == pytest.approx(losses(again), rel=1e-3)
    assert losses(first) != pytest.approx(losses(train()), rel=1e-6)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """Near, not bit by bit: a GPU adds in any order."""
    checkpoint = Checkpoint(tmp_path / "one.checkpoint", print)
    whole = train(amp="fp16")
    with pytest.raises(KeyboardInterrupt):
        train(progress=Recorder(stop_after=2), checkpoint=checkpoint, amp="fp16")

    gone_on = train(checkpoint=checkpoint, amp="fp16")

    assert losses(gone_on) == pytest.approx(losses(whole), rel=0.01)


@pytest.mark.skipif(not distributed.is_nccl_available(), reason="this torch is built without NCCL")
def test_one_process_of_nccl_sums_what_it_has(tmp_path: Path) -> None:
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        values = [torch.ones(3, device="cuda"), torch.full((2, 2), 2.0, device="cuda")]
        before = copy.deepcopy(values)
        Processes(0, 2).sum(values)  # two as far as it knows, so that it talks at all
    finally:
        distributed.destroy_process_group()

    assert all(torch.equal(one, two) for one, two in zip(values, before, strict=True))


def kept(directory: Path, keep: str = "auto", where: str = "cuda", **arguments: Any) -> Any:
    """Features of 40 images of bytes, in shards of eight."""
    model = build("vgg16_slim_fc256", classes=3, image_size=64, weights="random", seed=0).cuda()
    live = apply_plan(model, "voc_vgg16/frozen_convs", lr=1e-4)
    images = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepare = Prepare(Normalisation((0.5,) * 3, (0.25,) * 3), channels_last=True)
    return live.cached(
        TensorDataset(images.to(where), torch.arange(40) % 3), directory, batch_size=8, keep=keep, prepare=prepare,
        **arguments,
    )  # fmt: skip


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "SHARD_BYTES", 8 * 3 * 64 * 64 * 4)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_every_place_gives_the_same_features(tmp_path: Path, where: str) -> None:
    """On the GPU unless said otherwise; computed and found; items are in host memory, for a loader that pins them."""
    first, _ = kept(tmp_path / "device", where=where)
    expected = first.batch(range(40))

    assert (first.kept, first.computed, expected.device.type) == ("device", 40, "cuda")
    for keep in ("host", "disk", "device"):
        for directory in (tmp_path / keep, tmp_path / keep):
            features, _ = kept(directory, keep, where)
            assert features.kept == keep
            assert torch.equal(features.batch(range(40)), expected)
            assert torch.equal(features.batch(torch.tensor([3, 1])), expected[[3, 1]])
            loaded = torch.cat([x for x, _ in DataLoader(features, batch_size=8, pin_memory=True)])
            assert torch.equal(loaded, expected.cpu())
            spawned = DataLoader(features, batch_size=8, num_workers=2)
            assert torch.equal(torch.cat([x for x, _ in spawned]), expected.cpu())


def test_a_step_on_features_of_the_gpu_waits_for_nothing(tmp_path: Path) -> None:
    """Indices from the GPU; torch itself says where anybody waits."""
    features, rest = kept(tmp_path)
    writer.wait_for_writers()
    rows = torch.randperm(40, device="cuda")
    rest.train()(features.batch(rows[:8]))  # what a first pass sets up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in rows.split(8):
            rest(features.batch(part)).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("small_shards")
def test_what_does_not_fit_on_the_gpu_is_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory
    assert 0 < free(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(memory, "free_memory", lambda device: 0 if device.type == "cuda" else free(device))

    with pytest.warns(FreezePlanWarning, match="they are kept in host memory"):
        features, _ = kept(tmp_path)

    assert (features.kept, features.batch([0]).device.type) == ("host", "cuda")


@pytest.mark.usefixtures("small_shards")
def test_no_pass_over_a_shard_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a shard nobody waits for the GPU: torch itself says so."""
    compute = fill._Passes._compute

    def watched(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            compute(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    kept(tmp_path / "first")  # what a first pass sets up
    monkeypatch.setattr(fill._Passes, "_compute", watched)

    assert kept(tmp_path / "second", dtype="bfloat16")[0].computed == 40
