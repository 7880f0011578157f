"""Reading images in PASCAL VOC's layout, from a folder or straight out of a tar. Nothing is extracted or written.

The class list is whatever the annotations of the two splits name, so any data set in this layout will do. Whatever is
missing, damaged or empty is a :class:`~freezeplan.errors.DataError` that names the file inside the data set.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from freezeplan.errors import DataError, Problem
from freezeplan.training.archive import Files, open_files
from freezeplan.training.settings import LabelRule, Resize

SplitName = Literal["train", "val"]

LISTS = ("ImageSets/Main/train.txt", "ImageSets/Main/val.txt")
LARGEST_TEXT, MOST_CLASSES, WIDEST = 16 * 2**20, 10_000, 1_000_000
"""Bytes of a list or an annotation, classes of a data set, and pixels of a corner; beyond them something is wrong."""
FORMATS = ("JPEG", "PNG")
"""What is decoded, whatever a file is called: PIL knows formats that start other programs."""
_ENCODINGS = {"utf-8": "utf-8-sig", "us-ascii": "ascii", "iso-8859-1": "latin-1", "windows-1252": "cp1252"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


@dataclass(frozen=True)
class Box:
    """One annotated object. Corners are in pixels of the original image, as VOC counts them."""

    name: str
    xmin: float
    ymin: float
    xmax: float
    ymax: float
    difficult: bool = False

    @property
    def area(self) -> float:
        """Area in square pixels, never below zero."""
        return max(0.0, self.xmax - self.xmin) * max(0.0, self.ymax - self.ymin)


@dataclass(frozen=True)
class Photo:
    """One image of a list: where its bytes are, and at least one object that is on it."""

    id: str
    file: str
    """Name of the image below the data set's root, ``JPEGImages/2012_000001.jpg``."""
    objects: tuple[Box, ...]


@dataclass(frozen=True)
class VocData:
    """A data set in VOC's layout: its classes and both lists, without any pixel yet."""

    name: str
    classes: tuple[str, ...]
    """The names found in the annotations of both splits, sorted; a label is an index into them."""
    train: tuple[Photo, ...]
    val: tuple[Photo, ...]
    files: Files
    note: str = ""
    """How the images were split, where the data set does not say it itself, and what was left out."""


@dataclass(frozen=True)
class Split:
    """The decoded images of one list and what is on them, one row an image."""

    images: Tensor
    """uint8, (N, 3, S, S), RGB."""
    by_rule: Mapping[LabelRule, Tensor]
    """Rule to int64, (N,): the class that it chooses."""
    present: Tensor
    """int64, (N, classes): 1 where the class is on the image, 0 where not, -1 where all of it is marked difficult."""
    rule: LabelRule
    """The one whose classes are trained on."""
    skipped: tuple[str, ...] = ()
    """Files left out because they do not decode."""

    @property
    def labels(self) -> Tensor:
        """int64, (N,): the class that each image is trained on."""
        return self.by_rule[self.rule]

    def to(self, device: torch.device) -> Split:
        """Return the same split with its tensors on ``device``."""
        by_rule = {rule: labels.to(device) for rule, labels in self.by_rule.items()}
        return replace(self, images=self.images.to(device), by_rule=by_rule, present=self.present.to(device))

    def at(self, rows: Tensor) -> Split:
        """Return some of the images, copied, in the order of ``rows``, int64."""
        rows = rows.to(self.images.device)
        by_rule = {rule: labels[rows] for rule, labels in self.by_rule.items()}
        return replace(self, images=self.images[rows], by_rule=by_rule, present=self.present[rows])


