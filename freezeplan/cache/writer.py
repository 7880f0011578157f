"""Files of features, written beside the training by a thread: each whole or not there, by whoever holds its lock."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from freezeplan.atomic import flush, whole_file
from freezeplan.cache import store
from freezeplan.cache.memory import to_host
from freezeplan.errors import FreezePlanError, FreezePlanWarning

_WRITERS: weakref.WeakSet[Writer] = weakref.WeakSet()


class Writer:
    """One thread that writes files of features, in the order in which they are given to it.

    The interpreter waits for it at its exit.

    Args:
        directory: The folder with all entries.
        limit: Bytes that it may hold; None: what the disk has.
        warn: Whether features are in memory too, so that what the disk refuses costs the next run time, and is a
            warning; otherwise it is an error, of ``wait``.
    """

    def __init__(self, directory: Path, limit: int | None, *, warn: bool):
        self._directory, self._limit, self._warn = directory, limit, warn
        self._thread = ThreadPoolExecutor(1, "freezeplan-features")
        self._last: Future[None] | None = None
        self.error: FreezePlanError | None = None
        """What the disk refused; nothing is written after it."""
        _WRITERS.add(self)

    def put(
        self, path: Path, about: Mapping[str, Any], features: Tensor, ready: torch.cuda.Event | None, lock: FileLock
    ) -> None:
        """Have features written, and return at once.

        Args:
            path: Of the file.
            about: What its entry says of itself.
            features: (N, E), on any device; not changed until they are written.
            ready: When their values are there.
            lock: Held for this file; released once it is written.
        """
        self._last = self._thread.submit(self._write, path, about, features, ready, lock)

    def wait(self) -> None:
        """Wait until everything that was given is written.

        Raises:
            FreezePlanError: If something could not be, and it is nowhere else.
        """
        if self._last is not None:
            self._last.result()
        if self.error is not None and not self._warn:
            raise self.error

    def close(self) -> None:
        """End the thread once everything is written."""
        self._thread.shutdown(wait=False)

    def _write(
        self, path: Path, about: Mapping[str, Any], features: Tensor, ready: torch.cuda.Event | None, lock: FileLock
    ) -> None:
        try:
            if self.error is None:
                store.check_room(self._directory, features.numel() * features.element_size(), self._limit)
                store.begin(path.parent, about)  # removed meanwhile, perhaps
                save(path, to_host(features, ready))
        except FreezePlanError as error:
            self._refused(error)
        except Exception as error:
            self._refused(FreezePlanError(f"{path}: features cannot be written: {error}"))
        finally:
            release(path, lock)

    def _refused(self, error: FreezePlanError) -> None:
        self.error = error
        if self._warn:
            with suppress(FreezePlanWarning):  # where warnings are errors
                warnings.warn(
                    f"training goes on with features in memory, and the next run computes them again: {error}",
                    FreezePlanWarning,
                    stacklevel=2,
                )


def wait_for_writers() -> None:
    """Wait until all features that this process has computed are on disk, or refused by it."""
    for writer in list(_WRITERS):
        if writer._last is not None:
            writer._last.result()


if hasattr(os, "register_at_fork"):  # a process that is forked has no such thread, and reads what it wrote
    os.register_at_fork(before=wait_for_writers)


def save(path: Path, features: Tensor) -> None:
    """Write features, (N, E), to a file that is whole or not there.

    Raises:
        FreezePlanError: If the file system refuses.
    """
    with store.explained(path.parent.parent), whole_file(path) as temporary:
        try:
            save_file({"features": features.contiguous()}, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        flush(temporary)


def load(path: Path) -> Tensor:
    """Return the features in a file, (N, E), mapped into memory.

    Raises:
        FreezePlanError: If it is gone or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found: Tensor = file.get_tensor("features")
            return found
    except (OSError, SafetensorError):
        raise FreezePlanError(
            f"{path}: these features are gone or damaged since they were computed",
            notes=["applied.cached(...) again computes what is missing; freezeplan cache rm removes entries"],
        ) from None


def is_whole(path: Path, rows: int, columns: int) -> bool:
    """Return whether a file holds so many features of this length."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.get_slice("features").get_shape()) == [rows, columns]
    except (FileNotFoundError, SafetensorError, OSError):
        return False


def acquire(paths: Sequence[Path], timeout: float = 0) -> dict[Path, FileLock]:
    """Take the locks of those of these files that nobody else writes within so many seconds; -1: wait for each.

    Raises:
        FreezePlanError: If the folder cannot be written to.
    """
    held: dict[Path, FileLock] = {}
    try:
        for path in paths:
            lock = FileLock(f"{path}.lock", thread_local=False)  # the thread that writes gives it back
            with store.explained(path.parent.parent):
                try:
                    lock.acquire(timeout=timeout)
                except Timeout:  # which is an OSError
                    continue
            held[path] = lock
    except BaseException:
        for path, lock in held.items():
            release(path, lock)
        raise
    return held


def release(path: Path, lock: FileLock) -> None:
    """Give a lock back."""
    Path(f"{path}.lock").unlink(missing_ok=True)  # the file is there: who waits for the lock will see it
    lock.release()
