"""One's own photos: every layout gives the same data, and every bad folder its own sentence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from freezeplan.errors import DataError, FreezePlanError
from freezeplan.training.photos import read_photos, split_each_class
from freezeplan.training.voc import Box, Photo, load_split


def picture(red: int, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 10), (red, 0, 0)).save(content, kind)
    return content.getvalue()


def made(where: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(10 * number))
    return where


SPLIT = [
    "train/rose/1.jpg", "train/rose/2.jpg", "train/tulip/1.jpg", "val/rose/3.jpg", "val/tulip/2.jpg",
]  # fmt: skip
TABLE = "path,label,split\n" + "".join(f"{n},{n.split('/')[1]},{n.split('/')[0]}\n" for n in SPLIT)


def packed(where: Path) -> Path:
    made(where / "photos", *SPLIT)
    with tarfile.open(where / "photos.tar", "w") as tar:
        tar.add(where / "photos", "photos")
    return where / "photos.tar"


def tabled(where: Path) -> Path:
    made(where, *SPLIT)
    (where / "photos.csv").write_text(TABLE)
    return where / "photos.csv"


def parquet(where: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    rows = [dict(zip(("path", "label", "split"), line.split(","), strict=True)) for line in TABLE.splitlines()[1:]]
    made(where, *SPLIT)
    files.write_table(pyarrow.Table.from_pylist(rows), where / "photos.parquet")
    return where / "photos.parquet"


PLACES = {
    "folder": lambda tmp: made(tmp / "photos", *SPLIT),
    "one folder deeper": lambda tmp: made(tmp / "photos" / "inner", *SPLIT).parent,
    "validation": lambda tmp: made(tmp / "photos", *(n.replace("val/", "validation/") for n in SPLIT)),
    "test": lambda tmp: made(tmp / "photos", *(n.replace("val/", "test/") for n in SPLIT)),
    "tar": packed,
    "csv": tabled,
    "parquet": parquet,
}


@pytest.mark.parametrize("place", PLACES)
def test_every_layout_gives_the_same_data(place: str, tmp_path: Path) -> None:
    data = read_photos(PLACES[place](tmp_path))
    train = load_split(data, "train", image_size=8, rule="largest")
    val = load_split(data, "val", image_size=8, rule="largest")

    assert data.classes == ("rose", "tulip")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1], [0, 1])
    reds = [round(float(image[0].float().mean()) / 10) for split in (train, val) for image in split.images]
    assert reds == [0, 1, 2, 3, 4]
    assert data.note.startswith("split as in its ")


def test_test_images_are_used_only_without_validation_images(tmp_path: Path) -> None:
    data = read_photos(made(tmp_path, *SPLIT, "test/rose/9.jpg", "test/tulip/9.jpg"))

    assert [photo.file for photo in data.val] == ["val/rose/3.jpg", "val/tulip/2.jpg"]
    assert data.note == "split as in its folders train and val; unused: test"


@pytest.mark.parametrize("inside", ["", "train/"])
def test_without_validation_images_a_fifth_of_each_class_becomes_them(inside: str, tmp_path: Path) -> None:
    names = [f"{inside}{name}/{number}.jpg" for name, count in (("rose", 10), ("tulip", 3)) for number in range(count)]

    data = read_photos(made(tmp_path, *names))
    again, other = read_photos(tmp_path), read_photos(tmp_path, seed=1)

    assert [photo.objects[0].name for photo in data.val] == ["rose", "rose", "tulip"]
    assert data.val == again.val
    assert data.val != other.val
    assert sorted(photo.file for photo in data.train + data.val) == sorted(names)
    assert data.note == "no validation split: 20% of each class, by seed 0"


def test_the_split_depends_on_names_and_not_on_their_order() -> None:
    photos = [Photo(str(n), f"{n}.jpg", (Box("rose" if n % 3 else "tulip", 0, 0, 0, 0),)) for n in range(30)]

    _, one = split_each_class(photos, 0)
    _, other = split_each_class(photos[::-1], 0)

    assert {photo.file for photo in one} == {photo.file for photo in other}
    assert len(one) == 6


def test_hidden_files_and_what_macs_leave_in_archives_are_no_photos(tmp_path: Path) -> None:
    data = read_photos(made(tmp_path, *SPLIT, "__MACOSX/train/rose/1.jpg", "train/rose/._1.jpg", ".cache/a/1.jpg"))

    assert len(data.train) + len(data.val) == len(SPLIT)


def test_a_data_set_that_timm_reads_is_read_by_timm(tmp_path: Path) -> None:
    data = read_photos("torch/image_folder", data_dir=made(tmp_path, *SPLIT))
    train = load_split(data, "train", image_size=8, rule="largest")

    assert (data.name, data.classes, len(data.val)) == ("torch/image_folder", ("rose", "tulip"), 2)
    assert train.labels.tolist() == [0, 0, 1]
    assert data.note == "split as timm reads it: train and validation"


def test_what_timm_cannot_read_is_said() -> None:
    with pytest.raises(DataError) as caught:
        read_photos("torch/no_such_set", data_dir="nowhere")

    assert str(caught.value) == (
        "torch/no_such_set: timm cannot read this data set (Unknown torchvision dataset no_such_set)\n"
        "  timm.data.create_dataset(NAME, root=DIR, split='train') reads it\n"
        "  --data-dir DIR says where it is"
    )


BAD = {
    "nothing": ((), "no image is in it", "found no file"),
    "texts": (("rose/1.txt", "tulip/2.txt"), "no image is in it", "found 2 .txt"),
    "flat": (("1.jpg", "2.jpg"), "2 images lie outside a class folder, the first is 1.jpg", "one folder a class"),
    "stray": (("rose/1.jpg", "tulip/1.jpg", "3.jpg"), "an image lies outside a class folder: 3.jpg", ""),
    "one folder": (
        ("rose/1.jpg", "rose/2.jpg"),
        "all images are in one folder, 'rose', and a class is a folder; two",
        "one folder a",
    ),
    "one class": (("train/rose/1.jpg", "val/rose/2.jpg"), "one class alone, 'rose'; two classes or more", ""),
    "one image a class": (
        ("rose/1.jpg", "tulip/1.jpg"),
        "classes 'rose' (1 image), 'tulip' (1 image) cannot be both trained and validated on",
        "--skip-bad",
    ),
    "in one split only": (
        ("train/rose/1.jpg", "val/rose/2.jpg", "train/tulip/1.jpg", "val/tulip/1.jpg", "val/daisy/1.jpg"),
        "class 'daisy' (1 image) cannot be both trained and validated on",
        "add images of it, or leave such classes out with --skip-bad",
    ),
}


@pytest.mark.parametrize("folder", BAD)
def test_every_bad_folder_has_its_own_sentence(folder: str, tmp_path: Path) -> None:
    names, found, note = BAD[folder]

    with pytest.raises(DataError) as caught:
        read_photos(made(tmp_path, *names))

    assert str(caught.value).startswith(f"{tmp_path}: {found}")
    assert note in str(caught.value)


def test_classes_that_cannot_be_validated_on_are_left_out_by_name(tmp_path: Path) -> None:
    data = read_photos(made(tmp_path, *SPLIT, "val/daisy/1.jpg", "val/daisy/2.jpg"), skip_bad=True)

    assert data.classes == ("rose", "tulip")
    assert data.note == ("split as in its folders train and val; left out: class 'daisy' (2 images), in one split only")


TABLES = {
    "no row": ("path,label\n", "{csv}: no row is in it"),
    "another column": (
        "file,label\na.jpg,rose\n",
        "{csv}: has no column 'path'\n  its columns are file, label",
    ),
    "no file": (
        "path,label\ntrain/rose/1.jpg,rose\nno.jpg,tulip\n",
        "{csv}:3: there is no file 'no.jpg' in {folder}",
    ),
    "no label": ("path,label\ntrain/rose/1.jpg,\n", "{csv}:2: path and label are needed in every row"),
    "another split": (
        "path,label,split\ntrain/rose/1.jpg,rose,holdout\n",
        "{csv}:2: split is one of train, training, val, valid, validation, dev, eval, evaluation, test, testing, "
        "found 'holdout'",
    ),
    "twice": (
        "path,label\ntrain/rose/1.jpg,rose\ntrain/rose/1.jpg,tulip\n",
        "{csv}: 'train/rose/1.jpg' is in two rows; an image has one class and one split",
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_bad_table_has_its_own_sentence(table: str, tmp_path: Path) -> None:
    text, message = TABLES[table]
    path = made(tmp_path, *SPLIT) / "photos.csv"
    path.write_text(text)

    with pytest.raises(DataError) as caught:
        read_photos(path)

    assert str(caught.value) == message.format(csv=path, folder=tmp_path)


def test_a_table_that_is_no_text_and_a_file_that_is_no_table(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("path,label\nh\xe9.jpg,rose\n".encode("latin-1"))

    with pytest.raises(DataError, match=r"latin.csv: not UTF-8 text \(byte 12\)$"):
        read_photos(latin)
    (tmp_path / "no.parquet").write_bytes(b"PAR0")
    with pytest.raises(FreezePlanError, match=r"not a Parquet file|pyarrow"):
        read_photos(tmp_path / "no.parquet")
    with pytest.raises(DataError, match="no such file or folder"):
        read_photos(tmp_path / "nowhere")
