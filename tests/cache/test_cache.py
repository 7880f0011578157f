"""Features on disk: computed once, never taken for others, whole or not there, and trained on like images."""

from __future__ import annotations

import json
import pickle
import random
import re
import time
from pathlib import Path

import filling
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import transforms
from typer.testing import CliRunner

from freezeplan import FreezePlanError, FreezePlanWarning, apply_plan
from freezeplan.cache import fill, reader, store, writer
from freezeplan.cache.replay import capture
from freezeplan.cli import app
from freezeplan.errors import ApplyError
from freezeplan.model.describer import create_model

EVERYTHING = {"match": ".*", "lr_mult": 1}


def data(count=10, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 3)


@pytest.fixture
def live():
    torch.manual_seed(0)
    return apply_plan(create_model("test_resnet", num_classes=3), "linear_probe", lr=0.1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(fill, "SHARD_BYTES", 4 * 64 * 64 * 3 * 4)


def test_features_are_the_models_answers_so_far(live, tmp_path):
    """In the data set's order and with its targets; a second call computes nothing and gives the same bits."""
    images, labels = data().tensors
    features, rest = live.cached(data(), tmp_path, batch_size=2)
    again, _ = live.cached(data(), tmp_path, batch_size=2)
    rest.eval()

    assert (features.computed, again.computed) == (10, 0)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3
    assert not list(tmp_path.glob("*/*.lock")) + list(tmp_path.glob("*/.*.part"))
    assert torch.equal(features.batch(range(10)), again.batch(range(10)))
    assert torch.allclose(rest(features.batch(range(10))), live.model(images), atol=1e-5)
    assert [int(label) for _, label in (features[i] for i in range(10))] == labels.tolist()
    with pytest.raises(IndexError):
        features[10]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_them_like_images(live, tmp_path, workers):
    """Shuffled, by worker processes too; the two changed lines of a training loop."""
    features, rest = live.cached(data(), tmp_path)
    rows = features.batch(range(10))
    loader = DataLoader(features, batch_size=4, shuffle=True, num_workers=workers)
    seen = [(x, y) for x, y in loader]

    assert sorted(len(x) for x, _ in seen) == [2, 4, 4]
    assert all(any(torch.equal(row, x[at]) for row in rows) for x, _ in seen for at in range(len(x)))
    assert rest(seen[0][0]).shape == (len(seen[0][0]), 3)
    assert torch.equal(pickle.loads(pickle.dumps(features)).batch([3]), rows[3:4])


def one_bit(live):
    weight = live.model.layer1[0].conv1.weight if hasattr(live.model.layer1[0], "conv1") else None
    weight = weight if weight is not None else next(live.model.layer1.parameters())
    weight.detach().view(torch.int32).view(-1)[0] ^= 1


def running_mean(live):
    next(buffer for name, buffer in live.model.named_buffers() if name.endswith("running_mean"))[0] += 1e-6


def trained(live):
    with torch.no_grad():
        live.model.fc.weight.add_(1)


@pytest.mark.parametrize(
    ("change", "dataset", "computed"),
    [
        pytest.param(one_bit, data(), 10, id="one-bit-of-a-weight"),
        pytest.param(running_mean, data(), 10, id="a-statistic", marks=pytest.mark.slow),
        pytest.param(lambda live: None, data(size=72), 10, id="another-size", marks=pytest.mark.slow),
        pytest.param(lambda live: None, data(seed=1), 10, id="other-images", marks=pytest.mark.slow),
        pytest.param(trained, data(), 0, id="what-is-trained-does-not-count"),
        pytest.param(lambda live: None, data(12), 4, id="two-more-images-touch-the-last-shard"),
    ],
)
def test_old_features_are_used_only_where_nothing_changed(live, tmp_path, change, dataset, computed):
    """Frozen weights, statistics, images and their size decide, bit by bit."""
    live.cached(data(), tmp_path, batch_size=4)
    change(live)
    features, rest = live.cached(dataset, tmp_path, batch_size=4)
    images = dataset.tensors[0]

    assert features.computed == computed
    assert torch.allclose(rest.eval()(features.batch(range(len(images)))), live.model(images), atol=1e-5)


def test_a_damaged_shard_is_computed_again(live, tmp_path):
    """Cut off by hand."""
    live.cached(data(), tmp_path)
    shard = min(tmp_path.glob("*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    features, rest = live.cached(data(), tmp_path)

    assert features.computed > 0
    assert torch.allclose(rest.eval()(features.batch(range(10))), live.model(data().tensors[0]), atol=1e-5)


def test_other_numbers_in_a_whole_shard_are_noticed(live, tmp_path):
    """Something that no digest covers: the first rows are compared with fresh ones."""
    live.cached(data(), tmp_path, batch_size=4)
    for shard in tmp_path.glob("*/*.safetensors"):
        bytes_ = bytearray(shard.read_bytes())
        bytes_[-384 * 4 :] = bytes(384 * 4)
        shard.write_bytes(bytes(bytes_))
    with pytest.raises(ApplyError) as error:
        live.cached(data(), tmp_path, batch_size=4)

    assert str(error.value) == (
        "the features on disk are not those that the model gives now\n"
        "  freezeplan cache rm, then again; if it stays so, the frozen part is not deterministic"
    )


class Augmented(Dataset):
    """Images with noise, from torch's random state, from Python's, or from one of its own."""

    def __init__(self, source):
        self.images, self.labels = data().tensors
        self.source = source
        self.own = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = {
            "torch": lambda: torch.randn(()),
            "python": lambda: random.random(),
            "own": lambda: torch.randn((), generator=self.own),
        }[self.source]()
        return self.images[index] + noise, self.labels[index]


class Transformed(Dataset):
    """Images with a transform; the first of them has a number that equals nothing."""

    def __init__(self, transform):
        self.images, self.labels = data().tensors
        self.images[0, 0, 0, 0] = float("nan")
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


@pytest.mark.parametrize(
    "transform",
    [
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.RandomErasing(0.25),
        transforms.RandomGrayscale(0.1),
        transforms.RandomApply([transforms.GaussianBlur(3)], 0.5),
        transforms.RandomHorizontalFlip(0.01),
        lambda image: image.flip(2) if random.random() < 0.01 else image,
        lambda image: image.flip(2) if np.random.rand() < 0.01 else image,
    ],
    ids=["flip", "vertical", "erasing", "grey", "apply", "seldom", "seldom-python", "seldom-numpy"],
)
def test_random_augmentation_is_refused(live, tmp_path, transform):
    """Also where it acts on none of the images that are looked at; random states stay the caller's."""
    states = torch.random.get_rng_state(), random.getstate()
    with pytest.raises(ApplyError) as error:
        live.cached(Transformed(transform), tmp_path)

    assert str(error.value) == (
        "image 0 is not the same each time: the data set augments at random, and features are computed once\n"
        "  views=4 keeps four fixed augmented versions of each image; or take the augmentation out"
    )
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_fixed_transform_is_no_augmentation(tmp_path):
    """Resizing and cropping draw nothing, and a number that equals nothing, not even itself, is the same each time."""
    fixed = transforms.Compose([transforms.Resize(72), transforms.CenterCrop(64)])
    reader.check_fixed(Transformed(fixed), 1, 0)
    reader.check_fixed(Transformed(transforms.RandomErasing(0.25)), 2, 0)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (
            1,
            "image 0 is not the same each time: the data set augments at random, and features are computed once\n"
            "  views=4 keeps four fixed augmented versions of each image; or take the augmentation out",
        ),
        (
            2,
            "image 0 is not the same twice for the same seed: its augmentation draws from a random state of its own\n"
            "  let it draw from torch's, NumPy's or Python's global random state",
        ),
    ],
)
def test_augmentation_that_no_seed_reaches_is_refused(live, tmp_path, views, message):
    """Drawn from a random state of its own, without views and with them."""
    with pytest.raises(ApplyError) as error:
        live.cached(Augmented("own"), tmp_path, views=views)

    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["torch", pytest.param("python", marks=pytest.mark.slow)])
