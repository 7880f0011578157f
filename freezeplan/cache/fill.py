"""Features are computed: once for each image, in the order of the data set, while others are read, hashed and written.

A shard's name is a digest of the images in it, its folder's of all else that decides, so features of other images,
another crop or other weights cannot be taken for these. A GPU is given the passes of a shard before those of the one
before are looked at, so it never waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset

from freezeplan.cache import store
from freezeplan.cache.features import Features
from freezeplan.cache.key import Boundary
from freezeplan.cache.memory import FeatureDtype, Keep, allocate, choose, now_on, to_device, without_waiting
from freezeplan.cache.reader import Batches, Reader, Targets, digest, prepared, prepared_by, read
from freezeplan.cache.replay import capture
from freezeplan.cache.writer import Writer, acquire, is_whole, load, release, wait_for_writers
from freezeplan.errors import FreezePlanError

SHARD_BYTES = 256 * 2**20
"""Images of a shard as the model gets them, or its features where they are larger, about. Where they are not larger,
phases and plans cut alike and find each other's shards."""


def fill(
    model: nn.Module,
    boundaries: Sequence[Boundary],
    dataset: Dataset[object],
    *,
    views: int,
    seed: int,
    dtype: FeatureDtype,
    batch_size: int,
    device: torch.device,
    home: torch.device,
    workers: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
    earlier: Boundary | None = None,
    keep: Keep = "auto",
    prepare: nn.Module | None = None,
) -> tuple[Features, Tensor | None]:
    """Compute what is not there yet, and return the features of the first boundary.

    Every image is read once, to know whose features they are; the model runs on those of shards that are missing, or on
    their features at an ``earlier`` boundary, where they are there. What another process is writing is left to it.
    ``AppliedPlan.cached`` says what the other arguments are; ``home`` is where the model is trained.

    Returns:
        The features; those of the first batch as they were computed just now, (N, E), None where they were on disk.

    Raises:
        FreezePlanError: If the features do not fit on the disk or under the limit, an image has another shape, or a
            feature is too large for the data type.
    """
    reader = Reader(dataset, views, seed)
    bytes_of = [b.prefix.elements * getattr(torch, dtype).itemsize for b in boundaries]
    most = max(1, SHARD_BYTES // max(*bytes_of, boundaries[0].prefix.image_bytes) // batch_size)
    directory = boundaries[0].folder.parent
    if limit is not None:
        _check_limit(directory, len(reader) * sum(bytes_of), limit)
    place = choose(keep, home, len(reader) * bytes_of[0])
    memory = None if place == "disk" else allocate(place, home, len(reader), boundaries[0].prefix.elements, dtype)
    for boundary in boundaries:
        store.begin(boundary.folder, boundary.about)
    writer = Writer(directory, limit, warn=memory is not None)
    try:
        passes = _Passes(
            model,
            boundaries,
            earlier,
            dtype,
            batch_size,
            most * batch_size,
            device,
            prepare,
            memory,
            writer,
            progress,
            len(reader),
        )
        passes.run(_hashed(read(reader, range(len(reader)), batch_size, most, workers, prepare), prepare))
        for at, name in passes.left_to_others():
            rows = range(at, min(at + most * batch_size, len(reader)))
            passes.run([(images, name) for images in read(reader, rows, batch_size, most, 0, prepare)], at)
    finally:
        writer.close()
    features = Features(
        [boundaries[0].folder / name for name in passes.names], most * batch_size, passes.targets,
        count=len(reader) // views, views=views, computed=passes.computed, seconds=passes.seconds, device=home,
        kept=place, memory=memory, writer=writer,
    )  # fmt: skip
    return features, passes.first


def _hashed(shards: Iterable[Batches], prepare: nn.Module | None) -> Iterator[tuple[Batches, str]]:
    """Each shard and its name; while it is worked on, a thread hashes the next."""
    by = prepared_by(prepare)
    with ThreadPoolExecutor(1, "freezeplan-hash") as thread:
        ahead: tuple[Batches, Future[str]] | None = None
        for images in shards:
            ready = now_on(images.batches[0].device)
            submitted = images, thread.submit(digest, images.batches, ready, by)
            if ahead is not None:
                yield ahead[0], ahead[1].result() + store.SUFFIX
            ahead = submitted
        if ahead is not None:
            yield ahead[0], ahead[1].result() + store.SUFFIX


@dataclass
class _Shard:
    """What the device was told to compute of a shard; perhaps nothing."""

    rows: slice
    locks: dict[Path, FileLock] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    """Number of the boundary -> features, (N, E)."""
    overflow: Tensor | None = None
    """The largest feature that the data type cannot hold, or 0; in host memory once it is ready."""
    ready: torch.cuda.Event | None = None

    def give_back(self) -> None:
        for path, lock in self.locks.items():
            release(path, lock)
        self.locks = {}


@dataclass
class _Passes:
    """The passes over a data set, one shard after the other."""

    model: nn.Module
    boundaries: Sequence[Boundary]
    earlier: Boundary | None
    dtype: FeatureDtype
    batch_size: int
    rows: int
    """Of a shard."""
    device: torch.device
    prepare: nn.Module | None
    memory: Tensor | None
    writer: Writer
    progress: Callable[[int, int], None] | None
    total: int
    targets: list[Targets] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0
    first: Tensor | None = None
    """The first batch's features, (N, E), where they were computed here, from images."""
    waiting: list[tuple[int, str]] = field(default_factory=list)
    """First row and name of shards that another process writes."""
    done: int = 0
    told: int = 0

    def run(self, shards: Iterable[tuple[Batches, str]], again: int | None = None) -> None:
        """Compute what is missing of some shards.

        Args:
            shards: Images and the name of their file.
            again: First row of the only one, where it was left to another process that did not write it.
        """
        before: _Shard | None = None
        now: _Shard | None = None
        try:
            for images, name in shards:
                now = self._start(images, name, again)
                if before is not None:
                    self._finish(before)
                before, now = now, None
            if before is not None:
                self._finish(before)
            if self.memory is None:
                self.writer.wait()
            self._tell()
        except BaseException:
            for shard in (before, now):
                if shard is not None:
                    shard.give_back()
            raise

    def left_to_others(self) -> Iterator[tuple[int, str]]:
        """Wait for each shard that another process was writing, and give those that it did not write."""
        if self.waiting:
            wait_for_writers()  # perhaps it was this one
        for first, name in self.waiting:
            path = self.boundaries[0].folder / name
            for lock in acquire([path], -1).values():
                release(path, lock)
            rows = slice(first, min(first + self.rows, self.total))
            if not self._take(path, rows):
                yield first, name

    def _start(self, images: Batches, name: str, again: int | None) -> _Shard:
        """Tell the device what is missing of a shard, and hold the locks of its files."""
        first = len(self.targets) if again is None else again
        shard = _Shard(slice(first, first + len(images)))
        if again is None:
            self.targets += images.targets
            self.names.append(name)
        paths = {at: boundary.folder / name for at, boundary in enumerate(self.boundaries)}
        missing = {at: path for at, path in paths.items() if not self._is_whole(at, path, len(images))}
        shard.locks = acquire(list(missing.values()), 0 if again is None else -1)
        try:
            for at, path in missing.items():
                if path in shard.locks and self._is_whole(at, path, len(images)):  # by now
                    release(path, shard.locks.pop(path))
            mine = [at for at, path in paths.items() if path in shard.locks]
            if mine:
                self._compute(shard, mine, images, name)
            if 0 not in mine and not self._take(paths[0], shard.rows):
                self.waiting.append((first, name))
        except BaseException:
            shard.give_back()
            raise
        return shard

    def _compute(self, shard: _Shard, mine: Sequence[int], images: Batches, name: str) -> None:
        started = time.perf_counter()
        prefixes = [self.boundaries[at].prefix for at in mine]
        given, ahead = images.batches, None
        if self.earlier is not None:
            path = self.earlier.folder / name
            if is_whole(path, len(images), self.earlier.prefix.elements):
                given, ahead = list(torch.split(load(path), self.batch_size)), self.earlier.prefix
        numbers = getattr(torch, self.dtype)
        for at, prefix in zip(mine, prefixes, strict=True):
            if at == 0 and self.memory is not None and self.memory.device == self.device:
                shard.features[at] = self.memory[shard.rows]
            else:
                size = (len(images), prefix.elements)
                shard.features[at] = torch.empty(size, dtype=numbers, device=self.device)
        row, overflow = 0, []
        for batch in given:
            there = to_device(batch, self.device)
            parts = capture(self.model, prefixes, there if ahead else prepared(there, self.prepare), ahead)
            for at, part in zip(mine, parts, strict=True):
                kept = shard.features[at][row : row + len(batch)].copy_(part)
                if part.is_floating_point() and torch.finfo(part.dtype).max > torch.finfo(numbers).max:
                    lost = part.isfinite() & ~kept.isfinite()
                    overflow.append(torch.where(lost, part.abs(), 0).amax())
                if at == row == shard.rows.start == 0 and ahead is None:
                    self.first = part.clone()
            row += len(batch)
        if 0 in shard.features and self.memory is not None and self.memory.device != self.device:
            shard.features[0] = self.memory[shard.rows].copy_(shard.features[0], non_blocking=True)
        if overflow:
            shard.overflow = without_waiting(torch.stack(overflow).amax().float())
        shard.ready = now_on(self.device)
        self.computed += len(images)
        self.seconds += time.perf_counter() - started

    def _finish(self, shard: _Shard) -> None:
        """Wait for what the device was told, and have it written.

        Features that are on their way to the disk and nowhere else take memory: those of one shard are written at a
        time.
        """
        started = time.perf_counter()
        if shard.ready is not None:
            shard.ready.synchronize()
        if shard.overflow is not None and (largest := float(shard.overflow)) > 0:
            raise FreezePlanError(
                f"a feature of {largest:.3g} is too large for {self.dtype}", notes=["dtype='bfloat16' or 'float32'"]
            )
        self.seconds += time.perf_counter() - started if shard.features else 0
        if self.memory is None or set(shard.features) - {0}:
            self.writer.wait()
            self._tell()
        name = self.names[shard.rows.start // self.rows]
        for at, features in shard.features.items():
            boundary = self.boundaries[at]
            lock = shard.locks.pop(boundary.folder / name)
            self.writer.put(boundary.folder / name, boundary.about, features, shard.ready, lock)
        self.done = max(self.done, shard.rows.stop)
        if self.memory is not None:
            self._tell()

    def _tell(self) -> None:
        if self.progress is not None and self.done > self.told:
            self.progress(self.done, self.total)
            self.told = self.done

    def _take(self, path: Path, rows: slice) -> bool:
        """Copy features that are on disk to memory, if they are there and it is used."""
        if not self._is_whole(0, path, rows.stop - rows.start):
            return False
        if self.memory is not None:
            self.memory[rows].copy_(to_device(load(path), self.memory.device))
        return True

    def _is_whole(self, at: int, path: Path, rows: int) -> bool:
        return is_whole(path, rows, self.boundaries[at].prefix.elements)


def _check_limit(directory: Path, needed: int, limit: int) -> None:
    if needed > limit:
        raise FreezePlanError(
            f"{directory}: these features take {needed:,} bytes, and the limit is {limit:,}",
            notes=["a larger limit, fewer views, or dtype='float16'"],
        )
