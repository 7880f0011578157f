"""The embedded sample: a data set in PASCAL VOC's layout that the package draws.

Twenty named shapes are the task. The slim VGG16 that comes with it was trained on forty-eight other shapes in the same
style (benchmarks/pretrain_sample.py). Both tasks share textures, clutter and noise, so transfer is easy here: the
sample shows how the experiment runs, not what VOC gives.

Everything is drawn from integers and IEEE arithmetic alone, no sine and no normal deviate, so that platforms agree.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from freezeplan.errors import DataError, OutputError

PIXELS = 64
"""Width and height of an image."""
TRAIN, VAL, EPOCHS, BATCH_SIZE = 400, 300, 25, 16
"""What ``freezeplan run`` takes for the sample when it is told nothing else."""
TWO_OBJECTS = 0.33
"""Share of the images that get a second, smaller object of another class, where there is room: about three in ten."""

Outline = tuple[tuple[tuple[int, int], ...], ...]
"""A polygon and the polygons cut out of it, corners as (x, y) on a grid of 24, y downwards."""
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels from zero; right and bottom are outside."""
Gray = NDArray[np.uint8]


def _outline(text: str) -> Outline:
    rings = [[int(number) for number in ring.replace(",", " ").split()] for ring in text.split("/")]
    return tuple(tuple(zip(ring[::2], ring[1::2], strict=True)) for ring in rings)


GRID = 24
TARGETS: Mapping[str, Outline] = {
    name: _outline(text)
    for name, text in {
        "arrow": "0 9, 13 9, 13 3, 24 12, 13 21, 13 15, 0 15",
        "bolt": "14 0, 4 14, 11 14, 8 24, 20 9, 13 9, 18 0",
        "comb": "2 2, 22 2, 22 22, 18 22, 18 9, 14 9, 14 22, 10 22, 10 9, 6 9, 6 22, 2 22",
        "cross": "8 0, 16 0, 16 8, 24 8, 24 16, 16 16, 16 24, 8 24, 8 16, 0 16, 0 8, 8 8",
        "crown": "1 4, 7 12, 12 3, 17 12, 23 4, 21 21, 3 21",
        "cup": "2 3, 17 3, 17 6, 23 6, 23 15, 17 15, 15 22, 4 22 / 17 8, 21 8, 21 13, 17 13",
        "fish": "0 12, 6 6, 13 5, 18 10, 24 5, 24 19, 18 14, 13 19, 6 18",
        "flag": "2 0, 6 0, 6 1, 23 7, 6 13, 6 24, 2 24",
        "flask": "9 0, 15 0, 15 7, 19 11, 19 24, 5 24, 5 11, 9 7",
        "hammer": "2 2, 22 2, 22 9, 15 9, 15 24, 9 24, 9 9, 2 9",
        "heart": "12 23, 1 11, 1 5, 5 1, 9 1, 12 5, 15 1, 19 1, 23 5, 23 11",
        "hourglass": "2 0, 22 0, 15 12, 22 24, 2 24, 9 12",
        "house": "12 0, 24 11, 20 11, 20 24, 4 24, 4 11, 0 11",
        "key": "2 8, 5 5, 9 5, 12 8, 12 10, 24 10, 24 17, 21 17, 21 14, 19 14, 19 17, 16 17, 16 14, 12 14, 12 16, 9 19,"
        " 5 19, 2 16 / 5 10, 9 10, 9 14, 5 14",
        "moon": "16 1, 9 2, 4 7, 3 13, 6 19, 11 23, 18 23, 22 20, 15 19, 11 15, 10 10, 12 5",
        "mushroom": "0 12, 3 5, 9 1, 15 1, 21 5, 24 12, 16 12, 17 24, 7 24, 8 12",
        "ring": "7 0, 17 0, 24 7, 24 17, 17 24, 7 24, 0 17, 0 7 / 9 6, 15 6, 18 9, 18 15, 15 18, 9 18, 6 15, 6 9",
        "stairs": "0 0, 8 0, 8 8, 16 8, 16 16, 24 16, 24 24, 0 24",
        "star": "12 0, 15 9, 24 9, 17 15, 20 24, 12 18, 4 24, 7 15, 0 9, 9 9",
        "tree": "12 0, 20 9, 16 9, 23 18, 14 18, 14 24, 10 24, 10 18, 1 18, 8 9, 4 9",
    }.items()
}
"""The twenty classes of the sample in alphabetical order."""

