"""The official archive over the network: resumed where it was cut, checked before it gets its name.

What counts is the checksum. Until it is right the file is called ``NAME.part``, which a later call goes on with; so a
mirror may be slow, cut off or lie, and the worst that comes of it is an error.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from freezeplan.atomic import whole_file
from freezeplan.cache.store import default_directory
from freezeplan.errors import DataError
from freezeplan.training.voc import VocData

ATTEMPTS, TIMEOUT = 5, 60.0
"""How often a download is begun or gone on with in one call, and seconds in which a server has to send something."""
_CHUNK = 2**18
_TOLD = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers after which asking again may help."""


@dataclass(frozen=True)
class Archive:
    """A file of which it is known what it holds.

    Examples:
        >>> Archive("http://example.org/data/small.tar", "d41d8cd98f00b204e9800998ecf8427e", 0, (2, 1)).name
        'small.tar'
    """

    url: str
    """Where it is from; the last part is its name."""
    md5: str
    size: int
    """Bytes."""
    images: tuple[int, int]
    """Images of the training and the validation list."""
    root: str = ""
    """Folder in it that the layout begins at."""
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]


VOC2012 = Archive(
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    size=1_999_639_040,
    images=(5717, 5823),
    root="VOC2012",
    classes=(
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
        "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
)  # fmt: skip
"""Training and validation images of PASCAL VOC 2012; address and checksum as torchvision lists them."""


def default_folder() -> Path:
    """Return where archives are kept if nothing else is said: ``data`` in freezeplan's folder of the user's cache."""
    return default_directory() / "data"


def download(
    archive: Archive,
    folder: Path,
    *,
    url: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
    pause: float = 1.0,
) -> Path:
    """Download an archive, or go on with a download, or return the one that is there.

    Args:
        archive: What is wanted.
        folder: Where to; made if it is not there.
        url: A mirror. None: ``archive.url``. Size and checksum are the archive's in either case.
        progress: Told the number of bytes that are there, several times a second, also while another process on
            this machine downloads them, which is waited for.
        pause: Seconds before the second attempt; twice as long before each further one.

    Returns:
        The file, whole: its checksum was right in this call. Of an archive that is there already nothing is asked for.

    Raises:
        DataError: If the server cannot be reached or has no such file, sends other bytes, or the disk has no room. What
            was downloaded stays as ``NAME.part`` unless it is wrong.
    """
    url = url or archive.url
    if not url.startswith(("http://", "https://")) or not url.isascii():
        raise DataError(f"--url begins with http:// or https:// and is ASCII, found {url!r}")
    path = folder / archive.name
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return _checked(path, archive, path)
        with _held(filelock.FileLock(f"{part}.lock"), part, progress):
            if path.exists():  # another process had it
                return _checked(path, archive, path)
            _check_room(archive, part)
            _fetch(archive, url, part, progress, pause)
            _checked(part, archive, path)
            part.replace(path)
            _about(part).unlink(missing_ok=True)
            Path(f"{part}.lock").unlink(missing_ok=True)
    except OSError as error:
        notes = ["make room, or give another folder with --data"]
        raise DataError(f"cannot be written ({error.strerror or error})", where=str(path), notes=notes) from None
    return path


def lists_of(data: VocData) -> tuple[int, int]:
    """Return the number of images of the training and of the validation list."""
    return len(data.train), len(data.val)


def looks_like(data: VocData, archive: Archive) -> bool:
    """Return whether a data set passes for an archive: it has the classes, in the folder of the archive's name."""
    return data.classes == archive.classes and data.files.root.endswith(archive.root)


def check_counts(data: VocData, archive: Archive) -> None:
    """Refuse a data set that has not the lists of the archive that it is to be.

    Raises:
        DataError: If the training or the validation list has another number of images.
    """
    found = lists_of(data)
    if found != archive.images:
        raise DataError(
            f"{found[0]:,} training and {found[1]:,} validation images, expected {archive.images[0]:,} and "
            f"{archive.images[1]:,}",
            where=str(data.files.path),
        )


@contextmanager
def _held(lock: filelock.BaseFileLock, part: Path, progress: Callable[[int], None]) -> Iterator[None]:
    """Hold a lock; while another process does, tell how far that one is."""
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except filelock.Timeout:
            progress(part.stat().st_size if part.exists() else 0)
    try:
        yield
    finally:
        lock.release()


class _CutError(Exception):
    """The transfer ended early; what came is kept, and asking again may help."""


def _fetch(archive: Archive, url: str, part: Path, progress: Callable[[int], None], pause: float) -> None:
    """Fill ``part`` to the archive's size, in several attempts."""
    reason = ""
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have == archive.size:
            return
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _transfer(archive, url, part, have, progress)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the server's file ends before ours: begin anew
                part.unlink(missing_ok=True)
            elif error.code not in _TOLD:
                notes = ["--url URL takes it from a mirror; --data FILE reads an archive that is already there"]
                raise DataError(f"the server answers {error.code} {error.reason}", where=url, notes=notes) from None
            reason = f"the server answers {error.code} {error.reason}"
        except (
            _CutError,
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            UnicodeError,
        ) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    have = part.stat().st_size if part.exists() else 0
    if have != archive.size:
        notes = [f"run it again to go on at byte {have:,} of {archive.size:,}, or give a mirror with --url URL"]
        raise DataError(f"{ATTEMPTS} attempts, the last ended with: {reason}", where=url, notes=notes)


def _transfer(archive: Archive, url: str, part: Path, have: int, progress: Callable[[int], None]) -> None:
    """Ask once for what is missing, and write what comes."""
    headers = {"User-Agent": "freezeplan", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        tag = _tag(part, url)
        headers |= {"If-Range": tag} if tag else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        start = have if answer.status == 206 else 0
        _check_announced(archive, url, answer, start)
        _keep_tag(part, url, answer.headers.get("ETag") or "")
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            done, shown = start, 0.0
            while chunk := _received(answer):
                if done + len(chunk) > archive.size:
                    part.unlink()
                    raise DataError(f"the server sends more than the archive's {archive.size:,} bytes", where=url)
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - shown > 0.1:
                    shown = time.monotonic()
                    progress(done)
            progress(done)
            file.flush()
            os.fsync(file.fileno())
    if done < archive.size:
        raise _CutError(f"the connection ended at byte {done:,} of {archive.size:,}")


def _received(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(str(error) or type(error).__name__) from None


def _check_announced(archive: Archive, url: str, answer: http.client.HTTPResponse, start: int) -> None:
    """Compare what the server says of its file with what is known, before anything is written."""
    if start:
        first, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if not first.startswith(f"{start}-"):
            raise DataError(f"asked for bytes from {start:,} on, the server sends {first or 'others'}", where=url)
    else:
        total = answer.headers.get("Content-Length", "")
    if total.isdigit() and int(total) != archive.size:
        notes = ["it is another file, or a page that says why there is none; --url URL takes it from a mirror"]
        raise DataError(f"the server has {int(total):,} bytes, expected {archive.size:,}", where=url, notes=notes)


def _checked(found: Path, archive: Archive, path: Path) -> Path:
    """Return the final path if the file's checksum is right; a part that is wrong is removed."""
    with found.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 == archive.md5:
        return path
    if found == path:
        notes = ["move it away to download the archive, or give another folder with --data"]
        raise DataError(f"is another file: its md5 is {md5}, expected {archive.md5}", where=str(path), notes=notes)
    found.unlink()
    _about(found).unlink(missing_ok=True)
    notes = ["it was removed; run it again, or give a mirror with --url URL"]
    raise DataError(f"wrong bytes came: their md5 is {md5}, expected {archive.md5}", where=str(path), notes=notes)


def _check_room(archive: Archive, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have > archive.size:
        part.unlink()
        have = 0
    free = shutil.disk_usage(part.parent).free
    if archive.size - have > free:
        notes = ["make room, or give --data FOLDER on another disk"]
        message = f"{archive.size - have:,} bytes are to be downloaded, and the disk has {free:,} left"
        raise DataError(message, where=str(part.parent), notes=notes)


def _about(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _tag(part: Path, url: str) -> str:
    """Return the server's mark of the version of which ``part`` is the beginning."""
    try:
        about = json.loads(_about(part).read_text(encoding="utf-8"))
        return str(about["tag"]) if about["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _keep_tag(part: Path, url: str, tag: str) -> None:
    strong = "" if tag.startswith("W/") else tag  # a weak one does not promise equal bytes
    with whole_file(_about(part)) as temporary:
        temporary.write_text(json.dumps({"url": url, "tag": strong}), encoding="utf-8")
