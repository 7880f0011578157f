"""Images of every mode keep their content: grey of 16 bits, palettes, transparency, four colours, one bit."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freezeplan.errors import DataError
from freezeplan.training import photos as photos_module
from freezeplan.training.photos import read_photos
from freezeplan.training.voc import load_split, open_image, to_rgb

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
DEEP = np.array([[0, 1, 255, 256, 4095, 32767, 32768, 65535]], dtype=np.uint16)


def png(values: np.ndarray, kind: int, bits: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG as the standard describes it; PIL writes few of these."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    raw = values.astype(">u2" if bits == 16 else np.uint8)
    rows = b"".join(b"\0" + (np.packbits(row) if bits == 1 else row).tobytes() for row in raw)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in extra)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def red(content: bytes) -> list[int]:
    return np.asarray(open_image(content))[0, :, 0].tolist()


@pytest.mark.parametrize("kind", [GREY, RGB, GREY_ALPHA, RGB_ALPHA])
def test_sixteen_bits_become_eight_whatever_else_a_pixel_holds(kind: int) -> None:
    values = np.stack([DEEP] * SAMPLES[kind], -1)

    found = open_image(png(values, kind, 16))

    assert (found.mode, np.asarray(found)[0].tolist()) == ("RGB", [[value >> 8] * 3 for value in DEEP[0].tolist()])


def test_a_transparent_grey_does_not_turn_sixteen_bits_white() -> None:
    assert red(png(DEEP, GREY, 16, (b"tRNS", b"\0\0"))) == [value >> 8 for value in DEEP[0].tolist()]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_in_either_order(mode: str) -> None:
    order = "big" if mode.endswith("B") else "little"
    content = b"".join(value.to_bytes(2, order) for value in DEEP[0].tolist())

    found = to_rgb(Image.frombytes(mode, (DEEP.shape[1], 1), content))

    assert np.asarray(found)[0, :, 0].tolist() == [value >> 8 for value in DEEP[0].tolist()]


def test_what_older_versions_of_pillow_make_of_a_png_of_sixteen_bits() -> None:
    """Mode I, before 11; the numbers go to 65,535 all the same."""
    picture = Image.fromarray(DEEP.astype(np.int32))
    picture.format = "PNG"

    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == [value >> 8 for value in DEEP[0].tolist()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [b"\0", b"\x80\xff"])
def test_a_palette_gives_its_colours_with_transparency_and_without_a_warning(alpha: bytes) -> None:
    palette = (b"PLTE", bytes([10, 20, 30, 40, 50, 60]))

    found = open_image(png(np.array([[0, 1]]), PALETTE, 8, palette, (b"tRNS", alpha)))

    assert np.asarray(found)[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_transparency_is_dropped_and_the_stored_colour_stays_as_with_timm() -> None:
    content = png(np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]]), RGB_ALPHA, 8)

    assert np.asarray(open_image(content))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert open_image(content).tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_one_bit_is_black_or_white() -> None:
    assert red(png(np.array([[0, 1, 1, 0]]), GREY, 1)) == [0, 255, 255, 0]


def test_four_colours_of_print() -> None:
    content = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(content, "JPEG")

    colour = np.asarray(open_image(content.getvalue()))[0, 0].tolist()

    assert colour[0] > 240
    assert max(colour[1:]) < 15


def test_a_photo_is_read_as_it_is_stored_and_not_turned_as_with_timm() -> None:
    """timm's loader does not read EXIF's orientation either; docs/compare.md says so."""
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(content, "JPEG", exif=exif)

    assert open_image(content.getvalue()).size == (20, 10)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_white_is_refused_by_name_or_skipped(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither JPEG nor PNG has one, but data sets that timm reads do."""
    pictures = [(Image.new("RGB", (8, 8)), number % 2) for number in range(4)]
    pictures[2] = (Image.new(mode, (8, 8)), 0)
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: pictures)
    data = read_photos("torch/pictures")

    with pytest.raises(DataError) as caught:
        load_split(data, "train", image_size=8, rule="largest")

    assert str(caught.value) == (
        f"torch/pictures: 0/2 does not decode (pixels of mode {mode}, for which black and white are no fixed numbers)\n"
        "  replace it, or leave out what does not decode with --skip-bad"
    )
    assert load_split(data, "train", image_size=8, rule="largest", skip_bad=True).skipped == ("0/2",)


def test_grey_of_sixteen_bits_that_timm_gives_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: [(deep, number % 2) for number in range(4)])

    images = load_split(read_photos("torch/pictures"), "train", image_size=8, rule="largest").images

    assert photos_module.OF_TIMM
    assert images.unique().tolist() == [128]


def test_deep_photos_in_class_folders_keep_their_content(tmp_path: Path) -> None:
    """Each in its own grey: all white they would be one image, and share their cached features."""
    for number in range(8):
        file = tmp_path / ("rose", "tulip")[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png(np.full((8, 8), 8000 * number), GREY, 16))

    data = read_photos(tmp_path)
    images = torch.cat([load_split(data, split, image_size=8, rule="largest").images for split in ("train", "val")])

    assert sorted(image.unique().tolist() for image in images) == [[8000 * number >> 8] for number in range(8)]