# Sixteen directions around the middle of the grid, in twelfths; close to a circle and exact.
_COMPASS = (
    *((12, 0), (11, 5), (8, 8), (5, 11), (0, 12), (-5, 11), (-8, 8), (-11, 5)),
    *((-12, 0), (-11, -5), (-8, -8), (-5, -11), (0, -12), (5, -11), (8, -8), (11, -5)),
)


@functools.cache
def source_shapes(count: int = 48) -> Mapping[str, Outline]:
    """Make the shapes of the source task: polygons of six to nine corners around a middle, some near, some far.

    They are the same on each call. No two of them, and none of them and a class of ``TARGETS``, share two thirds of
    the area that they cover together.

    Returns:
        ``stone_00``, ``stone_01``, ... to outlines.

    Examples:
        >>> stones = source_shapes()
        >>> len(stones), stones.keys() & TARGETS.keys()
        (48, set())
    """
    random = np.random.RandomState(2012)
    stones: list[Outline] = []
    taken = [_upright(outline) for outline in TARGETS.values()]
    while len(stones) < count:
        corners = sorted(random.permutation(len(_COMPASS))[: random.randint(6, 10)])
        reach = random.choice((4, 9, 12), size=len(corners))
        spokes = [(_COMPASS[corner], int(length)) for corner, length in zip(corners, reach, strict=True)]
        outline = (tuple((12 + x * length // 12, 12 + y * length // 12) for (x, y), length in spokes),)
        mask = _upright(outline)
        big_enough = mask.sum() > PIXELS * PIXELS // 7
        if big_enough and all((mask & other).sum() < 0.66 * (mask | other).sum() for other in taken):
            taken.append(mask)
            stones.append(outline)
    return {f"stone_{number:02d}": outline for number, outline in enumerate(stones)}


@dataclass(frozen=True)
class Drawing:
    """One image and what is on it."""

    pixels: Gray
    """RGB of shape ``(64, 64, 3)``, 0 to 255."""
    objects: tuple[tuple[str, Box], ...]
    """Name and box of each object; the box of the first is the largest."""


def draw(shapes: Mapping[str, Outline], name: str, random: np.random.RandomState) -> Drawing:
    """Draw one image whose largest object is a ``name``; about three in ten get a smaller object of another class.

    Args:
        shapes: All classes and their outlines; the second object is one of them.
        name: The class of the largest object.
        random: Decides everything else and is advanced. The legacy generator, because its stream never changes.

    Examples:
        >>> drawing = draw(TARGETS, "key", np.random.RandomState(7))
        >>> drawing.pixels.shape, drawing.objects[0][0]
        ((64, 64, 3), 'key')
    """
    canvas = _paint(random, 0, 255)
    canvas = _blend(canvas, _paint(random, 0, 255), _tangle(random, segments=6))
    objects: list[tuple[str, Box]] = []
    mask = _placed(shapes[name], random, smallest=28, largest=48)
    box = _box(mask)
    canvas = _blend(canvas, _figure_paint(canvas, mask, random), mask)
    objects.append((name, box))
    if random.random_sample() < TWO_OBJECTS:
        others = [other for other in shapes if other != name]
        other = others[random.randint(len(others))]
        for _ in range(20):
            mask = _placed(shapes[other], random, smallest=12, largest=19)
            if _area(_box(mask)) < 0.8 * _area(box) and not _overlap(_box(mask), box):
                canvas = _blend(canvas, _figure_paint(canvas, mask, random), mask)
                objects.append((other, _box(mask)))
                break
    canvas = _blend(canvas, _paint(random, 0, 255), _tangle(random, segments=2))
    noise = random.randint(-16, 17, size=canvas.shape, dtype=np.int16)
    return Drawing((canvas + noise).clip(0, 255).astype(np.uint8), tuple(objects))


def draw_many(shapes: Mapping[str, Outline], count: int, *, seed: int, stream: int) -> list[Drawing]:
    """Draw ``count`` images that go round the classes in order; image k is the same however many there are.

    Args:
        shapes: All classes and their outlines.
        count: Number of images.
        seed: The same seed gives the same images.
        stream: Images of another stream of the same seed have nothing in common with these.

    Examples:
        >>> [drawing.objects[0][0] for drawing in draw_many(TARGETS, 3, seed=0, stream=0)]
        ['arrow', 'bolt', 'comb']
    """
    names = list(shapes)
    return [
        draw(shapes, names[k % len(names)], np.random.RandomState([seed, stream, k]))  # one generator for each image
        for k in range(count)
    ]


def _stencil(outline: Outline, centre: tuple[float, float], size: float, turn: float) -> Gray:
    """Draw an outline ``size`` pixels wide as coverage 0 to 255; ``turn`` is the tangent of half the angle."""
    cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    scale = 3 * size / GRID
    image = Image.new("L", (3 * PIXELS, 3 * PIXELS))
    pen = ImageDraw.Draw(image)
    for number, ring in enumerate(outline):
        corners = [
            (
                round(3 * centre[0] + scale * (cos * (x - GRID / 2) - sin * (y - GRID / 2))),
                round(3 * centre[1] + scale * (sin * (x - GRID / 2) + cos * (y - GRID / 2))),
            )
            for x, y in ring
        ]
        pen.polygon(corners, fill=0 if number else 255)
    return np.asarray(image.reduce(3))


def _upright(outline: Outline) -> NDArray[np.bool_]:
    return _stencil(outline, centre=(PIXELS / 2, PIXELS / 2), size=PIXELS - 8, turn=0) > 127


def _placed(outline: Outline, random: np.random.RandomState, *, smallest: int, largest: int) -> Gray:
    size = random.randint(smallest, largest)
    margin = size // 2 + 2
    centre = (random.randint(margin, PIXELS - margin + 1), random.randint(margin, PIXELS - margin + 1))
    return _stencil(outline, centre, size, turn=0.5 * random.random_sample() - 0.25)


def _tangle(random: np.random.RandomState, segments: int) -> Gray:
    image = Image.new("L", (3 * PIXELS, 3 * PIXELS))
    pen = ImageDraw.Draw(image)
    for x, y, dx, dy, width in random.randint(0, 3 * PIXELS, size=(segments, 5)):
        pen.line((x, y, x + dx // 2 - 48, y + dy // 2 - 48), fill=255, width=3 + width % 6)
    return np.asarray(image.reduce(3))


_Y, _X = np.indices((PIXELS, PIXELS))


def _paint(random: np.random.RandomState, darkest: int, brightest: int) -> NDArray[np.int32]:
    """Mix two colours in one of six textures, as ``(64, 64, 3)``."""
    first, second = random.randint(darkest, brightest + 1, size=(2, 3))
    kind, period, across, down, shift = (int(k) for k in random.randint((0, 5, -3, 1, 0), (6, 12, 4, 4, 12)))
    ramp = across * _X + down * _Y + 200
    if kind == 0:
        weight = np.zeros_like(_X)
    elif kind == 1:
        weight = (ramp - ramp.min()) * 255 // (ramp.max() - ramp.min())
    elif kind == 2:
        weight = ramp // (2 * period) % 2 * 255
    elif kind == 3:
        weight = ((_X + shift) // period + (_Y + shift) // period) % 2 * 255
    elif kind == 4:
        dot = (2 * ((_X + shift) % period) - period) ** 2 + (2 * ((_Y + shift) % period) - period) ** 2
        weight = (2 * dot < period * period) * 255
    else:
        weight = random.randint(0, 256, size=(16, 16)).repeat(4, axis=0).repeat(4, axis=1)
    paint: NDArray[np.int32] = (first + (second - first) * weight[:, :, None] // 255).astype(np.int32)
    return paint


def _figure_paint(canvas: NDArray[np.int32], mask: Gray, random: np.random.RandomState) -> NDArray[np.int32]:
    """Choose paint that stands out: bright where the canvas under the mask is dark, and the other way round."""
    return _paint(random, 150, 255) if canvas[mask > 127].mean() < 128 else _paint(random, 0, 105)


def _blend(canvas: NDArray[np.int32], paint: NDArray[np.int32], mask: Gray) -> NDArray[np.int32]:
    return canvas + (paint - canvas) * mask[:, :, None].astype(np.int32) // 255


def _box(mask: Gray) -> Box:
    rows, columns = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def write_sample(folder: Path, *, seed: int = 0, train: int = TRAIN, val: int = VAL) -> Path:
    """Draw the sample and write it as ``folder/VOCdevkit/VOC2012``, in PASCAL VOC's layout; all of it or nothing.

    Args:
        folder: Made if it is not there.
        seed: The same seed gives the same images, label for label and, with one version of libjpeg, byte for byte.
        train: Number of training images; the classes take turns as the largest object.
        val: Number of validation images.

    Returns:
        ``folder/VOCdevkit``.

    Raises:
        DataError: A split has fewer images than there are classes.
        OutputError: ``folder/VOCdevkit`` is already there.

    Examples:
        >>> with TemporaryDirectory() as folder:
        ...     root = write_sample(Path(folder), train=20, val=20) / "VOC2012"
        ...     print(*sorted(path.name for path in root.iterdir()), len(list(root.glob("JPEGImages/*.jpg"))))
        Annotations ImageSets JPEGImages 40
    """
    devkit = folder / "VOCdevkit"
    if devkit.exists():
        raise OutputError(f"{devkit} is already there", notes=["give another folder, or remove this one first"])
    if min(train, val) < len(TARGETS):
        raise DataError(f"{train} and {val} images are too few: each split needs one of each of {len(TARGETS)} classes")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".drawing-") as temporary:
        root = Path(temporary, "VOCdevkit", "VOC2012")
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / name).mkdir(parents=True)
        first = 1
        for stream, (split, count) in enumerate({"train": train, "val": val}.items()):
            drawings = {
                f"2012_{number:06d}": drawing
                for number, drawing in enumerate(draw_many(TARGETS, count, seed=seed, stream=stream), start=first)
            }
            first += count
            _write_split(root, split, drawings)
        root.parent.rename(devkit)
    return devkit


def _write_split(root: Path, split: str, drawings: Mapping[str, Drawing]) -> None:
    for image_id, drawing in drawings.items():
        Image.fromarray(drawing.pixels).save(root / "JPEGImages" / f"{image_id}.jpg", quality=90)
        (root / "Annotations" / f"{image_id}.xml").write_text(_annotation(image_id, drawing), encoding="utf-8")
    lists = root / "ImageSets" / "Main"
    (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in drawings), encoding="utf-8")
    for target in TARGETS:
        present = {image_id: any(name == target for name, _ in one.objects) for image_id, one in drawings.items()}
        lines = [f"{image_id} {1 if there else -1:2d}\n" for image_id, there in present.items()]
        (lists / f"{target}_{split}.txt").write_text("".join(lines), encoding="utf-8")


def _annotation(image_id: str, drawing: Drawing) -> str:
    height, width, depth = drawing.pixels.shape
    objects = [
        {
            "name": name,
            "pose": "Unspecified",
            "truncated": 0,
            "difficult": 0,
            # VOC counts pixels from one and includes the last.
            "bndbox": {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom},
        }
        for name, (left, top, right, bottom) in drawing.objects
    ]
    facts = {
        "folder": "VOC2012",
        "filename": f"{image_id}.jpg",
        "source": {"database": "freezeplan's drawn sample", "annotation": "as drawn", "image": "drawn"},
        "size": {"width": width, "height": height, "depth": depth},
        "segmented": 0,
    }
    root = _element("annotation", facts)
    root.extend(_element("object", one) for one in objects)
    ET.indent(root, "\t")
    return ET.tostring(root, encoding="unicode") + "\n"


def _element(tag: str, value: Mapping[str, Any] | str | int) -> ET.Element:
    element = ET.Element(tag)
    if isinstance(value, Mapping):
        element.extend(_element(name, inner) for name, inner in value.items())
    else:
        element.text = str(value)
    return element


def weights_path() -> Path:
    """Return the file of convolutions that come with the package: ``features.N.weight`` and ``.bias``, 32-bit floats.

    They fit ``vgg16_slim_fc256``; benchmarks/pretrain_sample.py wrote them. The file's header says with which error.

    Examples:
        >>> from safetensors.torch import load_file
        >>> len(load_file(weights_path()))
        26
    """
    return Path(__file__).with_name("slim_vgg16.safetensors")
