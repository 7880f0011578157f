"""Features of data sets whose items are mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from freezeplan import apply_plan
from freezeplan.errors import ApplyError


class Mappings(Dataset[Any]):
    """Items with an image, a label and a name."""

    def __init__(self, **more: Any):
        self.images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        self.more = more

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": index % 3, "name": str(index), **self.more}


class Named(nn.Module):
    """A model that is called as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        logits = self.head(self.backbone(pixel_values)) * scale
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Named()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_rest_of_an_item_keeps_its_keys(model: nn.Module, tmp_path: Path, workers: int) -> None:
    applied = apply_plan(model, "linear_probe")
    features, _ = applied.cached(Mappings(), tmp_path, batch_size=2, workers=workers)
    batch = next(iter(DataLoader(features, batch_size=6)))
    assert list(batch) == ["pixel_values", "labels", "name"]
    assert batch["labels"].tolist() == [0, 1, 2] * 2
    assert batch["name"] == list("012345")
    assert torch.equal(batch["pixel_values"], features.batch(range(6)))
    bare, _ = applied.cached(TensorDataset(Mappings().images), tmp_path, batch_size=2)
    assert bare.computed == 0  # the same images, so the same files
    assert torch.equal(bare.batch(range(6)), batch["pixel_values"])


def test_features_go_where_images_go(model: nn.Module, tmp_path: Path) -> None:
    features, rest = apply_plan(model, "linear_probe").cached(Mappings(), tmp_path)
    batch = next(iter(DataLoader(features, batch_size=6)))
    given, labels = batch["pixel_values"], batch["labels"]
    one = rest(pixel_values=given, labels=labels, scale=2.0)
    two = rest(given, labels, scale=2.0)
    assert torch.equal(one["loss"], two["loss"])
    assert torch.equal(one["logits"], 2 * rest(given)["logits"])
    with pytest.raises(ApplyError, match="features are the first argument, or pixel_values=; found labels"):
        rest(labels=labels)


def test_an_image_is_named_where_there_are_several(model: nn.Module, tmp_path: Path) -> None:
    applied = apply_plan(model, "linear_probe")
    data = Mappings(depth=torch.zeros(1, 64, 64))
    with pytest.raises(ApplyError, match=r"2 of its values are a floating-point tensor \(C, H, W\)") as found:
        applied.cached(data, tmp_path)
    assert "image='pixel_values'" in str(found.value)
    features, _ = applied.cached(data, tmp_path, image="pixel_values")
    assert features[1]["depth"].shape == (1, 64, 64)


@pytest.mark.parametrize(
    ("data", "image", "message"),
    [
        (Mappings(), "image", "the items have no 'image'; they have 'pixel_values' "),
        (Mappings(pixel_values="a.jpg"), None, "none of its values is a floating-point tensor"),
        (TensorDataset(torch.rand(3, 3, 64, 64)), "image", "a key of items that are mappings; found a tuple"),
    ],
)
def test_what_is_no_image_is_refused(
    model: nn.Module, tmp_path: Path, data: Any, image: str | None, message: str
) -> None:
    with pytest.raises(ApplyError, match=message):
        apply_plan(model, "linear_probe").cached(data, tmp_path, image=image)
    assert list(tmp_path.iterdir()) == []


def test_a_phase_without_features_gives_the_items_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    applied = apply_plan(model, {"version": 1, "phases": [{"name": "all"}], "rules": [{"match": ".*", "lr_mult": 1}]})
    images, run = applied.cached(Mappings(), tmp_path)
    assert run is model
    assert list(images[2]) == ["pixel_values", "labels", "name"]
    assert torch.equal(images[2]["pixel_values"], Mappings().images[2])


class Siamese(nn.Module):
    """A model that compares two images, each with the same backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.head = nn.Linear(2 * self.backbone.num_features, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        one, two = self.backbone(left), self.backbone(right)
        return self.head(torch.cat([one - two, one * two], 1)) * scale


class Towers(Siamese):
    """Two backbones, of which the plan trains one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = timm.create_model("test_resnet", num_classes=0)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        one, two = self.backbone(left), self.other(right)
        return self.head(torch.cat([one - two, one * two], 1)) * scale


