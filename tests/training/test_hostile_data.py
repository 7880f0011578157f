"""Data, weights and patterns from people who mean no good: one sentence, no file from elsewhere, no memory, no wait."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import os
import pickle
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from freezeplan import FreezePlanError, load_plan
from freezeplan.errors import DataError, WeightsError
from freezeplan.plan.regex import Pattern, SlowPatternError
from freezeplan.training import archive as archive_module
from freezeplan.training import voc as voc_module
from freezeplan.training.voc import read_voc
from freezeplan.voc_vgg16.weights import read_weights


def beside(name: str) -> Any:
    """Another file of tests: its small data sets are taken from there."""
    spec = importlib.util.spec_from_file_location(name, next(Path(__file__).parents[1].rglob(f"{name}.py")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


voc_tests, mutated = beside("test_voc"), beside("test_hostile").mutated
ROOT, annotation, archive, folder = voc_tests.ROOT, voc_tests.annotation, voc_tests.archive, voc_tests.folder
small, splits, thing = voc_tests.small, voc_tests.splits, voc_tests.thing
LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
UNTRUSTED = "\n  unpack it yourself if you trust it, and give the folder"


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        splits(path)
    return str(caught.value).replace(str(path), "DATA")


@pytest.mark.parametrize(
    "text",
    [
        f"{LAUGHS}<annotation>&b;</annotation>".encode(),
        f"\ufeff{LAUGHS}<annotation/>".encode("utf-16"),
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    ],
    ids=["entities", "UTF-16", "external"],
)
def test_a_document_type_is_refused_before_anything_expands(text: bytes, tmp_path: Path) -> None:
    found = refusal(folder(tmp_path, small() | {"Annotations/t1.xml": text}))

    assert found == (
        "DATA: Annotations/t1.xml has a <!DOCTYPE>, which is not read\n"
        "  a document type can define entities that expand without end; take the line out"
    )


def encoded(text: str, encoding: str) -> bytes:
    return f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding)


def test_annotations_in_the_usual_encodings_are_read(tmp_path: Path) -> None:
    text = annotation(thing("céleri", 9)).decode()
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "iso-8859-1", "windows-1252"):
        content = encoded(text, encoding.removesuffix("-sig")) if encoding != "utf-8-sig" else text.encode(encoding)
        data = read_voc(folder(tmp_path / encoding, small() | {"Annotations/t1.xml": content}))

        assert data.train[1].objects[0].name == "céleri"


CORNER = "not a number of pixels from 0 to 1,000,000"
ANNOTATIONS = {
    "nan": (annotation(thing("cat", "nan")), f"has an object 'cat' whose xmax is nan, {CORNER}"),
    "inf": (annotation(thing("cat", "inf")), f"has an object 'cat' whose xmax is inf, {CORNER}"),
    "negative": (annotation(thing("cat", -3)), f"has an object 'cat' whose xmax is -3, {CORNER}"),
    "huge": (annotation(thing("cat", "1e300")), f"has an object 'cat' whose xmax is 1e+300, {CORNER}"),
    "long": (annotation(thing("cat", "x" * 999)), f"has an object 'cat' whose xmax is '{'x' * 60}', not a number"),
    "name": (
        annotation(thing("a\x9b2Jb", 3)),
        "has an object whose name is 'a\\x9b2Jb', not at most 200 printable characters",
    ),
    "encoding": (
        b'<?xml version="1.0" encoding="cp037"?><a/>',
        "is encoded as 'cp037', expected one of utf-8, us-ascii, iso-8859-1, windows-1252",
    ),
    "bytes": (b"<annotation>\xff</annotation>", "is not UTF-8 text (byte 12)"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_what_an_annotation_must_not_hold(case: str, tmp_path: Path) -> None:
    content, expected = ANNOTATIONS[case]

    assert (
        refusal(folder(tmp_path, small() | {"Annotations/t2.xml": content})) == f"DATA: Annotations/t2.xml {expected}"
    )


def test_sizes_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voc_module, "LARGEST_TEXT", 400)
    path = folder(tmp_path, small() | {"Annotations/t2.xml": b" " * 401})
    assert refusal(path) == "DATA: Annotations/t2.xml has 401 bytes, expected at most 400"


def test_a_file_of_a_folder_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "LARGEST", 500)
    path = folder(tmp_path, small() | {"ImageSets/Main/val.txt": b"v0" + b" " * 600})

    assert refusal(path) == "DATA: ImageSets/Main/val.txt has 602 bytes, and a file has at most 500"


def test_more_classes_than_anybody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voc_module, "MOST_CLASSES", 1)

    assert refusal(folder(tmp_path, small())) == "DATA: 2 classes; a data set has at most 1"


@pytest.mark.parametrize("id_", ["../t0", "/etc/passwd", "a/b", "a\\b", "..", "x" * 300, "a\x1b[2J"])
def test_a_listed_name_that_is_a_path(id_: str, tmp_path: Path) -> None:
    found = refusal(folder(tmp_path, small() | {"ImageSets/Main/val.txt": f"v0\n{id_}\n".encode()}))

    assert found == (
        f"DATA: ImageSets/Main/val.txt names {id_[:60]!r}, which is no name of a file\n"
        "  an image is listed by the name of its file, without folder and suffix"
    )


def test_links_in_a_folder_stay_in_it(tmp_path: Path) -> None:
    """A data folder may be a link; a link within it is followed as long as it does not leave it."""
    data = folder(tmp_path / "real", small())
    image = data / ROOT / "JPEGImages/t0.jpg"
    image.rename(data / ROOT / "t0.jpg")
    image.symlink_to("../t0.jpg")
    (tmp_path / "link").symlink_to(data)
    assert len(read_voc(tmp_path / "link").train) == 4

    (data / ROOT / "t0.jpg").rename(tmp_path / "secret.jpg")
    image.unlink()
    image.symlink_to(tmp_path / "secret.jpg")

    assert refusal(data) == (
        f"DATA: JPEGImages/t0.jpg leads out of this folder, to {tmp_path / 'secret.jpg'}\n"
        "  copy the file, or give the folder that holds everything"
    )


def test_links_in_a_ring(tmp_path: Path) -> None:
    data = folder(tmp_path, small())
    image = data / ROOT / "JPEGImages/t0.jpg"
    image.unlink()
    image.symlink_to("t0.jpg")

    assert "JPEGImages/t0.jpg" in refusal(data)


def test_an_image_that_would_start_a_program(tmp_path: Path) -> None:
    """PIL hands EPS to Ghostscript, whatever the file is called."""
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")

    assert refusal(folder(tmp_path, small() | {"JPEGImages/t1.jpg": eps.getvalue()})) == (
        "DATA: JPEGImages/t1.jpg does not decode (neither JPEG nor PNG)\n"
        "  replace it, or leave out what does not decode with --skip-bad"
    )


def test_an_image_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path, small())
    wide = io.BytesIO()
    Image.new("1", (120, 100)).save(wide, "PNG")
    (data / ROOT / "JPEGImages/t1.jpg").write_bytes(wide.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)

    assert refusal(data).startswith("DATA: JPEGImages/t1.jpg does not decode (Image size (12000 pixels) exceeds limit")


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo("x")
    info.name, info.type, info.size, info.linkname = name, kind, len(content), "/etc/passwd"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        header = header[-512:]
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**attributes: str) -> bytes:
    text = "".join(f"{len(key) + len(value) + 5:02d} {key}={value}\n" for key, value in attributes.items())
    return member("pax", tarfile.XHDTYPE, text.encode())


IN_IT = "files and folders are read"
DAMAGED = "\n  download or copy it again; a folder, a .tar, a .tar.gz or a .tgz can be read"
MEMBERS = {
    "symlink": (member("a/b", tarfile.SYMTYPE), f"a/b in it is a link; {IN_IT}{UNTRUSTED}"),
    "hard link": (member("a/b", tarfile.LNKTYPE), f"a/b in it is a link; {IN_IT}{UNTRUSTED}"),
    "device": (member("a/b", tarfile.CHRTYPE), f"a/b in it is a device; {IN_IT}{UNTRUSTED}"),
    "pipe": (member("a/b", tarfile.FIFOTYPE), f"a/b in it is a pipe; {IN_IT}{UNTRUSTED}"),
    "sparse": (pax(**{"GNU.sparse.major": "1"}) + member("a"), f"a in it is a sparse file; {IN_IT}{UNTRUSTED}"),
    "absolute": (member("/etc/passwd"), f"/etc/passwd in it leads out of the archive{UNTRUSTED}"),
    "up": (member("a/../../b"), f"a/../../b in it leads out of the archive{UNTRUSTED}"),
    "up by attribute": (pax(path="../b") + member("a"), f"../b in it leads out of the archive{UNTRUSTED}"),
    "a folder up": (member("../b", tarfile.DIRTYPE), f"../b in it leads out of the archive{UNTRUSTED}"),
    "escape": (member("../\x1b[2J"), f"../\\x1b[2J in it leads out of the archive{UNTRUSTED}"),
    "point": (member("."), f"not a whole tar archive (a file in it has no name){DAMAGED}"),
    "empty": (member(""), f"not a whole tar archive (a file in it has no name){DAMAGED}"),
    "twice": (member("a/b") + member("./a//b"), "two files are called a/b\n  pack it anew"),
    "below zero": (
        member("a", size=-512),
        f"not a whole tar archive (a file of -512 bytes begins at byte 512 of 1,536){DAMAGED}",
    ),
    "below zero by attribute": (
        pax(size="-1024") + member("a"),
        f"not a whole tar archive (a file of -1,024 bytes begins at byte 1,536 of 2,560){DAMAGED}",
    ),
    "absurd": (
        member("a", size=10**15),
        f"not a whole tar archive (a file of {10**15:,} bytes begins at byte 512 of 1,536){DAMAGED}",
    ),
    "long name": (
        member("a", tarfile.GNUTYPE_LONGNAME, b"a" * 70_000),
        f"not a whole tar archive (a name of 70,000 bytes at byte 512){DAMAGED}",
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("case", MEMBERS)
def test_archives_that_are_refused(case: str, packed: bool, tmp_path: Path) -> None:
    content, expected = MEMBERS[case]
    path = tmp_path / "voc.tar"
    path.write_bytes(gzip.compress(content + bytes(1024)) if packed else content + bytes(1024))

    assert refusal(path) == f"DATA: {expected}"


def test_names_of_names_do_not_end_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "voc.tar"
    path.write_bytes(member("x", tarfile.GNUTYPE_LONGNAME, b"name\0") * 5000 + bytes(1024))

    assert refusal(path).startswith("DATA: not in PASCAL VOC's layout\n")


def test_long_names_are_read(tmp_path: Path) -> None:
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            tar.add(folder(tmp_path / str(kind), small(), root=f"{'d' * 90}/{'ü' * 30}"), ".")

        assert len(read_voc(path).train) == 4


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "LARGEST", 2**20)
    path = tmp_path / "voc.tar.gz"
    path.write_bytes(gzip.compress(bytes(30 * 2**20)))

    assert refusal(path) == f"DATA: holds more than 1,048,576 bytes, unpacked{UNTRUSTED}"


def test_a_file_of_an_archive_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "LARGEST", 2000)
    path = archive(tmp_path / "voc.tar", small() | {"more.bin": bytes(3000)})

    assert refusal(path) == f"DATA: {ROOT}/more.bin has 3,000 bytes, and a file has at most 2,000"


def test_no_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(archive_module.tempfile, "TemporaryFile", lambda: full.open("r+b", buffering=0))
    monkeypatch.setattr(archive_module.tempfile, "gettempdir", lambda: "TMP")

    assert refusal(archive(tmp_path / "voc.tgz", small())) == (
        "DATA: cannot be unpacked (No space left on device)\n"
        "  make room in TMP, or unpack it yourself and give the folder"
    )


def test_a_damaged_compressed_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "voc.tgz", small())
    content = bytearray(path.read_bytes())
    content[200:260] = b"\xff" * 60
    path.write_bytes(content)

    assert refusal(path).startswith("DATA: not a whole tar archive (Error -3 while decompressing data: ")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    data = folder(tmp_path, small())
    monkeypatch.setattr(Path, "read_bytes", locked)

    assert refusal(data) == "DATA: ImageSets/Main/train.txt cannot be read (Permission denied)"


class Runs:
    """Writes a file as soon as it is unpickled by a reader that trusts it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["torch", "torch, old", "pickle"])
