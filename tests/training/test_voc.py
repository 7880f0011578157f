"""Reading data sets in PASCAL VOC's layout: folders and archives alike, and a sentence for everything that is wrong."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from freezeplan.errors import DataError
from freezeplan.training.photos import read_photos
from freezeplan.training.voc import Split, decode, load_split, read_voc
from freezeplan.voc_vgg16.sample import write_sample

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
ROOT = "VOCdevkit/VOC2012"
TEXT = b"not a tar" * 200


def jpeg(red: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (red, 0, 0)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def thing(name: str, side: int | str, *, difficult: int = 0) -> str:
    box = f"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{side}</xmax><ymax>{side}</ymax></bndbox>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>"


def annotation(*objects: str) -> bytes:
    return f"<annotation>{''.join(objects)}</annotation>".encode()


def small() -> dict[str, bytes]:
    """Two classes, four training and two validation images; name below the root to content."""
    objects = {
        "t0": [thing("cat", 9)],
        "t1": [thing("dog", 9)],
        "t2": [thing("cat", 5), thing("dog", 15)],
        "t3": [thing("dog", 9), thing("cat", 3, difficult=1)],
        "v0": [thing("cat", 9)],
        "v1": [thing("dog", 9), thing("cat", 9)],
    }
    files = {f"Annotations/{id_}.xml": annotation(*found) for id_, found in objects.items()}
    files |= {f"JPEGImages/{id_}.jpg": jpeg(40 * number) for number, id_ in enumerate(objects)}
    return files | {
        "ImageSets/Main/train.txt": b"t0\nt1\nt2\nt3\n",
        "ImageSets/Main/val.txt": b"v0\nv1\n",
    }


def folder(where: Path, files: dict[str, bytes], root: str = ROOT) -> Path:
    for name, content in files.items():
        path = where / root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return where


def archive(path: Path, files: dict[str, bytes], root: str = ROOT) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def splits(path: Path, **options: object) -> tuple[Split, Split]:
    data = read_voc(path)
    given = {"image_size": 16, "rule": "largest", **options}
    return load_split(data, "train", **given), load_split(data, "val", **given)  # type: ignore[arg-type]


PLACES: dict[str, Callable[[Path], Path]] = {
    "VOCdevkit": lambda tmp: folder(tmp, small()) / "VOCdevkit",
    "VOC2012": lambda tmp: folder(tmp, small()) / ROOT,
    "any folder": lambda tmp: folder(tmp, small(), root="."),
    "tar": lambda tmp: archive(tmp / "voc.tar", small()),
    "tar of VOC2012": lambda tmp: archive(tmp / "voc.tar", small(), root="./VOC2012"),
    "tar of the bare layout": lambda tmp: archive(tmp / "voc.tar", small(), root="."),
    "tar.gz": lambda tmp: archive(tmp / "voc.tar.gz", small()),
    "tgz": lambda tmp: archive(tmp / "voc.tgz", small()),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_layout_gives_the_same_data(place: str, tmp_path: Path) -> None:
    path = PLACES[place](tmp_path)

    data = read_voc(path)
    train, val = splits(path)

    assert (data.name, data.classes) == (path.name, ("cat", "dog"))
    assert [photo.id for photo in data.train + data.val] == ["t0", "t1", "t2", "t3", "v0", "v1"]
    assert train.images.shape == (4, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert [round(float(image[0].float().mean()) / 40) for image in torch.cat([train.images, val.images])] == [
        *range(6)
    ]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 1, 1], [0, 1])
    assert train.present.tolist() == [[1, 0], [0, 1], [1, 1], [-1, 1]]


def test_the_label_is_the_largest_or_the_first_object(tmp_path: Path) -> None:
    path = folder(tmp_path, small())

    assert splits(path, rule="largest")[0].labels.tolist() == [0, 1, 1, 1]
    assert splits(path, rule="first")[0].labels.tolist() == [0, 1, 0, 1]
    by_rule = splits(path, rule="first")[0].by_rule
    assert {rule: labels.tolist() for rule, labels in by_rule.items()} == {
        "largest": [0, 1, 1, 1],
        "first": [0, 1, 0, 1],
    }


def test_an_image_is_squashed_or_its_middle_is_cut_out(tmp_path: Path) -> None:
    """40 x 20 pixels, black with a white middle of 20 x 20."""
    picture, png = Image.new("RGB", (40, 20)), io.BytesIO()
    picture.paste((255, 255, 255), (10, 0, 30, 20))
    picture.save(png, "PNG")

    squashed, middle = (decode(png.getvalue(), 20, way)[0].float() / 255 for way in ("squash", "center-crop"))

    assert squashed.mean() == pytest.approx(0.5, abs=0.01)
    assert (squashed[:, :4].max(), squashed[:, -4:].max(), squashed[:, 8:12].min()) == (0, 0, 1)
    assert middle.min() == 1


def test_workers_do_not_change_the_images(tmp_path: Path) -> None:
    path = archive(tmp_path / "voc.tar", small())

    assert torch.equal(splits(path, workers=1)[0].images, splits(path, workers=4)[0].images)


def test_of_several_years_2012_is_taken(tmp_path: Path) -> None:
    folder(tmp_path, small(), root="VOCdevkit/VOC2007")
    folder(tmp_path, small())

    assert str(read_voc(tmp_path / "VOCdevkit").train[0].file) == "JPEGImages/t0.jpg"


def test_grey_cmyk_and_png_images_are_read(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("P", (8, 8)).save(png, "PNG")
    files = small() | {
        "JPEGImages/t0.jpg": jpeg(99, "L"),
        "JPEGImages/t1.jpg": jpeg(99, "CMYK"),
        "JPEGImages/t2.png": png.getvalue(),
    }
    del files["JPEGImages/t2.jpg"]

    assert splits(folder(tmp_path, files))[0].images.shape == (4, 3, 16, 16)


BAD: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a list that is missing": (
        {"ImageSets/Main/val.txt": None},
        "{path}: ImageSets/Main/val.txt is missing\n  both train.txt and val.txt are needed",
    ),
    "an empty list": ({"ImageSets/Main/train.txt": b"\n"}, "{path}: ImageSets/Main/train.txt lists no image"),
    "an image that is missing": (
        {"JPEGImages/t1.jpg": None},
        "{path}: ImageSets/Main/train.txt names t1, but there is no JPEGImages/t1.jpg",
    ),
    "an annotation that is missing": (
        {"Annotations/v1.xml": None},
        "{path}: ImageSets/Main/val.txt names v1, but there is no Annotations/v1.xml",
    ),
    "an annotation without objects": (
        {"Annotations/t2.xml": b"<annotation/>"},
        "{path}: Annotations/t2.xml has no object",
    ),
    "an annotation cut short": (
        {"Annotations/t2.xml": b"<annotation><obj"},
        "{path}: Annotations/t2.xml is not well-formed XML (unclosed token: line 1, column 12)",
    ),
    "an object without a name": (
        {"Annotations/t2.xml": annotation(thing("", 3))},
        "{path}: Annotations/t2.xml has an object without a name",
    ),
    "a box that is no number": (
        {"Annotations/t2.xml": annotation(thing("cat", "x"))},
        "{path}: Annotations/t2.xml has an object 'cat' whose xmax is 'x', not a number",
    ),
    "two mistakes": (
        {"JPEGImages/t1.jpg": None, "Annotations/v0.xml": b"<annotation/>"},
        "{path}: ImageSets/Main/train.txt names t1, but there is no JPEGImages/t1.jpg\n\n"
        "{path}: Annotations/v0.xml has no object",
    ),
    "an image that does not decode": (
        {"JPEGImages/t1.jpg": jpeg(40)[:300]},
        "{path}: JPEGImages/t1.jpg does not decode (Truncated File Read)\n"
        "  replace it, or leave out what does not decode with --skip-bad",
    ),
    "images that are none": (
        {"JPEGImages/t1.jpg": b"nothing", "JPEGImages/t2.jpg": b""},
        "{path}: JPEGImages/t1.jpg does not decode (neither JPEG nor PNG)\n"
        "  and 1 more; replace it, or leave out what does not decode with --skip-bad",
    ),
    "a class without a training image": (
        {"Annotations/v0.xml": annotation(thing("emu", 3))},
        "{path}: no training image for class 'emu'\n"
        "  classes are the names found in the annotations; --label largest gives this one to no training image",
    ),
}


@pytest.mark.parametrize("tar", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize("case", BAD)
def test_bad_data_get_one_sentence(case: str, tar: bool, tmp_path: Path) -> None:
    change, expected = BAD[case]
    files = {name: content for name, content in (small() | change).items() if content is not None}
    path = archive(tmp_path / "voc.tar", files) if tar else folder(tmp_path / "data", files)

    with pytest.raises(DataError) as caught:
        splits(path)

    assert str(caught.value) == expected.format(path=path)


def test_an_image_cut_in_half(tmp_path: Path) -> None:
    noise, whole = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator()), io.BytesIO()
    Image.fromarray(noise.numpy()).save(whole, "JPEG")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]

    with pytest.raises(DataError, match=r"JPEGImages/t1\.jpg does not decode \(image file is truncated"):
        splits(folder(tmp_path, small() | {"JPEGImages/t1.jpg": half}))


def test_many_mistakes_are_cut_short(tmp_path: Path) -> None:
    ids = "\n".join(f"x{number}" for number in range(25))

    with pytest.raises(DataError) as caught:
        read_voc(folder(tmp_path, small() | {"ImageSets/Main/train.txt": ids.encode()}))

    assert len(caught.value.problems) == 11
    assert str(caught.value.problems[-1]) == "and 15 more of this kind"


def test_skip_bad_counts_and_goes_on(tmp_path: Path) -> None:
    path = folder(tmp_path, small() | {"JPEGImages/t2.jpg": b"nothing"})

    train, _ = splits(path, skip_bad=True)

    assert train.skipped == ("JPEGImages/t2.jpg",)
    assert (len(train.images), train.labels.tolist(), len(train.present)) == (3, [0, 1, 1], 3)


def test_skip_bad_does_not_lose_a_class(tmp_path: Path) -> None:
    path = folder(tmp_path, small() | {"JPEGImages/t0.jpg": b"nothing"})

    with pytest.raises(DataError) as caught:
        splits(path, skip_bad=True)

    assert str(caught.value) == (
        f"{path}: no training image for class 'cat'\n"
        "  no training image of it decodes: replace them, or leave the class out"
    )


def test_a_path_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "VOC.tar"

    with pytest.raises(DataError) as caught:
        read_voc(path)

    assert str(caught.value) == f"{path}: no such file or folder\n  give a folder, or a tar of one"


@pytest.mark.parametrize("tar", [False, True], ids=["folder", "tar"])
def test_another_layout_says_what_was_found(tar: bool, tmp_path: Path) -> None:
    files = {"cats/1.jpg": jpeg(1), "dogs/1.jpg": jpeg(2)}
    path = archive(tmp_path / "voc.tar", files, ".") if tar else folder(tmp_path / "data", files, ".")

    with pytest.raises(DataError) as caught:
        read_voc(path)

    assert str(caught.value) == (
        f"{path}: not in PASCAL VOC's layout\n"
        "  looked for ImageSets/Main/train.txt in it and in the folders below\n"
        "  found cats, dogs"
    )


def test_several_data_sets_are_not_guessed_between(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2008"):
        folder(tmp_path, small(), root=year)

    with pytest.raises(DataError) as caught:
        read_voc(tmp_path)

    assert str(caught.value) == f"{tmp_path}: holds several data sets: VOC2007, VOC2008\n  give one of them"


@pytest.mark.parametrize("end", [100, 512, 1000, 1536, 5000, 10000])
def test_a_truncated_archive(end: int, tmp_path: Path) -> None:
    path = archive(tmp_path / "voc.tar", small())
    path.write_bytes(path.read_bytes()[:end])

    with pytest.raises(DataError, match=r"voc\.tar: not a whole tar archive \(") as caught:
        read_voc(path)

    assert caught.value.problems[0].notes == (
        "download or copy it again; a folder, a .tar, a .tar.gz or a .tgz can be read",
    )


def test_a_truncated_compressed_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "voc.tgz", small())
    path.write_bytes(path.read_bytes()[:-50])

    with pytest.raises(DataError, match=r"voc\.tgz: not a whole tar archive \(Compressed file ended"):
        read_voc(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a tar" * 200, gzip.compress(b"not a tar" * 200)], ids=["empty", "text", "gz"]
)
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "voc.tar"
    path.write_bytes(content)

    with pytest.raises(DataError, match="not a whole tar archive"):
        read_voc(path)


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("cats/1.jpg", jpeg(1))
    return content.getvalue()


OTHERS = {
    "a zip": ("photos.zip", zipped()),
    "a zip called a tar": ("photos.tar", zipped()),
    "an empty zip": ("photos.tar", b"PK\5\6" + bytes(18)),
    "a plan": ("plan.yaml", b"version: 1\n"),
    "a long text": ("notes.txt", TEXT),
    "a packed text": ("notes.gz", gzip.compress(TEXT)),
    "another archive": ("photos.tar.xz", b"\xfd7zXZ" + bytes(range(256)) * 4),
    "an image": ("photo.jpg", jpeg(1)),
    "nothing": ("photos", b""),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("read", [read_voc, read_photos])
def test_what_is_no_tar_at_all_says_what_to_do_with_it(case: str, read: Callable[[Path], object], tmp_path: Path):
    name, content = OTHERS[case]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError) as caught:
        read(tmp_path / name)

    assert str(caught.value) == (
        f"{tmp_path / name}: no tar archive\n"
        "  unpack a zip or another archive first, and give the folder\n"
        "  a folder, a .tar, a .tar.gz or a .tgz can be read"
    )


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "classes", "train", "val", "several"),
    [
        ("flowers5_voc.tar", ("daisy", "dandelion", "rose", "sunflower", "tulip"), 1000, 1500, False),
        ("fruit3_voc.tar", ("apple", "banana", "orange"), 240, 60, True),
    ],
)
def test_real_photos(name: str, classes: tuple[str, ...], train: int, val: int, several: bool) -> None:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"needs {name} in ../shared/data")

    data = read_voc(path)
    split = load_split(data, "val", image_size=32, rule="largest", workers=2)

    assert (data.classes, len(data.train), len(data.val)) == (classes, train, val)
    assert bool((split.present.abs().sum(1) > 1).any()) == several
    assert split.images.float().std() > 30


def test_reading_images_says_how_far_it_is(tmp_path: Path) -> None:
    """After each image, in order, also where several threads decode."""
    data = read_voc(write_sample(tmp_path, train=20, val=20))
    told: list[tuple[int, int]] = []
    load_split(data, "val", image_size=8, rule="first", workers=3, progress=lambda *found: told.append(found))

    assert told == [(done, 20) for done in range(1, 21)]