def read_voc(path: str | Path, *, name: str | None = None) -> VocData:
    """Read the lists and annotations of a data set in VOC's layout.

    Args:
        path: A ``VOCdevkit`` folder, the ``VOC2012`` folder in it, any folder with ``ImageSets/Main``, ``Annotations``
            and ``JPEGImages``, or a ``.tar``, ``.tar.gz`` or ``.tgz`` of one of these. Of several
            years VOC2012 is taken.
        name: What the data set is called in results; by default the last part of ``path``.

    Returns:
        Classes, and for every listed image its file and objects.

    Raises:
        DataError: If something is missing, damaged, empty or not in this layout; every damaged annotation and every
            missing file of both lists is named at once.
    """
    path = Path(path)
    files = open_files(path, LISTS[0])
    problems: list[Problem] = []
    train, val = (_read_list(files, file, problems) for file in LISTS)
    if problems:
        raise DataError(_first_of(problems))
    found = {box.name for photo in train + val for box in photo.objects}
    if len(found) > MOST_CLASSES:
        raise DataError(f"{len(found):,} classes; a data set has at most {MOST_CLASSES:,}", where=str(path))
    classes = tuple(sorted(found))
    return VocData(name or path.resolve().name, classes, train, val, files)


def label(photo: Photo, rule: LabelRule) -> str:
    """Return the one class that a photo is trained on.

    Args:
        photo: An image with at least one object.
        rule: ``largest``: the class of the box with the largest area, of equal ones the first; ``first``: the class
            of the object that the annotation lists first. Objects marked difficult count like the others.

    Examples:
        >>> photo = Photo("1", "JPEGImages/1.jpg", (Box("cat", 0, 0, 9, 9), Box("sofa", 0, 0, 99, 50)))
        >>> label(photo, "largest"), label(photo, "first")
        ('sofa', 'cat')
    """
    return photo.objects[0].name if rule == "first" else max(photo.objects, key=lambda box: box.area).name


def load_split(
    data: VocData,
    split: SplitName,
    *,
    image_size: int,
    rule: LabelRule,
    resize: Resize = "squash",
    transform: Callable[[Image.Image], Tensor] | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] = lambda done, images: None,
) -> Split:
    """Decode one list of a data set into one tensor of square images.

    Done once: all arms share the result. By PIL: torchvision's decoders are faster and about to be removed from it.

    Args:
        data: What :func:`read_voc` returned.
        split: ``train`` or ``val``.
        image_size: Side of the square in pixels.
        rule: Which class an image is trained on, see :func:`label`.
        resize: How an image becomes square, see :func:`decode`.
        transform: Makes an RGB image square in another way, and a uint8 tensor of it, (3, image_size, image_size).
        workers: Threads that decode.
        skip_bad: Leave out images that do not decode and list them in the result, instead of failing.
        progress: Is told how many images of how many are done, after each.

    Returns:
        uint8 images (N, 3, image_size, image_size) in the order of the list, and their classes.

    Raises:
        DataError: If an image does not decode (the first one in the list is named), if none is left, or if a class
            labels no training image.
    """
    photos = data.train if split == "train" else data.val
    images = torch.empty((len(photos), 3, image_size, image_size), dtype=torch.uint8)

    def decode_into(row: int) -> Problem | None:
        try:
            content = data.files.read(photos[row].file)
            images[row] = decode(content, image_size, resize) if transform is None else transform(open_image(content))
        except Exception as error:  # what a damaged image makes its reader raise is not documented
            return Problem(f"{photos[row].file} does not decode ({_reason(error)})", str(data.files.path))
        return None

    results: list[Problem | None] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for problem in pool.map(decode_into, range(len(photos))):
            results.append(problem)
            progress(len(results), len(photos))
    bad = [problem for problem in results if problem]
    if bad and not skip_bad:
        raise DataError(replace(bad[0], notes=(_count_bad(len(bad)),)))
    good = [row for row, problem in enumerate(results) if not problem]
    if not good:
        raise DataError(f"no image of the {split} list decodes", where=str(data.files.path))
    if bad:
        images = images[good]
    kept = [photos[row] for row in good]
    if split == "train":
        _check_every_class_is_trained(data, photos, kept, rule)
    return Split(
        images,
        {one: torch.tensor([data.classes.index(label(p, one)) for p in kept]) for one in get_args(LabelRule)},
        torch.tensor([[_presence(photo, name) for name in data.classes] for photo in kept]),
        rule,
        tuple(photo.file for photo, problem in zip(photos, results, strict=True) if problem),
    )


