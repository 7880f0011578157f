"""Features kept on the device, in host memory or on disk are the same; what the disk refuses ends no training.

The CPU stands for the device here: ``keep="device"`` is its memory. What only a GPU shows is in test_gpu.py.
"""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from freezeplan import FreezePlanError, FreezePlanWarning, apply_plan
from freezeplan.cache import fill, memory, reader, store, writer
from freezeplan.cache.features import Features, Images
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model


def data(count=10, size=64):
    return TensorDataset(
        torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(count)
    )


def raw(count=10):
    images = torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(count))


@pytest.fixture
def live():
    torch.manual_seed(0)
    return apply_plan(create_model("test_resnet", num_classes=3), "linear_probe", lr=0.1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(fill, "SHARD_BYTES", 4 * 64 * 64 * 3 * 4)


@pytest.mark.parametrize("keep", ["device", pytest.param("host", marks=pytest.mark.slow), "disk"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_place_gives_the_same_features(live, tmp_path, keep, workers):
    """Bit by bit: computed, found, as items, as batches, through a loader and its processes, and pickled."""
    expected = live.cached(data(), tmp_path / "expected", batch_size=2)[0].batch(range(10))
    features, _ = live.cached(data(), tmp_path / "cache", batch_size=2, keep=keep)
    again, _ = live.cached(data(), tmp_path / "cache", batch_size=2, keep=keep)

    assert (features.kept, features.computed, again.computed) == (keep, 10, 0)
    for found in (features, again, pickle.loads(pickle.dumps(features))):
        assert torch.equal(found.batch(range(10)), expected)
        assert torch.equal(found.batch(torch.tensor([7, 0, 7])), expected[[7, 0, 7]])
        loader = DataLoader(found, batch_size=4, num_workers=workers)
        assert torch.equal(torch.cat([x for x, _ in loader]), expected)
    writer.wait_for_writers()
    assert len(list(tmp_path.glob("cache/*/*.safetensors"))) == 3
    assert not [*tmp_path.glob("cache/*/*.lock"), *tmp_path.glob("cache/*/.*.part")]
    assert pickle.loads(pickle.dumps(features)).kept == "disk"


def test_a_batch_of_the_device_knows_its_bounds_and_views(live, tmp_path):
    """As one on disk does."""
    features, _ = live.cached(data(), tmp_path, keep="device", views=2)

    assert torch.equal(features.batch([3], view=1), features.batch([3], view=0))  # no augmentation
    for indices, view in (([10], 0), ([-1], 0), ([0], 2)):
        with pytest.raises(IndexError, match=r"images \[-?\d+\] of 10, view \d of 2"):
            features.batch(indices, view)


class Halt:
    """Holds the thread that writes back until it is let go."""

    def __init__(self, monkeypatch, error=None):
        self.gate, save = threading.Event(), writer.save_file

        def waiting(*arguments):
            assert self.gate.wait(60)
            if error is not None:
                raise error
            save(*arguments)

        monkeypatch.setattr(writer, "save_file", waiting)

    def let_go(self):
        self.gate.set()
        writer.wait_for_writers()


def test_the_disk_is_written_beside_the_training(live, tmp_path, monkeypatch):
    """Features are used before a file is there; who needs the files waits for them."""
    halt = Halt(monkeypatch)
    features, rest = live.cached(data(), tmp_path, batch_size=2, keep="device")
    rest(features.batch(range(10))).sum().backward()

    assert not list(tmp_path.glob("*/*.safetensors"))
    halt.gate.set()
    again, _ = live.cached(data(), tmp_path, batch_size=2, keep="device")  # waits for the locks of the first
    assert again.computed == 0
    assert torch.equal(again.batch(range(10)), features.batch(range(10)))


def test_a_full_disk_ends_no_training(live, tmp_path, monkeypatch):
    """One warning; items and batches are there, what is to be read elsewhere is not; the next run computes again."""
    halt = Halt(monkeypatch, SafetensorError("No space left on device"))
    features, _ = live.cached(data(), tmp_path, batch_size=2, keep="device")
    with pytest.warns(FreezePlanWarning) as caught:
        halt.let_go()
    with pytest.raises(FreezePlanError) as error:
        pickle.dumps(features)

    reason = (
        f"{tmp_path}: features cannot be kept there: No space left on device\n"
        "  another folder: --cache-dir, in Python directory=; compare and run can do without: --no-cache"
    )
    assert str(error.value) == reason
    assert [str(warning.message) for warning in caught] == [
        f"training goes on with features in memory, and the next run computes them again: {reason}"
    ]
    assert torch.equal(features[3][0], features.batch([3])[0])
    assert not [*tmp_path.glob("*/*.safetensors"), *tmp_path.glob("*/*.lock"), *tmp_path.glob("*/.*.part")]
    monkeypatch.undo()
    assert live.cached(data(), tmp_path, batch_size=2)[0].computed == 10


def test_a_limit_that_is_reached_ends_no_training(live, tmp_path):
    """What other entries hold leaves no room; the limit is kept."""
    live.cached(data(), tmp_path)
    kept = store.used(tmp_path)
    other = TensorDataset(data().tensors[0] + 1)

    def cached():
        features, _ = live.cached(other, tmp_path, keep="device", limit=kept + 1000)
        writer.wait_for_writers()
        return features

    with pytest.warns(FreezePlanWarning, match="next run computes them again: .*the limit is"):
        features = cached()

    assert (features.kept, features.computed) == ("device", 10)
    assert store.used(tmp_path) <= kept + 1000


def test_an_error_that_nobody_foresaw_is_the_writers(live, tmp_path, monkeypatch):
    """It names the file; locks are given back."""
    monkeypatch.setattr(writer, "save_file", lambda *_: 1 / 0)
    with pytest.raises(FreezePlanError) as error:
        live.cached(data(), tmp_path)

    (folder,) = tmp_path.iterdir()
    assert str(error.value).startswith(f"{folder}/")
    assert str(error.value).endswith(".safetensors: features cannot be written: division by zero")
    assert not [*folder.glob("*.lock"), *folder.glob(".*.part")]


def test_what_does_not_fit_goes_to_the_next_place(live, tmp_path, monkeypatch):
    """Half of what is free is the most; said once."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 3840)
    assert live.cached(data(), tmp_path, keep="device")[0].kept == "device"
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 3840 - 1)
    with pytest.warns(FreezePlanWarning) as caught:
        features, _ = live.cached(data(), tmp_path, keep="device")

    assert features.kept == "disk"
    assert [str(warning.message) for warning in caught] == [
        "3,840 bytes of features are more than half of what is free (cpu has 7,679 free): they are kept on disk alone\n"
        "  dtype='bfloat16' takes half the room"
    ]


@pytest.mark.parametrize(
    ("keep", "gpu", "host", "place"),
    [
        ("auto", 200, 0, "device"),
        ("auto", 199, 200, "host"),
        ("auto", 199, 199, "disk"),
        ("host", 200, 200, "host"),
        ("disk", 200, 200, "disk"),
    ],
)
@pytest.mark.filterwarnings("ignore::freezeplan.errors.FreezePlanWarning")
def test_a_gpu_comes_before_the_host_and_the_host_before_the_disk(monkeypatch, keep, gpu, host, place):
    monkeypatch.setattr(memory, "free_memory", lambda device: gpu if device.type == "cuda" else host)

    assert memory.choose(keep, torch.device("cuda"), 100) == place


def test_what_is_free_here_is_a_part_of_what_there_is():
    assert 2**20 < memory.free_memory(torch.device("cpu")) < 2**50


class Normalise(nn.Module):
    def __init__(self, mean=0.5):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, images):
        assert images.dtype is torch.uint8
        return images.float() / 255 - self.mean


@pytest.mark.parametrize("keep", ["device", pytest.param("disk", marks=pytest.mark.slow)])
def test_bytes_are_hashed_and_prepared_on_the_device(live, tmp_path, keep, monkeypatch):
    """The features are those of prepared images; another preparation is another file; only bytes are hashed."""
    hashed, digest = [], reader.digest

    def counting(batches, *others):
        hashed.extend(batch.dtype for batch in batches)
        return digest(batches, *others)

    monkeypatch.setattr(fill, "digest", counting)
    images, labels = raw().tensors
    plain, _ = live.cached(TensorDataset(Normalise()(images), labels), tmp_path / "plain", batch_size=2)
    assert set(hashed) == {torch.float32}
    hashed.clear()
    features, rest = live.cached(raw(), tmp_path / "raw", batch_size=2, keep=keep, prepare=Normalise())
    again, _ = live.cached(list(raw()), tmp_path / "raw", batch_size=2, keep=keep, prepare=Normalise())
    other, _ = live.cached(raw(), tmp_path / "raw", batch_size=2, keep=keep, prepare=Normalise(0.4))

    assert set(hashed) == {torch.uint8}
    assert (features.computed, again.computed, other.computed) == (10, 0, 10)
    assert torch.equal(features.batch(range(10)), plain.batch(range(10)))
    assert not torch.equal(features.batch(range(10)), other.batch(range(10)))
    assert rest(features[0][0][None]).shape == (1, 3)


class Noise(nn.Module):
    def forward(self, images):
        return images + torch.rand(())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            torch.Tensor.float,
            "prepare is a torch.nn.Module, whose class, settings and tensors say what it does; found a "
            "method_descriptor\n  torchvision.transforms.v2.Compose([...]) is one",
        ),
        (
            nn.Identity(),
            "prepare makes of a batch of 3 images one of as many, floating-point; found torch.uint8 of shape "
            "(3, 3, 64, 64)\n  prepare takes (N, ...), as the data set's images are, and gives what the model gets",
        ),
        (
            Noise(),
            "prepare is not the same each time, and features are computed once\n"
            "  augment in the data set's transform, with views=4; prepare normalises",
        ),
    ],
    ids=["function", "bytes", "random"],
)
def test_a_preparation_that_is_none_is_refused(live, tmp_path, prepare, message):
    with pytest.raises(ApplyError) as error:
        live.cached(raw(), tmp_path, prepare=prepare)

    assert str(error.value) == message


def test_a_place_that_is_none_is_refused(live, tmp_path):
    with pytest.raises(ApplyError) as error:
        live.cached(data(), tmp_path, keep="gpu")

    assert str(error.value) == "keep is 'auto', 'device', 'host', 'disk', found 'gpu'"


@pytest.mark.parametrize("second", [1, 5])
def test_images_of_several_sizes_are_named(live, tmp_path, second):
    """Also where one of the first differs."""
    images = [torch.zeros(3, 64, 64)] * 8
    images[second] = torch.zeros(3, 72, 72)
    with pytest.raises(FreezePlanError) as error:
        live.cached(images, tmp_path)

    assert str(error.value) == (
        f"row {second} is torch.float32 of shape (3, 72, 72), the first image torch.float32 of shape (3, 64, 64)\n"
        "  features are kept of images of one size: resize and crop them in the transform"
    )


@pytest.mark.parametrize(
    "prepare", [pytest.param(None, id="floats"), pytest.param(Normalise(), id="bytes", marks=pytest.mark.slow)]
)
def test_one_loop_trains_every_phase(tmp_path, prepare):
    """Features where there are some, images where there are none; the loss is that of a loop on images."""
    dataset = data() if prepare is None else raw()
    losses = {}
    for way in ("images", "cached"):
        torch.manual_seed(0)
        model = create_model("test_resnet", num_classes=10)
        live = apply_plan(model, "head_then_all", lr=0.01)
        optimizer = torch.optim.SGD(live)
        losses[way], kinds = [], []
        for epoch in range(3):
            changed = live.step(epoch=epoch)
            if way == "images":
                images = dataset.tensors[0] if prepare is None else prepare(dataset.tensors[0])
                inputs, run = TensorDataset(images, dataset.tensors[1]), model
            elif changed or epoch == 0:
                inputs, run = live.cached(dataset, tmp_path, prepare=prepare)
                kinds.append(type(inputs))
            for x, y in DataLoader(inputs, batch_size=5):
                loss = nn.functional.cross_entropy(run.train()(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[way].append(float(loss.detach()))

    assert kinds == [Features, Images]
    assert losses["cached"] == pytest.approx(losses["images"], rel=1e-4)
    assert len(inputs) == 10
    assert str(inputs) == "10 images, no features of them: no frozen module runs ahead of what is trained"
    assert torch.equal(inputs.batch([1, 2])[0], inputs[1][0])
    assert torch.equal(inputs[-1][0], inputs[9][0])
    for wrong in (lambda: inputs[10], lambda: inputs.batch([10])):
        with pytest.raises(IndexError, match="of 10"):
            wrong()


def test_features_say_where_they_are(live, tmp_path):
    features, _ = live.cached(data(), tmp_path, keep="device")
    found, _ = live.cached(data(), tmp_path)

    assert str(features).startswith("features of 10 images, on cpu; 10 computed in ")
    assert str(found) == "features of 10 images, on disk; 0 computed in 0.0 s"
