"""The folder that keeps features: what is in it, how much, and how it goes. No torch.

Each entry is a folder whose name is a digest of all that decides about features but the images: frozen weights and
buffers, what is kept of the pass, numbers, versions. In it each shard is a file whose name is a digest of its images.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freezeplan.errors import FreezePlanError, did_you_mean

ABOUT = "about.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Entry:
    """The features that one frozen part gave."""

    key: str
    about: Mapping[str, Any]
    """``model``, ``plan``, ``memoised``, ``dtype``, ``image``, ``bytes`` an image."""
    shards: int
    bytes: int
    """Of all its files."""
    used: float
    """When it was last read or written, in seconds since 1970."""


def default_directory() -> Path:
    """Return where features are kept if nothing else is said: ``freezeplan`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME``, or ``~/.cache``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freezeplan"


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Say what a failure of the file system means for the features.

    Raises:
        FreezePlanError: Instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise FreezePlanError(
            f"{directory}: features cannot be kept there: {error.strerror or error}",
            notes=["another folder: --cache-dir, in Python directory=; compare and run can do without: --no-cache"],
        ) from error


def entries(directory: Path) -> tuple[Entry, ...]:
    """Return what a folder keeps, the last used first. What is not an entry is left out.

    Examples:
        >>> entries(Path("no-such-folder"))
        ()
    """
    found = [entry for path in directory.glob(f"*/{ABOUT}") if (entry := _entry(path.parent)) is not None]
    return tuple(sorted(found, key=lambda entry: (-entry.used, entry.key)))


def _entry(folder: Path) -> Entry | None:
    """What a folder keeps; None where it is no entry, or no longer one: another process may remove it meanwhile."""
    about = _about(folder)
    if about is None:
        return None
    try:
        files = {path.name: path.stat() for path in folder.iterdir()}
    except OSError:
        return None
    if ABOUT not in files:
        return None
    shards = sum(name.endswith(SUFFIX) for name in files)
    return Entry(folder.name, about, shards, sum(file.st_size for file in files.values()), files[ABOUT].st_mtime)


def _about(folder: Path) -> dict[str, Any] | None:
    """What an entry says of itself; None where it says nothing, or nonsense."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    texts = ("model", "plan", "dtype")
    whole = isinstance(about, dict) and all(isinstance(about.get(key), str) for key in texts)
    return about if whole and isinstance(about.get("memoised"), list) else None


def begin(folder: Path, about: Mapping[str, Any]) -> None:
    """Make an entry's folder, or note that it is used now.

    Raises:
        FreezePlanError: If the folder cannot be made or written to.
    """
    with explained(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        if _about(folder) is not None:
            os.utime(folder / ABOUT)
            return
        temporary = folder / f"{ABOUT}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / ABOUT)


def used(directory: Path) -> int:
    """Return the bytes of all entries of a folder."""
    return sum(entry.bytes for entry in entries(directory))


def check_room(directory: Path, wanted: int, limit: int | None) -> None:
    """Refuse to write more than fits.

    Args:
        directory: The folder with all entries; it need not be there yet.
        wanted: Bytes to be written.
        limit: Bytes that the folder may hold; None: what the disk has.

    Raises:
        FreezePlanError: If they do not fit, with what is there and what helps.
    """
    kept = used(directory)
    if limit is not None and kept + wanted > limit:
        raise FreezePlanError(
            f"{directory}: {wanted:,} bytes of features would make {kept + wanted:,}, and the limit is {limit:,}",
            notes=[f"freezeplan cache rm --dir {directory} KEY, a larger limit, or dtype='float16'"],
        )
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise FreezePlanError(
            f"{directory}: {wanted:,} bytes of features, and the disk has {free:,} left",
            notes=[f"freezeplan cache rm --dir {directory} KEY, or dtype='float16'"],
        )


def remove(directory: Path, keys: Sequence[str]) -> int:
    """Remove entries, all or none.

    Args:
        directory: The folder that holds them.
        keys: Their keys, or unambiguous beginnings of them.

    Returns:
        The bytes that became free.

    Raises:
        FreezePlanError: If a key fits none of them, or several.
    """
    there = entries(directory)
    found: dict[str, Entry] = {}
    for key in keys:
        fits = [entry for entry in there if entry.key.startswith(key)]
        if len(fits) != 1:
            many = f"{len(fits)} entries begin with {key!r}" if fits else f"no entry has the key {key!r}"
            notes = did_you_mean(key, [entry.key for entry in there])
            raise FreezePlanError(f"{directory}: {many}", notes=notes or [f"freezeplan cache ls --dir {directory}"])
        found[fits[0].key] = fits[0]
    for name in found:  # a folder without its about.json is no entry: half removed is not half there
        gone = directory / f"{name}.{time.time_ns()}.removed"
        try:
            (directory / name).rename(gone)
            (gone / ABOUT).unlink()
            shutil.rmtree(gone)
        except FileNotFoundError:  # another process removes it
            continue
        except OSError as error:
            raise FreezePlanError(f"{directory / name}: it cannot be removed: {error.strerror or error}") from error
    return sum(entry.bytes for entry in found.values())