def test_views_are_drawn_once_from_a_seed(live, tmp_path, source):
    """K versions of each image, the same in every run; an item is one of them; random states stay the caller's."""
    state, python = torch.random.get_rng_state(), random.getstate()
    features, _ = live.cached(Augmented(source), tmp_path, views=3)
    again, _ = live.cached(Augmented(source), tmp_path, views=3)
    other, _ = live.cached(Augmented(source), tmp_path, views=3, seed=1)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert random.getstate() == python
    assert (len(features), features.computed, again.computed, other.computed) == (10, 30, 0, 30)
    views = [features.batch([4], view)[0] for view in range(3)]
    assert len({tuple(view.tolist()) for view in views}) == 3
    drawn = {tuple(features[4][0].tolist()) for _ in range(60)}
    assert drawn == {tuple(view.tolist()) for view in views}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_the_room(live, tmp_path, dtype, tolerance):
    """Two bytes a number, and the error that they cost."""
    whole, _ = live.cached(data(), tmp_path)
    half, rest = live.cached(data(), tmp_path, dtype=dtype)
    exact = whole.batch(range(10))

    assert half[0][0].dtype is getattr(torch, dtype)
    assert (half.batch(range(10)).float() - exact).abs().max() <= tolerance * exact.abs().max()
    assert rest(half.batch(range(10))).dtype is torch.float32


