"""Folders by their names: the usual words for splits in any case, and nothing that is left out without a word."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from freezeplan.errors import DataError
from freezeplan.training.compare import decode_photos
from freezeplan.training.compare_command import eval_transform
from freezeplan.training.folders import TRAIN, VAL, read_folders
from freezeplan.training.parts import in_parts
from freezeplan.training.photos import read_photos, without_bad
from freezeplan.training.settings import Settings

CASES = {"lower": str.lower, "Title": str.title, "UPPER": str.upper}
SPLITS = (
    "training images are in train or training, validation images in val, valid, validation, dev, eval, evaluation, "
    "test or testing, in any case; rename the folder, or move it away"
)
LAYOUT = "one folder a class: photos/rose/1.jpg; or train/rose/1.jpg and val/rose/2.jpg"


def picture(kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 10)).save(content, kind)
    return content.getvalue()


def made(where: Path, *names: str) -> Path:
    for name in names:
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    return where


def inside(folder: str, images: int = 1) -> list[str]:
    return [f"{folder}/{name}/{number}.jpg" for name in ("rose", "tulip") for number in range(images)]


def refusal(*names: str) -> str:
    with pytest.raises(DataError) as caught:
        read_folders(names, "photos")
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("val", VAL)
@pytest.mark.parametrize("train", TRAIN)
def test_the_usual_words_for_splits_are_read_in_any_case(train: str, val: str, case: str) -> None:
    train, val = CASES[case](train), CASES[case](val)

    found = read_folders([*inside(train, 3), *inside(val)], "photos")

    assert list(found.train) == inside(train, 3)
    assert list(found.val) == inside(val)
    assert (found.splits, found.notes) == ((train, val), ())
    assert set(found.train.values()) == set(found.val.values()) == {"rose", "tulip"}


@pytest.mark.parametrize(("train", "val"), [("train", "Val"), ("training", "testing"), ("TRAIN", "dev")])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_the_validation_images_are_the_users_own(train: str, val: str, packed: bool, tmp_path: Path) -> None:
    path = made(tmp_path / "photos", *inside(train, 4), *inside(val, 2))
    if packed:
        path = tmp_path / "photos.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "photos", "photos")

    data = read_photos(path)

    assert (len(data.train), len(data.val), data.note) == (8, 4, f"split as in its folders {train} and {val}")


@pytest.mark.parametrize("val", VAL)
def test_the_usual_words_are_read_in_a_table_and_what_is_unused_is_said(val: str, tmp_path: Path) -> None:
    names = made(tmp_path, *inside("a", 2), *inside("b"), *inside("c")) and [*inside("a", 2), *inside("b")]
    rows = [f"{name},{name.split('/')[1]},{'Train' if name[0] == 'a' else val.upper()}" for name in names]
    (tmp_path / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    data = read_photos(tmp_path / "photos.csv")
    more = [f"{name},{name.split('/')[1]},Testing" for name in inside("c")]
    (tmp_path / "more.csv").write_text("\n".join(["path,label,split", *rows, *more]))

    assert (len(data.train), len(data.val), data.note) == (4, 2, f"split as in its column: train and {val}")
    if val != "testing":
        assert read_photos(tmp_path / "more.csv").note == f"split as in its column: train and {val}; unused: testing"


def test_validation_images_come_before_test_images_and_these_are_said_to_be_unused() -> None:
    for number, val in enumerate(VAL):
        found = read_folders([*inside("train"), *(name for word in VAL[number:] for name in inside(word.title()))], "")

        assert found.splits == ("train", val.title())
        rest = sorted(word.title() for word in VAL[number + 1 :])
        shown = ", ".join(rest[:5]) + (f" and {len(rest) - 5} more" if len(rest) > 5 else "")
        assert found.notes == ((f"unused: {shown}",) if rest else ())


def test_a_second_folder_of_training_images_is_said_to_be_unused(tmp_path: Path) -> None:
    data = read_photos(made(tmp_path, *inside("train", 5), *inside("training", 5)))

    assert (len(data.train), len(data.val)) == (8, 2)
    assert data.note == "no validation split: 20% of each class, by seed 0; unused: training"


STRANGE = {
    "one": (("train", "holdout"), "train", "beside it is 'holdout', no split"),
    "several": (("Train", "fold2", "extra"), "Train", "beside it are 'extra', 'fold2', no split"),
    "no training": (("learn", "val"), "val", "beside it is 'learn', no split"),
    "no training at all": (("val", "test"), "test", "there is no training split"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_folder_beside_a_split_that_is_none_is_named(case: str) -> None:
    folders, split, found = STRANGE[case]

    assert refusal(*(name for folder in folders for name in inside(folder))) == (
        f"photos: the folder {split!r} is a split, and {found}\n"
        f"  {SPLITS}\n"
        f"  the folder {split!r} is read as a split; rename it if it is a class"
    )


def test_a_folder_beside_both_splits_is_said_to_be_unused(tmp_path: Path) -> None:
    """What is missing of neither split is not in it."""
    data = read_photos(made(tmp_path, *inside("train", 5), *inside("val", 5), *inside("extra", 5)))

    assert (len(data.train), len(data.val)) == (10, 10)
    assert "unused: extra" in data.note


@pytest.mark.parametrize("name", ["train", "training", "Train"])
def test_a_class_that_is_called_like_a_split(name: str) -> None:
    rename = f"  the folder {name!r} is read as a split; rename it if it is a class"
    flat = [f"{folder}/{number}.jpg" for folder in ("bus", name) for number in range(4)]

    assert refusal(*flat) == (
        f"photos: 8 images lie outside a class folder, the first is {min(flat)}\n  {LAYOUT}\n{rename}"
    )
    assert rename in refusal("bus/red/1.jpg", f"{name}/1.jpg")
    assert rename in refusal("bus/red/1.jpg", f"{name}/red/1.jpg")


def test_a_class_that_is_called_like_a_validation_split_is_a_class() -> None:
    """Without class folders in it, and without training images beside it, it can be nothing else."""
    assert read_folders(["rose/1.jpg", "test/1.jpg"], "").train == {"rose/1.jpg": "rose", "test/1.jpg": "test"}


def test_a_split_folder_alone_is_the_whole_data_set() -> None:
    for name in (*TRAIN, *VAL, "TRAIN"):
        found = read_folders(inside(name), "")

        assert (list(found.train.values()), found.val, found.notes) == (["rose", "tulip"], {}, ())


LEFT_OUT = {
    "one": (["rose/9.webp"], "1 .webp file"),
    "several": ([f"rose/{n}.webp" for n in range(7)], "7 .webp files"),
    "in capitals": (["rose/8.WEBP", "rose/9.webp"], "2 .webp files"),
    "many kinds": (
        [f"rose/{n}.{s}" for s, c in (("tif", 4), ("bmp", 3), ("gif", 2), ("heic", 1), ("jxl", 1)) for n in range(c)],
        "4 .tif, 3 .bmp, 2 .gif, 2 other files",
    ),
    "without a suffix": (["rose/readme"], "1 suffixless file"),
    "a whole class": (
        ["daisy/1.webp", "daisy/2.webp", "rose/3.webp"],
        "3 .webp files, so no image is in 'daisy'",
    ),
    "deep": (["daisy/a/b/1.webp", "rose/b/1.webp"], "2 .webp files, so no image is in 'daisy', 'rose/b'"),
    "a name that a terminal would obey": (["rose/1.\x1b[2J"], "1 .\\x1b[2j file"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_other_files_are_counted(case: str) -> None:
    names, said = LEFT_OUT[case]

    found = read_folders([*names, "rose/1.jpg", "tulip/1.png"], "photos")

    assert found.notes == (f"left out: {said}; images are .jpg, .jpeg and .png",)


def test_other_files_are_said_where_the_split_is_said(tmp_path: Path) -> None:
    made(tmp_path, *(f"{name}/{number}.jpg" for name in ("rose", "tulip") for number in range(5)))
    (tmp_path / "rose" / "5.webp").write_bytes(picture("WEBP"))

    assert read_photos(tmp_path).note == (
        "no validation split: 20% of each class, by seed 0; left out: 1 .webp file; images are .jpg, .jpeg and .png"
    )


def test_validation_images_that_are_no_images_are_said() -> None:
    found = read_folders([*inside("train"), "val/rose/1.webp", "val/tulip/1.webp"], "photos")

    assert found.notes == ("left out: 2 .webp files, so no image is in 'val'; images are .jpg, .jpeg and .png",)


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "Jpg", "jpeg", "JPEG", "Jpeg", "png", "PNG", "Png"])
def test_images_have_their_suffixes_in_any_case(suffix: str) -> None:
    assert len(read_folders([f"rose/1.{suffix}", "tulip/1.jpg"], "").train) == 2


def test_errors_name_other_files_too(tmp_path: Path) -> None:
    """They may be all that is wrong: a class in another format leaves one class, or one split."""
    left_out = "left out: 1 .webp file, so no image is in 'tulip'; images are .jpg, .jpeg and .png"
    assert refusal("rose/1.jpg", "tulip/1.webp").endswith(f"\n  {LAYOUT}\n  {left_out}")
    made(tmp_path, "train/rose/1.jpg", "val/rose/1.jpg", "train/tulip/1.jpg")
    (tmp_path / "val" / "tulip").mkdir()
    (tmp_path / "val" / "tulip" / "1.webp").write_bytes(picture("WEBP"))

    with pytest.raises(DataError) as caught:
        read_photos(tmp_path)

    assert str(caught.value) == (
        f"{tmp_path}: class 'tulip' (1 image) cannot be both trained and validated on\n"
        "  add images of it, or leave such classes out with --skip-bad\n"
        "  split as in its folders train and val; "
        "left out: 1 .webp file, so no image is in 'val/tulip'; images are .jpg, .jpeg and .png"
    )


def bad_photos(where: Path, *bad: str) -> Path:
    made(where, *inside("train", 10), *inside("val", 3))
    for name in bad:
        (where / name).write_bytes(b"nothing")
    return where


SETTINGS = Settings(epochs=1, batch_size=4, image_size=32, lr=1e-3, optimizer="adamw", skip_bad=True, device="cpu")
BAD = {
    "none": ([], ""),
    "one": (["val/rose/1.jpg"], "1 image does not decode: val/rose/1.jpg"),
    "both lists": (
        ["train/rose/1.jpg", "val/tulip/0.jpg"],
        "2 images do not decode: train/rose/1.jpg, val/tulip/0.jpg",
    ),
    "many": (
        [f"train/rose/{number}.jpg" for number in range(8)],
        "8 images do not decode: train/rose/0.jpg, train/rose/1.jpg, train/rose/2.jpg, train/rose/3.jpg, "
        "train/rose/4.jpg and 3 more",
    ),
    "all of a class": (
        [f"val/rose/{number}.jpg" for number in range(3)],
        "3 images do not decode: val/rose/0.jpg, val/rose/1.jpg, val/rose/2.jpg; no validation image is left of 'rose'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_images_that_do_not_decode_are_named_and_not_counted(case: str, tmp_path: Path) -> None:
    bad, said = BAD[case]
    data = read_photos(bad_photos(tmp_path, *bad), skip_bad=True)
    decoded = decode_photos(
        data, SETTINGS, seed=0, transform=eval_transform("test_resnet", 32), progress=lambda done, images: None
    )

    left, found = without_bad(data, decoded.train, decoded.held_out)

    assert found == said
    assert sorted(decoded.train.skipped + decoded.held_out.skipped) == sorted(bad)
    assert len(left.train) == len(decoded.train.labels) + decoded.choice
    assert len(left.val) == len(decoded.held_out.labels) - decoded.choice
    assert len(left.train) + len(left.val) == 26 - len(bad)


def test_images_of_parts_that_do_not_decode_are_named_and_not_counted(tmp_path: Path) -> None:
    bad = ["train/rose/1.jpg", "train/tulip/2.jpg"]
    data = read_photos(bad_photos(tmp_path, *bad, "val/rose/1.jpg"), skip_bad=True)

    parts = in_parts(data, SETTINGS, 0, "test_resnet", lambda done, images: None)
    left, found = without_bad(data, parts.images)

    assert found == "2 images do not decode: train/rose/1.jpg, train/tulip/2.jpg"
    assert len(left.train) == len(parts.images.labels) == sum(map(len, parts.rows)) == 18
    assert torch.cat(parts.rows).sort().values.tolist() == list(range(18))
    assert left.val == data.val  # they are not read