def test_weights_that_would_run_something(way: str, tmp_path: Path) -> None:
    path, content = tmp_path / "w.pth", {"state_dict": Runs(tmp_path / "ran")}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")

    with pytest.raises(WeightsError) as caught:
        read_weights(path)

    assert not (tmp_path / "ran").exists()
    asks = f"{path}: asks for posix.mkdir; a checkpoint holds tensors, and nothing in a file is executed"
    assert str(caught.value) == f"{asks}\n  save the model's state_dict, best as a safetensors file, and give that"


PATTERNS = {
    "deep": ("(" * 3000 + "a" + ")" * 3000, "'" + "(" * 60 + "...' is nested too deeply"),
    "often": ("a{99999999999}", "'a{99999999999}' repeats more often than can be counted"),
    "large": (
        "(a{4294967294}){4294967294}",
        "'(a{4294967294}){4294967294}' has counted repetitions that make more than 100,000 characters",
    ),
    "long": ("a" * 10_001, "'" + "a" * 60 + "...' has 10,001 characters, and a pattern has at most 10,000"),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_that_are_refused(case: str) -> None:
    pattern, expected = PATTERNS[case]

    with pytest.raises(FreezePlanError) as caught:
        load_plan({"version": 1, "rules": [{"match": pattern, "frozen": True}]})

    assert str(caught.value) == f"rules[0].match[0]: pattern {expected}"


@pytest.mark.parametrize("text", ["(?x)#[\n(a+)+b#]", "(?#[)(a+)+b(?#])", "(|a|)" * 60 + "b", "(?:a|a)" * 60 + "b"])
def test_patterns_that_hide_how_slow_they_are(text: str) -> None:
    """Python's own engine would not come back; the other one sees through them, or is stopped."""
    begun = time.perf_counter()
    with contextlib.suppress(SlowPatternError):
        assert not Pattern(text).fullmatch("a" * 60)

    assert time.perf_counter() - begun < 5


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.text("0123456789.-+einfa_x ", max_size=9))
def test_any_name_and_any_corner(tmp_path_factory: pytest.TempPathFactory, name: str, corner: str) -> None:
    data = tmp_path_factory.mktemp("voc")
    files = small() | {"Annotations/t1.xml": annotation(thing(name, corner))}
    path, found = archive(data / "voc.tar", files), ""
    try:
        read_voc(path)
    except DataError as error:
        found = str(error)

    assert not found or found.startswith(f"{path}: Annotations/t1.xml ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_two_thousand_mutated_data_sets(tmp_path: Path) -> None:
    """Bytes of archives, annotations, lists and images, changed at random: read or refused, within a second."""
    chance = random.Random(0)
    whole = {suffix: archive(tmp_path / f"whole.{suffix}", small()).read_bytes() for suffix in ("tar", "tgz")}
    names = sorted(small())
    found: set[str] = set()
    read, slowest = 0, 0.0
    for round_ in range(2000):
        way = ("tar", "tgz", "file", "file")[round_ % 4]
        path = tmp_path / f"voc.{way if way != 'file' else 'tar'}"
        if way == "file":
            name = chance.choice(names)
            archive(path, small() | {name: mutated(small()[name], chance)})
        else:
            path.write_bytes(mutated(whole[way], chance))
        begun = time.process_time()
        try:
            splits(path)
            read += 1
        except DataError as error:
            found.add(str(error))
        slowest = max(slowest, time.process_time() - begun)

    assert 100 < read < 1900
    assert len(found) > 100
    assert all(found)
    assert slowest < 1