def pairs(mapping: bool) -> tuple[Any, Any]:
    """Pairs of images and whether they show the same thing; and where the images are."""
    images = torch.rand(2, 6, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not mapping:
        return TensorDataset(images[0], torch.arange(6) % 2, images[1]), (0, 2)
    items = [{"left": a, "label": at % 2, "right": b} for at, (a, b) in enumerate(zip(*images, strict=True))]
    return items, ("left", "right")


def trained_on(run: nn.Module, applied: Any, batches: Any) -> list[float]:
    optimizer = torch.optim.SGD(applied, lr=0.05)
    run.train()
    losses = []
    for images, labels in batches:
        loss = nn.functional.cross_entropy(run(*images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [True, False], ids=["mappings", "tuples"])
def test_several_images_of_an_item_are_cached(tmp_path: Path, mapping: bool) -> None:
    """The losses are those of a training on images, and each pair is computed once."""
    data, image = pairs(mapping)
    losses = []
    for kept in (False, True):
        torch.manual_seed(0)
        model = Siamese().double()
        applied = apply_plan(model, "linear_probe")
        run: nn.Module = model
        given: Any = data
        if kept:
            given, run = applied.cached(data, tmp_path, image=image, batch_size=3)
            assert given.computed == 6
            assert given.batch([0]).shape == (1, 2 * model.backbone.num_features)
        loader = [next(iter(DataLoader(given, batch_size=6)))] * 3
        first, second, label = ("left", "right", "label") if mapping else (0, 2, 1)
        if kept:
            batches = [((batch[first],), batch["label" if mapping else 1]) for batch in loader]
        else:
            batches = [((batch[first], batch[second]), batch[label]) for batch in loader]
        losses.append(trained_on(run, applied, batches))
        assert model(torch.rand(2, 3, 64, 64).double(), torch.rand(2, 3, 64, 64).double()).shape == (2, 2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)  # double precision: far above what kernels differ by
    assert losses[0][2] < losses[0][0]
    again, _ = applied.cached(data, tmp_path, image=image, batch_size=3)
    assert again.computed == 0


@pytest.mark.slow
def test_one_tower_is_cached_and_the_other_reads_images(tmp_path: Path) -> None:
    data, image = pairs(mapping=False)
    rules = [{"match": "backbone", "frozen": True}, {"match": ".*", "lr_mult": 1}]
    applied = apply_plan(Towers().double(), {"version": 1, "rules": rules})
    assert "what is trained reads the image itself" in str(applied.prefix(data.tensors[0][:2], data.tensors[2][:2]))
    with pytest.raises(ApplyError, match="there is nothing to cache"):
        applied.cached(data, tmp_path, image=image)
    frozen = [{"match": "backbone|other", "frozen": True}, {"match": ".*", "lr_mult": 1}]
    applied.undo()
    features, rest = apply_plan(applied.model, {"version": 1, "rules": frozen}).cached(data, tmp_path, image=image)
    both = applied.model.eval()(data.tensors[0], data.tensors[2], scale=2.0)
    torch.testing.assert_close(rest.eval()(features.batch(range(6)), scale=2.0), both)


def test_images_of_an_item_that_differ_in_size_are_refused(tmp_path: Path) -> None:
    items = [(torch.rand(3, 64, 64), torch.rand(3, 32, 32), 1)] * 4
    with pytest.raises(ApplyError) as found:
        apply_plan(Siamese(), "linear_probe").cached(items, tmp_path, image=(0, 1))  # type: ignore[arg-type]
    assert str(found.value) == (
        "the images of an item are torch.float32 of shape (3, 32, 32), torch.float32 of shape (3, 64, 64); they have "
        "to be tensors of one shape and type\n  resize, crop and convert them in the transform"
    )
    with pytest.raises(ApplyError, match=r"the items have no 5; they have 0 \(torch.float32 of shape"):
        apply_plan(Siamese(), "linear_probe").cached(items, tmp_path, image=(0, 5))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_phase_without_features_gives_all_images_of_an_item(tmp_path: Path) -> None:
    data, image = pairs(mapping=False)
    plan = {"version": 1, "phases": [{"name": "all"}], "rules": [{"match": ".*", "lr_mult": 1}]}
    images, _ = apply_plan(Siamese().double(), plan).cached(data, tmp_path, image=image)
    assert all(torch.equal(one, two) for one, two in zip(images[3], data[3], strict=True))
    assert images.batch([1, 2]).shape == (2, 2, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "TimmWrapper"])
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_transformers_trainer_trains_on_features(tmp_path: Path, kind: str) -> None:
    """The losses are those of the same training on images."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def losses(kept: bool) -> list[float]:
        torch.manual_seed(0)
        if kind == "own":
            model: nn.Module = Named().double()
        else:
            config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=3)
            model = transformers.TimmWrapperForImageClassification(config).double()
        applied = apply_plan(model, "linear_probe", lr=0.01)
        data: Any = Mappings()
        data.images, run = data.images.double(), model
        if kept:
            data, run = applied.cached(data, tmp_path / "features")
        arguments = transformers.TrainingArguments(
            str(tmp_path / "run"), num_train_epochs=3, per_device_train_batch_size=3, logging_steps=1, use_cpu=True,
            save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip

        def collate(found: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {
                "pixel_values": torch.stack([item["pixel_values"] for item in found]).double(),
                "labels": torch.tensor([item["labels"] for item in found]),
            }

        optimizer = torch.optim.SGD(applied)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = transformers.Trainer(
            run, arguments, data_collator=collate, train_dataset=data, optimizers=(optimizer, schedule)
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, kept = losses(False), losses(True)
    assert len(plain) == 6
    assert kept == pytest.approx(plain, rel=1e-4)  # features are stored in single precision
    assert len(set(plain)) > 1
