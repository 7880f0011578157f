"""Files by name, from a folder or straight out of a tar: a data set need not be unpacked, and nothing is written."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from freezeplan.errors import DataError


class Files(Protocol):
    """Files under one root, read by names such as ``ImageSets/Main/train.txt``."""

    path: Path
    """The folder or archive as the user gave it."""

    def has(self, name: str) -> bool:
        """Return whether there is a plain file of this name."""

    def read(self, name: str) -> bytes:
        """Return the whole content of the file of this name; several threads may ask at once."""


def open_files(path: Path, mark: str) -> Files:
    """Find the root that holds the file ``mark`` in a folder or an archive.

    An archive is indexed once and its members are read by their offsets; of its entries only plain files count, so that
    links and absolute names in it lead nowhere. A compressed archive is first unpacked to a nameless temporary file
    as one stream.

    Args:
        path: A folder, a ``.tar``, or a ``.tar.gz``. Folders are searched two levels deep, archives at any depth.
        mark: Name of a file that tells the root. Of several roots the one called VOC2012 is taken.

    Raises:
        DataError: If there is nothing at ``path``, if the archive is damaged or cut short, or if no ``mark`` is in it.
    """
    if path.is_dir():
        marks = [found.relative_to(path).as_posix() for up in ("", "*/", "*/*/") for found in path.glob(up + mark)]
        return _Folder(path, path / _root(path, mark, marks, [found.name for found in path.iterdir()]))
    if not path.exists():
        raise DataError("no such file or folder", where=str(path), notes=["give a VOCdevkit folder or a tar of one"])
    handle = _open_tar(path)
    try:
        members = _index(path, handle)
        marks = [name for name in members if f"/{name}".endswith(f"/{mark}")]
        root = _root(path, mark, marks, {PurePosixPath(name).parts[0] for name in members})
    except DataError:
        handle.close()
        raise
    return _Archive(path, PurePosixPath(root), members, handle)


class _Folder:
    def __init__(self, path: Path, root: Path):
        self.path = path
        self._root = root

    def has(self, name: str) -> bool:
        return (self._root / name).is_file()

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class _Archive:
    def __init__(self, path: Path, root: PurePosixPath, members: dict[str, tuple[int, int]], handle: IO[bytes]):
        self.path = path
        self._root = root
        self._members = members
        self._handle = handle
        self._lock = threading.Lock()
        weakref.finalize(self, handle.close)

    def has(self, name: str) -> bool:
        return str(self._root / name) in self._members

    def read(self, name: str) -> bytes:
        offset, size = self._members[str(self._root / name)]
        with self._lock:
            self._handle.seek(offset)
            return self._handle.read(size)


def _open_tar(path: Path) -> IO[bytes]:
    handle = path.open("rb")
    if handle.read(2) != b"\x1f\x8b":
        return handle
    with handle, gzip.open(path) as stream:
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        try:
            shutil.copyfileobj(stream, unpacked)
        except (OSError, EOFError) as error:
            unpacked.close()
            raise _damaged(path, error) from None
        return unpacked


def _index(path: Path, handle: IO[bytes]) -> dict[str, tuple[int, int]]:
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    try:
        with tarfile.open(fileobj=handle, mode="r:") as archive:
            members = {
                str(PurePosixPath(member.name)): (member.offset_data, member.size)
                for member in archive
                if member.isreg() and not member.issparse()
            }
            end = archive.offset
    except tarfile.TarError as error:
        raise _damaged(path, error) from None
    # A damaged header ends tarfile's walk without a word; a whole archive ends with a block of zeros.
    handle.seek(end)
    if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _damaged(path, f"it breaks off at byte {min(end, size)}, before the end mark of a tar")
    return members


def _damaged(path: Path, reason: object) -> DataError:
    notes = ["download or copy it again; a folder, a .tar, a .tar.gz or a .tgz can be read"]
    return DataError(f"not a whole tar archive ({reason})", where=str(path), notes=notes)


def _root(path: Path, mark: str, marks: Sequence[str], top: Iterable[str]) -> str:
    roots = sorted(found.removesuffix(mark).rstrip("/") or "." for found in marks)
    chosen = [root for root in roots if PurePosixPath(root).name == "VOC2012"] or roots
    if not chosen:
        notes = [f"looked for {mark} in it and in the folders below", f"found {_some(sorted(top))}"]
        raise DataError("not in PASCAL VOC's layout", where=str(path), notes=notes)
    if len(chosen) > 1:
        raise DataError(f"holds several data sets: {', '.join(chosen)}", where=str(path), notes=["give one of them"])
    return chosen[0]


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