def test_what_a_data_type_cannot_hold_is_refused(live, tmp_path):
    """float16 ends at 65,504; nothing is left behind."""
    with torch.no_grad():
        for parameter in live.model.layer4.parameters():
            parameter.mul_(1e4)
    with pytest.raises(FreezePlanError) as error:
        live.cached(data(), tmp_path, dtype="float16")

    assert re.fullmatch(r"a feature of \S+ is too large for float16\n  dtype='bfloat16' or 'float32'", str(error.value))
    assert not list(tmp_path.glob("*/*.safetensors"))


@pytest.mark.slow
def test_a_bound_on_size_is_kept(live, tmp_path):
    """Before it is exceeded, with what is needed and what is there."""
    with pytest.raises(FreezePlanError) as small:
        live.cached(data(), tmp_path, limit=1000)
    live.cached(data(), tmp_path, limit=10_000)
    kept = store.used(tmp_path)
    with pytest.raises(FreezePlanError) as full:
        live.cached(data(seed=1), tmp_path, limit=kept + 1000)

    assert str(small.value) == (
        f"{tmp_path}: these features take 3,840 bytes, and the limit is 1,000\n"
        "  a larger limit, fewer views, or dtype='float16'"
    )
    assert str(full.value) == (
        f"{tmp_path}: 3,840 bytes of features would make {kept + 3840:,}, and the limit is {kept + 1000:,}\n"
        f"  freezeplan cache rm --dir {tmp_path} KEY, a larger limit, or dtype='float16'"
    )
    assert store.used(tmp_path) <= kept + 1000


def test_what_is_no_image_is_named(live, tmp_path):
    """Bytes, other things, and images of several sizes."""
    mixed = [*data(5), *data(5, size=72)]
    messages = []
    for wrong in ([(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * 3, [{"image": 0}] * 3, mixed):
        with pytest.raises(FreezePlanError) as error:
            live.cached(wrong, tmp_path)
        messages.append(str(error.value))
    with pytest.raises(ApplyError) as empty:
        live.cached([], tmp_path)

    transform = "\n  let the data set's transform end in ToTensor and Normalize, as for training"
    transform += "\n  of bytes: prepare=module, which takes a batch of them and gives what the model gets"
    begins = "an item of the data set is an image, or begins with one, as a floating-point tensor; found a "
    assert messages == [
        f"{begins}torch.uint8 tensor{transform}",
        "an item is a mapping, and none of its values is a floating-point tensor (C, H, W); it has 'image' (int)\n"
        "  let the data set's transform end in ToTensor and Normalize, as for training",
        "row 5 is torch.float32 of shape (3, 72, 72), the first image torch.float32 of shape (3, 64, 64)\n"
        "  features are kept of images of one size: resize and crop them in the transform",
    ]
    assert str(empty.value) == "features need at least one image, one view and one image a pass, found 0, 1 and 32"


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


TENSORS = "\n  torch.utils.data.TensorDataset(images, labels) makes one of tensors"


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        (
            DataLoader(data()),
            {},
            "features are kept of a data set, image by image; found a DataLoader\n"
            "  applied.cached(loader.dataset, ...), and a DataLoader of what it gives",
        ),
        (
            Stream(),
            {},
            f"features are kept of a data set with len(dataset) and dataset[index]; found a Stream{TENSORS}",
        ),
        (
            data().tensors[0],
            {},
            f"features are kept of a data set with len(dataset) and dataset[index]; found a Tensor{TENSORS}",
        ),
        (data(), {"dtype": "int8"}, "dtype is 'float32', 'float16', 'bfloat16', found 'int8'"),
        (data(), {"batch_size": 2.0}, "batch_size is a whole number > 0, found 2.0"),
        (data(), {"views": "2"}, "views is a whole number > 0, found '2'"),
        (data(), {"views": 0}, "features need at least one image, one view and one image a pass, found 10, 0 and 32"),
    ],
    ids=["loader", "stream", "tensor", "dtype", "part of an image", "words", "views"],
)
def test_arguments_that_are_none_are_refused(live, tmp_path, dataset, arguments, message):
    """One error each, before anything is computed."""
    with pytest.raises(ApplyError) as error:
        live.cached(dataset, tmp_path, **arguments)

    assert str(error.value) == message