def decode(content: bytes, image_size: int, resize: Resize = "squash") -> Tensor:
    """Decode one image to uint8 RGB, (3, image_size, image_size), bilinear with antialiasing.

    Args:
        content: A JPEG or PNG file.
        image_size: Side in pixels.
        resize: ``squash``: the whole image, its sides scaled differently; ``center-crop``: the square in its middle.

    Raises:
        OSError: If it is neither JPEG nor PNG, damaged or cut short.
        SyntaxError: If it is a damaged PNG.
        PIL.Image.DecompressionBombError: If it claims to have more pixels than PIL takes without a warning.

    Examples:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (20, 10), 128).save(buffer, "PNG")
        >>> decode(buffer.getvalue(), 4).shape, decode(buffer.getvalue(), 4).unique()
        (torch.Size([3, 4, 4]), tensor([128], dtype=torch.uint8))
    """
    whole, size = open_image(content), (image_size, image_size)
    bilinear = Image.Resampling.BILINEAR
    small = whole.resize(size, bilinear) if resize == "squash" else ImageOps.fit(whole, size, bilinear)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def open_image(content: bytes) -> Image.Image:
    """Decode one image to RGB in its own size, as it is stored; ``decode`` says what is raised."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or 0):
            raise Image.DecompressionBombError(f"{picture.width} x {picture.height} pixels are too many")
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return an image with eight bits each of red, green and blue.

    Of 16 bits of grey the upper eight are taken, as PIL does of 16 bits of a colour; PIL's own ``convert`` would make
    everything from 256 on white. Transparency is dropped and the stored colours are taken, as timm does.

    Args:
        picture: Of any mode.

    Raises:
        ValueError: If nothing says which of its numbers is white, or PIL knows no way from its mode.

    Examples:
        >>> to_rgb(Image.fromarray(np.array([[255, 256, 65535]], dtype=np.uint16))).getpixel((2, 0))
        (255, 255, 255)
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):  # I: pillow before 11
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode[0] in "IF":
        raise ValueError(f"pixels of mode {picture.mode}, for which black and white are no fixed numbers")
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB is the same, with a warning
    return picture.convert("RGB")


def _read_list(files: Files, file: str, problems: list[Problem]) -> tuple[Photo, ...]:
    where = str(files.path)
    if not files.has(file):
        raise DataError(f"{file} is missing", where=where, notes=["both train.txt and val.txt are needed"])
    lines = _text(files.read(file), file, where).splitlines()
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{file} lists no image", where=where)
    photos = []
    for id_ in ids:
        try:
            photos.append(_read_photo(files, file, id_))
        except DataError as error:
            problems += error.problems
    return tuple(photos)


def _read_photo(files: Files, listed_in: str, id_: str) -> Photo:
    where = str(files.path)
    if not _is_plain(id_):
        notes = ["an image is listed by the name of its file, without folder and suffix"]
        raise DataError(f"{listed_in} names {id_[:60]!r}, which is no name of a file", where=where, notes=notes)
    annotation = f"Annotations/{id_}.xml"
    image = next((f"JPEGImages/{id_}{s}" for s in IMAGE_SUFFIXES if files.has(f"JPEGImages/{id_}{s}")), None)
    if image is None:
        raise DataError(f"{listed_in} names {id_}, but there is no JPEGImages/{id_}.jpg", where=where)
    if not files.has(annotation):
        raise DataError(f"{listed_in} names {id_}, but there is no {annotation}", where=where)
    text = _text(files.read(annotation), annotation, where)
    if "<!DOCTYPE" in text:
        notes = ["a document type can define entities that expand without end; take the line out"]
        raise DataError(f"{annotation} has a <!DOCTYPE>, which is not read", where=where, notes=notes)
    try:
        objects = tuple(map(_box, ElementTree.fromstring(text).iterfind("object")))
    except ElementTree.ParseError as error:
        raise DataError(f"{annotation} is not well-formed XML ({error})", where=where) from None
    except ValueError as error:
        raise DataError(f"{annotation} has an object {error}", where=where) from None
    if not objects:
        raise DataError(f"{annotation} has no object", where=where)
    return Photo(id_, image, objects)


def _is_plain(id_: str) -> bool:
    return id_.isprintable() and not set(id_) & {"/", "\\"} and id_ not in (".", "..") and len(id_.encode()) <= 200


def _text(content: bytes, file: str, where: str) -> str:
    """Decode a list or an annotation here, so that no parser reads another text than what was checked."""
    if len(content) > LARGEST_TEXT:
        raise DataError(f"{file} has {len(content):,} bytes, expected at most {LARGEST_TEXT:,}", where=where)
    declared = re.match(rb"(?:\xef\xbb\xbf)?<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([^\"'>]{1,40})", content)
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if wide else declared[1].decode("latin-1").lower() if declared else "utf-8"
    if not wide and encoding not in _ENCODINGS:
        known = ", ".join(_ENCODINGS)
        raise DataError(f"{file} is encoded as {encoding!r}, expected one of {known}", where=where)
    try:
        return content.decode(_ENCODINGS.get(encoding, encoding))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not {encoding.upper()} text (byte {error.start})", where=where) from None


def _box(element: ElementTree.Element) -> Box:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("without a name")
    if len(name) > 200 or not name.isprintable():
        raise ValueError(f"whose name is {name[:60]!r}, not at most 200 printable characters")
    xmin, ymin, xmax, ymax = (_corner(element, name, corner) for corner in ("xmin", "ymin", "xmax", "ymax"))
    return Box(name, xmin, ymin, xmax, ymax, difficult=(element.findtext("difficult") or "").strip() == "1")


def _corner(element: ElementTree.Element, name: str, corner: str) -> float:
    text = element.findtext(f"bndbox/{corner}")
    try:
        number = float(text or "")
    except ValueError:
        raise ValueError(f"{name!r} whose {corner} is {text and text[:60]!r}, not a number") from None
    if not 0 <= number <= WIDEST:
        raise ValueError(f"{name!r} whose {corner} is {number:g}, not a number of pixels from 0 to {WIDEST:,}")
    return number


def _presence(photo: Photo, name: str) -> int:
    boxes = [box for box in photo.objects if box.name == name]
    return 0 if not boxes else -1 if all(box.difficult for box in boxes) else 1


def _check_every_class_is_trained(
    data: VocData, photos: Sequence[Photo], kept: Sequence[Photo], rule: LabelRule
) -> None:
    listed, decoded = ({label(photo, rule) for photo in some} for some in (photos, kept))
    if missing := set(data.classes) - decoded:
        names = ", ".join(map(repr, sorted(missing)))
        notes = [f"classes are the names found in the annotations; --label {rule} gives this one to no training image"]
        if missing <= listed:
            notes = ["no training image of it decodes: replace them, or leave the class out"]
        raise DataError(f"no training image for class {names}", where=str(data.files.path), notes=notes)


def _first_of(problems: list[Problem], limit: int = 10) -> list[Problem]:
    rest = len(problems) - limit
    return problems if rest <= 0 else [*problems[:limit], Problem(f"and {rest} more of this kind")]


def _count_bad(count: int) -> str:
    others = f"and {count - 1} more; " if count > 1 else ""
    return f"{others}replace it, or leave out what does not decode with --skip-bad"


def _reason(error: Exception) -> str:
    # What PIL says of a file that it does not know names an object in memory.
    return "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
