"""One's own photos: class folders, a tar of them, a table of paths, VOC's layout, or a data set that timm reads.

Each becomes the same data: two lists of photos, and a class for each photo. No pixel is decoded here.
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from freezeplan.errors import DataError, MissingExtraError, Problem, did_you_mean
from freezeplan.training.archive import Files, open_any, some
from freezeplan.training.folders import TRAIN, VAL, first, read_folders, unused
from freezeplan.training.voc import LISTS, Box, Photo, Split, VocData, label, read_voc, to_rgb

VAL_SHARE = 0.2
"""Part of each class that is validated on where the data come in one piece."""
TABLES = (".csv", ".parquet")
OF_TIMM = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")
"""How the names of data sets begin that ``timm.data.create_dataset`` reads."""


def read_photos(
    path: str | Path, *, seed: int = 0, data_dir: str | Path | None = None, skip_bad: bool = False
) -> VocData:
    """Read the lists of a data set, whose kind shows in ``path``.

    - ``hfds/NAME``, ``wds/NAME``, ``torch/NAME`` and the like: as ``timm.data.create_dataset`` reads them, splits
      ``train`` and ``validation``;
    - a ``.csv`` or ``.parquet`` file: columns ``path`` (below the file's folder) and ``label``, and maybe ``split``;
    - a folder or tar with ``ImageSets/Main``: VOC's layout, see ``read_voc``;
    - a folder or tar of class folders, or of a folder called as one of ``TRAIN`` and one called as one of ``VAL``,
      with class folders in them.

    Where there is no validation split, a fifth of each class becomes one: which images, the seed decides alone. Images
    are files called ``.jpg``, ``.jpeg`` or ``.png``; ``note`` counts all others.

    Args:
        path: What to read.
        seed: Of the split.
        data_dir: Where a data set of timm's is kept; other data need none.
        skip_bad: Leave out classes that cannot be both trained and validated on, and say so in ``note``, instead of
            failing.

    Returns:
        Classes, and for every image its file and its one class as an object without extent. ``note`` says how the
        images were split and what was left out.

    Raises:
        DataError: If nothing is there, no image or one class alone is found, a class is in one split only, or a folder
            beside that of a split is none.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("rose/1.jpg", "rose/2.jpg", "tulip/1.jpg", "tulip/2.jpg"):
        ...         Path(folder, name).parent.mkdir(exist_ok=True)
        ...         _ = Path(folder, name).write_bytes(b"")
        ...     found = read_photos(folder)
        >>> found.classes, len(found.train), len(found.val)
        (('rose', 'tulip'), 2, 2)
    """
    name = str(path)
    if name.lower().startswith(OF_TIMM):
        return _checked(_of_timm(name, data_dir, seed), skip_bad)
    path = Path(path)
    if path.suffix.lower() in TABLES and path.is_file():
        return _checked(_of_table(path, seed), skip_bad)
    files = open_any(path)
    if any(f"/{name}".endswith(f"/{LISTS[0]}") for name in files.names()):
        return read_voc(path)
    return _checked(_of_folders(files, seed), skip_bad)


def split_each_class(photos: Sequence[Photo], seed: int, share: float = VAL_SHARE) -> tuple[list[Photo], list[Photo]]:
    """Split photos into two parts, class by class, so that both parts have every class that has two photos.

    Args:
        photos: Photos with one object each.
        seed: Decides which go where, together with the names of classes and files; their order does not count.
        share: Part of each class in the second list, from 0 to 1; rounded, at least one of two photos and more.

    Returns:
        The rest, and the share, both in the order given.

    Examples:
        >>> photos = [Photo(str(n), f"{n}.jpg", (Box("rose", 0, 0, 0, 0),)) for n in range(10)]
        >>> [photo.id for photo in split_each_class(photos, seed=0)[1]]
        ['6', '9']
    """
    by_class: dict[str, list[str]] = {}
    for photo in photos:
        by_class.setdefault(photo.objects[0].name, []).append(photo.file)
    chosen: set[str] = set()
    for name, found in by_class.items():
        count = round(len(found) * share)
        count = min(max(count, 1), len(found) - 1) if len(found) > 1 else 0
        chosen |= set(random.Random(f"{seed} {name}").sample(sorted(found), count))
    return [p for p in photos if p.file not in chosen], [p for p in photos if p.file in chosen]


def without_bad(data: VocData, *splits: Split) -> tuple[VocData, str]:
    """Take out of the data what did not decode, and say what that was.

    Args:
        data: What ``read_photos`` returned.
        splits: Whatever was decoded of it, with ``skip_bad``.

    Returns:
        The data with the images that are left, and a sentence with the number and the first names; empty where all
        images decode. All names are the ``skipped`` of ``splits``.

    Examples:
        >>> import torch
        >>> photos = [Photo(f"{n}.jpg", f"{n}.jpg", (Box("rose", 0, 0, 0, 0),)) for n in range(3)]
        >>> data = VocData("roses", ("rose",), tuple(photos[:2]), tuple(photos[2:]), open_any(Path()))
        >>> none = torch.empty(0)
        >>> left, said = without_bad(data, Split(none, {}, none, "first", skipped=("1.jpg",)))
        >>> len(left.train), len(left.val), said
        (1, 1, '1 image does not decode: 1.jpg')
    """
    gone = {file for split in splits for file in split.skipped}
    if not gone:
        return data, ""
    bad = [photo.file for photo in (*data.train, *data.val) if photo.file in gone]
    kept = [tuple(photo for photo in side if photo.file not in gone) for side in (data.train, data.val)]
    said = f"{_images(len(bad))} {'does' if len(bad) == 1 else 'do'} not decode: {some(bad)}"
    before, after = ({label(photo, splits[0].rule) for photo in side} for side in (data.val, kept[1]))
    if lost := before - after:
        said += f"; no validation image is left of {some(sorted(map(repr, lost)))}"
    return replace(data, train=kept[0], val=kept[1]), said


def _of_folders(files: Files, seed: int) -> VocData:
    found = read_folders(files.names(), str(files.path))
    train, val = ([_photo(*image) for image in side.items()] for side in (found.train, found.val))
    if not val:
        return _whole(files, train, seed, more=found.notes)
    return _data(files, train, val, "split as in its folders {} and {}".format(*found.splits), more=found.notes)


def _of_table(path: Path, seed: int) -> VocData:
    files = open_any(path.parent)
    rows = list(_rows(path))
    if not rows:
        raise DataError("no row is in it", where=str(path))
    for column in ("path", "label"):
        if column not in rows[0]:
            near = did_you_mean(column, list(rows[0]))
            notes = [*near, f"its columns are {', '.join(rows[0])}"]
            raise DataError(f"has no column {column!r}", where=str(path), notes=notes)
    problems, photos, splits = [], [], []
    for number, row in enumerate(rows, 2):
        file, label, split = (str(row.get(key) or "").strip() for key in ("path", "label", "split"))
        line = f"{path}:{number}"
        if not file or not label:
            problems.append(Problem("path and label are needed in every row", line))
        elif not files.has(file):
            problems.append(Problem(f"there is no file {file!r} in {path.parent}", line))
        elif "split" in row and split.lower() not in TRAIN + VAL:
            problems.append(Problem(f"split is one of {', '.join(TRAIN + VAL)}, found {split!r}", line))
        else:
            photos.append(_photo(file, label))
            splits.append(split.lower())
    if problems:
        more = len(problems) - 10
        raise DataError(problems[:10] + ([Problem(f"and {more} more of this kind")] if more > 0 else []))
    twice = [file for file, count in Counter(photo.file for photo in photos).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]!r} is in two rows; an image has one class and one split", where=str(path))
    if "split" not in rows[0]:
        return _whole(files, photos, seed, name=path.name)
    val = first(VAL, splits) or ""
    sides = [[p for p, split in zip(photos, splits, strict=True) if split in wanted] for wanted in (TRAIN, (val,))]
    if not val:
        return _whole(files, sides[0], seed, name=path.name)
    rest = unused(set(splits).difference(TRAIN, (val,)))
    return _data(files, sides[0], sides[1], f"split as in its column: train and {val}", name=path.name, more=rest)


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
        return csv.DictReader(io.StringIO(text))
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error, "parquet") from None
    try:
        return parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    except (ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file ({str(error).splitlines()[0]})", where=str(path)) from None


def _of_timm(name: str, data_dir: str | Path | None, seed: int) -> VocData:
    from timm.data import create_dataset

    found: list[Any] = []
    for split in ("train", "validation"):
        try:
            found.append(create_dataset(name, root=None if data_dir is None else str(data_dir), split=split))
        except Exception as error:  # libraries behind timm raise their own, without a common base
            if found:
                break  # one piece: it is split here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            notes = [
                "timm.data.create_dataset(NAME, root=DIR, split='train') reads it",
                "--data-dir DIR says where it is",
            ]
            raise DataError(f"timm cannot read this data set ({reason})", where=name, notes=notes) from None
    files = _Decoded(name, found)
    photos = [[_photo(file, label) for file, label in files.labelled(number)] for number in range(len(found))]
    if len(photos) == 1:
        return _whole(files, photos[0], seed, name=name)
    return _data(files, photos[0], photos[1], "split as timm reads it: train and validation", name=name)


class _Decoded:
    """Images of timm's data sets, by the names ``0/17``: the split's number, the image's index.

    A stream has no index: its images are held in memory as they come.
    """

    def __init__(self, name: str, sets: Sequence[Any]):
        self.path, self.root = Path(name), name
        self._sets = [
            found if hasattr(found, "__getitem__") and hasattr(found, "__len__") else list(found) for found in sets
        ]
        self._classes = [_class_names(found) for found in sets]

    def names(self) -> tuple[str, ...]:
        return tuple(f"{number}/{index}" for number, one in enumerate(self._sets) for index in range(len(one)))

    def labelled(self, number: int) -> Iterable[tuple[str, str]]:
        for index, target in enumerate(_targets(self._sets[number])):
            yield f"{number}/{index}", self._classes[number].get(int(target), str(int(target)))

    def has(self, name: str) -> bool:
        return name in set(self.names())

    def read(self, name: str) -> bytes:
        number, _, index = name.partition("/")
        image = self._sets[int(number)][int(index)][0]
        content = io.BytesIO()
        to_rgb(image).save(content, "PNG", compress_level=0)
        return content.getvalue()


def _targets(found: Any) -> Iterable[Any]:
    """The label of each image of a data set, without decoding images where it says them by themselves."""
    targets = getattr(found, "targets", None)
    if targets is not None:
        return list(targets)
    samples = getattr(getattr(found, "reader", None), "samples", None)
    if samples is not None:
        return [target for _, target in samples]
    return [found[index][1] for index in range(len(found))]


def _class_names(found: Any) -> dict[int, str]:
    names = getattr(found, "classes", None)
    if names is not None:
        return dict(enumerate(map(str, names)))
    to_index = getattr(getattr(found, "reader", None), "class_to_idx", None) or {}
    return {int(index): str(name) for name, index in to_index.items()}


def _photo(file: str, label: str) -> Photo:
    return Photo(file, file, (Box(label, 0, 0, 0, 0),))


def _whole(files: Files, photos: Sequence[Photo], seed: int, *, name: str = "", more: Sequence[str] = ()) -> VocData:
    train, val = split_each_class(photos, seed)
    note = f"no validation split: {VAL_SHARE:.0%} of each class, by seed {seed}"
    return _data(files, train, val, note, name=name, more=more)


def _data(
    files: Files, train: Sequence[Photo], val: Sequence[Photo], note: str, *, name: str = "", more: Sequence[str] = ()
) -> VocData:
    classes = sorted({box.name for photo in (*train, *val) for box in photo.objects})
    note, name = "; ".join([note, *more]), name or files.path.resolve().name
    return VocData(name, tuple(classes), tuple(train), tuple(val), files, note)


def _checked(data: VocData, skip_bad: bool) -> VocData:
    """Refuse classes that cannot be trained and validated, or leave them out."""
    where = str(data.files.path)
    sides = [Counter(photo.objects[0].name for photo in side) for side in (data.train, data.val)]
    if len(data.classes) < 2:
        only = f"one class alone, {data.classes[0]!r}" if data.classes else "no image"
        raise DataError(f"{only}; two classes or more are needed", where=where, notes=[data.note])
    lone = {name: sides[0][name] + sides[1][name] for name in data.classes if not (sides[0][name] and sides[1][name])}
    if not lone:
        return data
    counted = ", ".join(f"{name!r} ({_images(count)})" for name, count in list(lone.items())[:5])
    more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
    what = f"{'class' if len(lone) == 1 else 'classes'} {counted}{more}"
    if not skip_bad:
        notes = ["add images of it, or leave such classes out with --skip-bad", data.note]
        raise DataError(f"{what} cannot be both trained and validated on", where=where, notes=notes)
    kept = [tuple(photo for photo in side if photo.objects[0].name not in lone) for side in (data.train, data.val)]
    note = f"{data.note}; left out: {what}, in one split only"
    rest = replace(data, classes=tuple(c for c in data.classes if c not in lone), train=kept[0], val=kept[1], note=note)
    return _checked(rest, skip_bad)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