@pytest.mark.parametrize("index", [slice(3), torch.tensor([0, 1]), [0, 1]], ids=["slice", "tensor", "list"])
def test_an_item_is_one_images(live, tmp_path, index):
    """Any integer names it, a batch has another method."""
    features, _ = live.cached(data(), tmp_path)
    with pytest.raises(ApplyError) as error:
        features[index]
    messages = []
    for indices, view in (([10], 0), ([-1], 0), ([0], 1)):
        with pytest.raises(IndexError) as beyond:
            features.batch(indices, view)
        messages.append(str(beyond.value))

    assert str(error.value) == (
        f"an item is one image's, by its number; found a {type(index).__name__}\n"
        "  features.batch([0, 1, 2]) gives several images' features in one tensor"
    )
    assert messages == [
        "images [10] of 10, view 0 of 1",
        "images [-1] of 10, view 0 of 1",
        "images [0] of 10, view 1 of 1",
    ]
    assert torch.equal(features[torch.tensor(1)][0], features[np.int64(1)][0])
    assert torch.equal(features[-9][0], features[1][0])


class Files(Dataset):
    """Images in files, as ``ImageFolder`` reads them."""

    def __init__(self, folder):
        self.files = sorted(folder.glob("*.png"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return transforms.functional.to_tensor(Image.open(self.files[index])), index


@pytest.mark.slow
def test_one_changed_file_costs_its_shard(live, tmp_path):
    """Of twelve in three shards; a name or a date of change decides nothing."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    before, _ = live.cached(Files(tmp_path / "images"), tmp_path / "cache", batch_size=4)
    changed = tmp_path / "images" / "05.png"
    pixels = np.array(Image.open(changed))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    (tmp_path / "images" / "11.png").touch()
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "000.png")
    after, rest = live.cached(Files(tmp_path / "images"), tmp_path / "cache", batch_size=4)
    images = torch.stack([image for image, _ in Files(tmp_path / "images")])

    assert (before.computed, after.computed) == (12, 4)
    assert torch.equal(before.batch(range(4)), after.batch(range(4)))
    assert torch.allclose(rest.eval()(after.batch(range(12))), live.model(images), atol=1e-5)


def test_a_plan_without_a_prefix_is_refused(tmp_path):
    """Nothing is kept where all is trained; little is kept with a warning."""
    live = apply_plan(create_model("test_resnet", num_classes=3), "full")
    with pytest.raises(ApplyError) as error:
        live.cached(data(), tmp_path)
    live.undo()
    assert str(error.value) == (
        "there is nothing to cache: no frozen layer before the first trained one can be cached\n"
        "  train on images, with the same plan"
    )
    with (
        apply_plan(live.model, "norm_only") as live,
        pytest.warns(FreezePlanWarning, match="larger than the images"),
    ):
        live.cached(data(), tmp_path)


@pytest.mark.slow
def test_phases_find_their_features(tmp_path):
    """What a later phase needs is kept in the same pass: a phase that thaws a part computes nothing anew."""
    rules = [{"stage": "..2", "frozen": True}, {"role": "body", "frozen": True}]
    plan = {
        "version": 1,
        "phases": [{"name": "head", "until": 1, "rules": rules[1:]}, {"name": "last", "rules": rules[:1]}],
        "rules": [EVERYTHING],
    }
    model = create_model("resnet18", num_classes=3)
    live = apply_plan(model, plan, lr=0.1)
    batch, _ = data().tensors
    features, _ = live.cached(data(), tmp_path)
    live.step(epoch=0)
    with torch.no_grad():
        model.fc.weight.add_(0.1)
    assert live.step(epoch=1)
    later, rest = live.cached(data(), tmp_path)

    assert (features.computed, later.computed) == (10, 0)
    assert later.batch([0]).shape[1] > features.batch([0]).shape[1]
    assert torch.allclose(rest.eval()(later.batch(range(10))), model(batch), rtol=1e-4, atol=1e-4)
    assert sorted(entry.about["plan"] for entry in store.entries(tmp_path)) == [
        "plan, phase head",
        "plan, phase last",
    ]


def frozen_up_to(*stages):
    """A plan whose phases freeze these stages, an epoch each, and train the rest."""
    phases = [
        {"name": f"up to {stage}", "until": number + 1, "rules": [{"stage": f"..{stage}", "frozen": True}]}
        for number, stage in enumerate(stages)
    ]
    del phases[-1]["until"]
    return {"version": 1, "phases": phases, "rules": [EVERYTHING]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "from_pixels"),
    [
        pytest.param((4, 3, 2), [True, False, False], id="thawed"),
        pytest.param((2, 3, 4), [True, False, False], id="frozen"),
        pytest.param((3, 4, 2), [True, True, False], id="frozen-and-thawed"),
    ],
)
def test_three_phases_run_the_first_layers_once(tmp_path, monkeypatch, stages, from_pixels):
    """Thawing: what later phases need is kept in the first pass. Freezing: old features go through what is frozen now.

    Where a later phase needs features from further ahead than the old ones are, all are computed from pixels again.
    """
    torch.manual_seed(0)
    model = create_model("test_convnext", num_classes=3)
    live = apply_plan(model, frozen_up_to(*stages), lr=0.1)
    images, _ = data(40).tensors
    pixels = []

    def counting(model, prefixes, given, earlier=None):
        pixels[-1] += len(given) if earlier is None else 0
        return capture(model, prefixes, given, earlier)

    monkeypatch.setattr(fill, "capture", counting)
    for epoch in range(3):
        live.step(epoch=epoch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01 if parameter.requires_grad else 1)
        pixels.append(0)
        features, rest = live.cached(data(40), tmp_path, batch_size=4)
        again, _ = live.cached(data(40), tmp_path, batch_size=4)

        assert again.computed == 0
        assert torch.allclose(rest.eval()(features.batch(range(40))), model(images), rtol=1e-4, atol=1e-4)

    assert pixels == [40 * anew for anew in from_pixels]


def test_caching_changes_nothing(live, tmp_path):
    """Weights, buffers, modes, random state."""
    live.model.eval()
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    state = torch.random.get_rng_state()
    live.seal()
    live.cached(data(), tmp_path)

    assert live.verify()
    assert all(torch.equal(before[name], value) for name, value in live.model.state_dict().items())
    assert not any(module.training for module in live.model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_features_are_computed_channels_last(live, tmp_path):
    """The convolutions lie so only meanwhile, and the features are those of the plain pass."""
    weights = [module.weight for module in live.model.modules() if isinstance(module, torch.nn.Conv2d)]
    before = [(weight.stride(), weight.data_ptr(), weight.detach().clone()) for weight in weights]
    plain = capture(live.model.train(), [live.prefix(data().tensors[0])], data().tensors[0])[0]
    seen = []

    def progress(*_):
        seen.append([weight.is_contiguous(memory_format=torch.channels_last) for weight in weights])

    features, _ = live.cached(data(), tmp_path, progress=progress)

    assert seen
    assert all(map(all, seen))
    assert not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for weight, (strides, place, value) in zip(weights, before, strict=True):
        assert (weight.stride(), weight.data_ptr()) == (strides, place)
        assert torch.equal(weight, value)
    assert torch.allclose(features.batch(range(10)), plain, rtol=1e-5, atol=1e-5)


class Viewing(torch.nn.Module):
    """Code that wants the axes of a convolution's answer one behind the other."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, 16), Flat())
        self.head = torch.nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.part(x))


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_a_model_that_takes_no_channels_last_is_left_as_it_is(tmp_path):
    """Tried on the first images."""
    plan = {"version": 1, "rules": [{"match": "head", "lr_mult": 1}, {"match": ".*", "frozen": True}]}
    model = Viewing()
    features, rest = apply_plan(model, plan).cached(data(), tmp_path)

    assert torch.equal(rest(features.batch(range(10))), model(data().tensors[0]))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model.to(memory_format=torch.channels_last)(data().tensors[0])


def test_list_and_remove(live, tmp_path):
    """``freezeplan cache ls`` and ``rm``, by key, by its beginning, or everything."""
    live.cached(data(), tmp_path)
    live.cached(data(), tmp_path, dtype="float16")
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["cache", "ls", "--dir", str(tmp_path), "--json"]).stdout)
    text = runner.invoke(app, ["cache", "ls", "--dir", str(tmp_path)], env={"COLUMNS": "80"}).stdout
    removed = runner.invoke(app, ["cache", "rm", listed[0]["key"][:10], "--dir", str(tmp_path)]).stdout

    assert {entry["about"]["dtype"] for entry in listed} == {"float32", "float16"}
    assert all(entry["about"]["memoised"] == ["global_pool"] and entry["shards"] == 1 for entry in listed)
    assert all(entry["key"] in text for entry in listed)
    assert text.count("  linear_probe on test_resnet, up to global_pool\n") == 2
    assert removed.replace("\n", "") == f"{tmp_path}: removed 1 entry, {listed[0]['bytes']:,} bytes"
    assert [entry.key for entry in store.entries(tmp_path)] == [listed[1]["key"]]
    with pytest.raises(FreezePlanError) as error:
        store.remove(tmp_path, ["nothing"])
    assert str(error.value) == (f"{tmp_path}: no entry has the key 'nothing'\n  freezeplan cache ls --dir {tmp_path}")
    assert runner.invoke(app, ["cache", "rm", "--dir", str(tmp_path)]).exit_code == 2
    runner.invoke(app, ["cache", "rm", "--all", "--dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
    assert "no features are kept" in runner.invoke(app, ["cache", "ls", "--dir", str(tmp_path)]).stdout


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_folder_that_cannot_be_used_is_named(live, tmp_path, below):
    """A file where the folder, or one above it, would be."""
    (tmp_path / "file").write_text("")
    where = Path(f"{tmp_path}/file{below}")
    with pytest.raises(FreezePlanError) as error:
        live.cached(data(), where)
    listed = CliRunner().invoke(app, ["cache", "ls", "--dir", str(where)])

    assert str(error.value) == (
        f"{where}: features cannot be kept there: Not a directory\n"
        "  another folder: --cache-dir, in Python directory=; compare and run can do without: --no-cache"
    )
    assert (listed.exit_code, store.entries(where)) == (0, ())


@pytest.mark.parametrize(
    "about", ["", "{", *(pytest.param(text, marks=pytest.mark.slow) for text in ("{}", "[]", '{"model": 1}', "\udcff"))]
)
def test_what_an_entry_says_of_itself_may_be_damaged(live, tmp_path, about):
    """It is left out of the list, its shards are used, and it is written anew."""
    live.cached(data(), tmp_path)
    file = next(tmp_path.glob("*/about.json"))
    whole = file.read_text()
    file.write_bytes(about.encode(errors="surrogateescape"))
    listed = CliRunner().invoke(app, ["cache", "ls", "--dir", str(tmp_path)])
    empty = store.entries(tmp_path)
    features, _ = live.cached(data(), tmp_path)

    assert (listed.exit_code, empty, features.computed) == (0, (), 0)
    assert file.read_text() == whole
    assert len(store.entries(tmp_path)) == 1


@pytest.mark.slow
def test_an_entry_may_go_while_it_is_written(live, tmp_path):
    """As by ``freezeplan cache rm`` in another process: what comes after is kept, and listed."""
    gone = []

    def progress(done, rows):
        if not gone:
            gone.append(store.remove(tmp_path, [entry.key for entry in store.entries(tmp_path)]))

    with pytest.raises(FreezePlanError) as error:
        live.cached(data(), tmp_path, batch_size=4, progress=progress)

    assert gone[0] > 0
    assert [entry.shards for entry in store.entries(tmp_path)] == [2]
    assert re.fullmatch(
        rf"{tmp_path}/\w+/\w+\.safetensors: these features are gone or damaged since they were computed\n"
        r"  applied\.cached\(\.\.\.\) again computes what is missing; freezeplan cache rm removes entries",
        str(error.value),
    )
    again, _ = live.cached(data(), tmp_path, batch_size=4)
    assert again.computed == 4


def test_a_full_disk_is_an_error_of_the_folder(live, tmp_path, monkeypatch):
    """Told by the library that writes the file, in words of its own."""

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(FreezePlanError) as error:
        live.cached(data(), tmp_path)

    assert str(error.value).startswith(f"{tmp_path}: features cannot be kept there: No space left on device\n")


@pytest.mark.slow
def test_what_cannot_be_removed_is_named(live, tmp_path, monkeypatch):
    """An entry that another process removes at the same time is no error, one that the system protects is."""
    live.cached(data(), tmp_path)
    (entry,) = store.entries(tmp_path)

    def raising(error):
        def rename(*_):
            raise error

        monkeypatch.setattr(Path, "rename", rename)

    raising(PermissionError(13, "Permission denied"))
    with pytest.raises(FreezePlanError) as error:
        store.remove(tmp_path, [entry.key])
    raising(FileNotFoundError(2, "No such file or directory"))

    assert str(error.value) == f"{tmp_path / entry.key}: it cannot be removed: Permission denied"
    assert store.remove(tmp_path, [entry.key]) == entry.bytes


@pytest.mark.slow
def test_what_killed_processes_left_goes_with_the_next_write(live, tmp_path):
    """The one who writes the shard again writes over a half-written one."""
    live.cached(data(), tmp_path)
    shard = max(tmp_path.glob("*/*.safetensors"))
    shard.with_name(f".{shard.name}.part").write_bytes(b"half")
    shard.unlink()
    live.cached(data(), tmp_path)

    assert shard.exists()
    assert not list(tmp_path.glob("*/.*.part"))


def another_process(context, *arguments):
    """Start ``filling.tell`` in another process; the process, and what it says."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=filling.tell, args=(sender, *arguments))
    process.start()
    sender.close()
    return process, receiver


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, forked):
    """Each shard is computed by one of them, and both have all of it."""
    running = [another_process(forked, tmp_path) for _ in range(2)]
    (mine, a), (yours, b) = ([receiver.recv(), receiver.recv()][1] for _, receiver in running)
    for process, _ in running:
        process.join()

    assert mine + yours == filling.IMAGES
    assert (a == b).all()


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "times"), [("disk", 10), ("device", 5)])
def test_killed_many_times(tmp_path, keep, times, forked, monkeypatch):
    """At random moments: what is there is whole, and the rerun's features are those of an uninterrupted run.

    Each waits for a random number of shards and a little longer: a fast or a busy machine is hit in the middle too.
    """
    monkeypatch.setattr(fill, "SHARD_BYTES", fill.SHARD_BYTES)  # which filling sets
    threads = torch.get_num_threads()
    chance, partly = random.Random(0), 0
    try:
        _, expected = filling.fill_folder(tmp_path / "whole")
        for number in range(times):
            where = tmp_path / f"killed{number}"
            process, receiver = another_process(forked, where, keep)
            receiver.recv()
            moment = chance.randrange(10)
            while len(list(where.glob("*/*.safetensors"))) < moment and process.is_alive():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
            process.join()
            kept = len(list(where.glob("*/*.safetensors")))
            partly += 0 < kept < filling.IMAGES // filling.SHARD
            computed, features = filling.fill_folder(where)

            assert computed == filling.IMAGES - filling.SHARD * kept
            assert torch.equal(features, expected)
            assert not list(where.glob("*/.*.part"))
    finally:
        torch.set_num_threads(threads)
    assert partly >= 2
