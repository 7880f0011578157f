"""Files by name, from a folder or straight out of a tar: a data set need not be unpacked, and nothing is written.

Both may come from a stranger: nothing outside the folder is read, and what an archive claims is checked before use.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from freezeplan.errors import DataError, printable

LARGEST = 256 * 2**20
"""Bytes of one file, and of what a compressed archive may always hold."""
RATIO = 20
"""Times its size that a larger compressed archive may hold; photos do not compress at all."""
_META = 2**16
"""Bytes of a long name or of extended attributes."""
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_CALLED = (".tar", ".tar.gz", ".tgz")
"""How a file is called that may be a damaged tar; of another name it is something else."""
_READABLE = f"a folder, a {', a '.join(_CALLED[:-1])} or a {_CALLED[-1]} can be read"
_ZIP = (b"PK\3\4", b"PK\5\6")


class Files(Protocol):
    """Files under one root, read by names such as ``ImageSets/Main/train.txt``."""

    path: Path
    """The folder or archive as the user gave it."""
    root: str
    """The folder that the names are below: on the disk or in the archive."""

    def names(self) -> Sequence[str]:
        """Return the names of all plain files, sorted."""

    def has(self, name: str) -> bool:
        """Return whether there is a plain file of this name."""

    def read(self, name: str) -> bytes:
        """Return the whole content of the file of this name; several threads may ask at once."""


def open_any(path: Path) -> Files:
    """Open a folder or an archive whose names begin at its top; see ``open_files`` for what is refused.

    Raises:
        DataError: If there is nothing at ``path``, or the archive is damaged, cut short or refused.
    """
    if path.is_dir():
        return _Folder(path, path)
    members, handle = _open_archive(path)
    return _Archive(path, PurePosixPath("."), members, handle)


def open_files(path: Path, mark: str) -> Files:
    """Find the root that holds the file ``mark`` in a folder or an archive.

    An archive is indexed once and its members are read by their offsets; nothing of it is unpacked into a folder. It
    is refused if a name in it is absolute or holds ``..``, if it has links, devices or two files of one name, or if a
    file in it is larger than ``LARGEST``. A compressed archive is first unpacked to a nameless temporary file as one
    stream, of at most ``LARGEST`` bytes or ``RATIO`` times its size. In a folder, links that lead out are refused.

    Args:
        path: A folder, a ``.tar``, or a ``.tar.gz``. Folders are searched two levels deep, archives at any depth.
        mark: Name of a file that tells the root. Of several roots the one called VOC2012 is taken.

    Raises:
        DataError: If there is nothing at ``path``, if the archive is damaged, cut short or refused, or if no ``mark``
            is in it. ``has`` and ``read`` raise it too, where a file cannot be read or is refused.
    """
    if path.is_dir():
        marks = [found.relative_to(path).as_posix() for up in ("", "*/", "*/*/") for found in path.glob(up + mark)]
        return _Folder(path, path / _root(path, mark, marks, [found.name for found in path.iterdir()]))
    members, handle = _open_archive(path)
    marks = [name for name in members if f"/{name}".endswith(f"/{mark}")]
    try:
        root = _root(path, mark, marks, {PurePosixPath(name).parts[0] for name in members})
    except DataError:
        handle.close()
        raise
    return _Archive(path, PurePosixPath(root), members, handle)


def _open_archive(path: Path) -> tuple[dict[str, tuple[int, int]], IO[bytes]]:
    if not path.is_file():
        raise DataError("no such file or folder", where=str(path), notes=["give a folder, or a tar of one"])
    handle = _open_tar(path)
    try:
        return dict(_index(path, handle)), handle
    except DataError:
        handle.close()
        raise


class _Folder:
    def __init__(self, path: Path, root: Path):
        self.path = path
        self._root = root
        self.root = root.resolve().as_posix()
        self._inside = path.resolve()

    def names(self) -> Sequence[str]:
        folders = os.walk(self._root)
        found = [
            Path(folder, name).relative_to(self._root).as_posix() for folder, _, files in folders for name in files
        ]
        return sorted(found)

    def has(self, name: str) -> bool:
        try:
            found = (self._root / name).resolve()
            if not found.is_file():
                return False
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is locked, a ring of links
            raise _unreadable(self.path, name, error) from None
        if not found.is_relative_to(self._inside):
            notes = ["copy the file, or give the folder that holds everything"]
            raise DataError(f"{_shown(name)} leads out of this folder, to {found}", where=str(self.path), notes=notes)
        return True

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise DataError(f"there is no {_shown(name)}", where=str(self.path))
        try:
            size = (self._root / name).stat().st_size
            _check_size(self.path, name, size)
            return (self._root / name).read_bytes()
        except OSError as error:
            raise _unreadable(self.path, name, error) from None


class _Archive:
    def __init__(self, path: Path, root: PurePosixPath, members: dict[str, tuple[int, int]], handle: IO[bytes]):
        self.path = path
        self._root = root
        self.root = str(root)
        self._members = members
        self._handle = handle
        self._lock = threading.Lock()
        weakref.finalize(self, handle.close)

    def names(self) -> Sequence[str]:
        paths = map(PurePosixPath, self._members)
        return sorted(str(path.relative_to(self._root)) for path in paths if path.is_relative_to(self._root))

    def has(self, name: str) -> bool:
        return str(self._root / name) in self._members

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise DataError(f"there is no {_shown(name)}", where=str(self.path))
        offset, size = self._members[str(self._root / name)]
        with self._lock:
            self._handle.seek(offset)
            return self._handle.read(size)


def _open_tar(path: Path) -> IO[bytes]:
    try:
        handle = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from None
    if handle.read(2) != b"\x1f\x8b":
        return handle
    most = max(LARGEST, RATIO * os.fstat(handle.fileno()).st_size)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    try:
        with handle, gzip.open(path) as stream:
            for chunk in _chunks(path, stream):
                if unpacked.tell() + len(chunk) > most:
                    notes = ["unpack it yourself if you trust it, and give the folder"]
                    raise DataError(f"holds more than {most:,} bytes, unpacked", where=str(path), notes=notes)
                unpacked.write(chunk)
    except OSError as error:
        unpacked.close()
        notes = [f"make room in {tempfile.gettempdir()}, or unpack it yourself and give the folder"]
        raise DataError(f"cannot be unpacked ({error.strerror})", where=str(path), notes=notes) from None
    except DataError:
        unpacked.close()
        raise
    return unpacked


def _chunks(path: Path, stream: gzip.GzipFile) -> Iterator[bytes]:
    while True:
        try:
            chunk = stream.read(2**20)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from None
        if not chunk:
            return
        yield chunk


def _index(path: Path, handle: IO[bytes]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name, offset and size of each plain file, once all that is claimed of it holds.

    ``tarfile`` reads the headers but does not walk: sizes below zero send it round in circles, long names of long names
    down to the end of the stack.
    """
    end, at, name, attributes = handle.seek(0, os.SEEK_END), 0, "", dict[str, str]()
    seen: set[str] = set()
    while (block := _read(handle, at, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(attributes.get("size", member.size))
        except (tarfile.TarError, ValueError) as error:
            if at == 0 and (block.startswith(_ZIP) or not path.name.lower().endswith(_CALLED)):
                raise _no_tar(path) from None
            # A whole archive ends with a block of zeros.
            reason = str(error) if at == 0 else f"it breaks off at byte {at}, before the end mark of a tar"
            raise _damaged(path, reason) from None
        at += tarfile.BLOCKSIZE
        if not 0 <= size <= end - at:
            raise _damaged(path, f"a file of {size:,} bytes begins at byte {at:,} of {end:,}")
        kind, start = member.type, at
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > _META:
                raise _damaged(path, f"a name of {size:,} bytes at byte {at:,}")
            content = _read(handle, at, size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                name = content.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind != tarfile.GNUTYPE_LONGLINK:
                attributes = _attributes(content)
            at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            continue
        called = attributes.get("path", name or member.name)
        sparse = kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in attributes)
        name, attributes = "", {}
        if kind != tarfile.XGLTYPE:
            _check_member(path, called, "sparse file" if sparse else _KINDS.get(kind, ""))
        if kind in _PLAIN or kind not in tarfile.SUPPORTED_TYPES or kind == tarfile.XGLTYPE:
            at += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if kind in _PLAIN:
            _check_size(path, called, size)
            plain = str(PurePosixPath(called))
            if plain == ".":
                raise _damaged(path, "a file in it has no name")
            if plain in seen:
                raise DataError(f"two files are called {_shown(plain)}", where=str(path), notes=["pack it anew"])
            seen.add(plain)
            yield plain, (start, size)


_KINDS = {
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}


def _check_member(path: Path, name: str, kind: str) -> None:
    notes = ["unpack it yourself if you trust it, and give the folder"]
    if kind:
        raise DataError(f"{_shown(name)} in it is a {kind}; files and folders are read", where=str(path), notes=notes)
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise DataError(f"{_shown(name)} in it leads out of the archive", where=str(path), notes=notes)


def _check_size(path: Path, name: str, size: int) -> None:
    if size > LARGEST:
        raise DataError(f"{_shown(name)} has {size:,} bytes, and a file has at most {LARGEST:,}", where=str(path))


def _read(handle: IO[bytes], at: int, size: int) -> bytes:
    handle.seek(at)
    return handle.read(size)


def _attributes(content: bytes) -> dict[str, str]:
    """Return the path and the size that extended attributes give, and whatever else they call by name."""
    found = re.findall(rb"(?:^|\n)\d+ ([\w.]+)=([^\n]*)(?=\n)", content)
    return {key.decode("ascii", "replace"): value.decode("utf-8", "surrogateescape") for key, value in found}


def _unreadable(path: Path, name: str, error: OSError | RuntimeError) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{_shown(name)} cannot be read ({reason})", where=str(path))


def _shown(name: str, limit: int = 100) -> str:
    """A name as a terminal may have it."""
    plain = printable(name[:limit])
    return plain if len(name) <= limit else f"{plain}..."


def _no_tar(path: Path) -> DataError:
    notes = ["unpack a zip or another archive first, and give the folder", _READABLE]
    return DataError("no tar archive", where=str(path), notes=notes)


def _damaged(path: Path, reason: object) -> DataError:
    notes = [f"download or copy it again; {_READABLE}"]
    return DataError(f"not a whole tar archive ({reason})", where=str(path), notes=notes)


def _root(path: Path, mark: str, marks: Sequence[str], top: Iterable[str]) -> str:
    roots = sorted(found.removesuffix(mark).rstrip("/") or "." for found in marks)
    chosen = [root for root in roots if PurePosixPath(root).name == "VOC2012"] or roots
    if not chosen:
        notes = [f"looked for {mark} in it and in the folders below", f"found {some(sorted(top))}"]
        raise DataError("not in PASCAL VOC's layout", where=str(path), notes=notes)
    if len(chosen) > 1:
        raise DataError(f"holds several data sets: {', '.join(chosen)}", where=str(path), notes=["give one of them"])
    return chosen[0]


def some(names: Sequence[str], limit: int = 5) -> str:
    """Return the first of some names, as a terminal may have them, and how many more there are.

    Examples:
        >>> some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(map(_shown, names[:limit])) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
