"""Features on disk: the output of the frozen part for every image, computed once, in memory-mapped shards.

A shard's name is a digest of the images in it, its folder's of all else that decides, so features of other images,
another crop or other weights cannot be taken for these. A shard is written under another name first and then renamed,
by the one process that holds its lock.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import pickle
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from freezeplan import names, seal, store, zoo
from freezeplan.errors import ApplyError, FreezePlanError
from freezeplan.independence import largest_difference, same
from freezeplan.prefix import Prefix
from freezeplan.replay import capture
from freezeplan.resolution import Resolution
from freezeplan.whole import flush, whole_file

FeatureDtype = Literal["float32", "float16", "bfloat16"]
SHARD_BYTES = 256 * 2**20
"""Images of a shard, or its features where they are larger, about: both are in memory until they are written. Where
they are not larger, phases and plans cut alike and find each other's shards."""
DTYPES: tuple[FeatureDtype, ...] = ("float32", "float16", "bfloat16")


class Features(Dataset[Any]):
    """Features of a data set's images, in their order, each with what the data set gives beside the image.

    An item is ``(features, *targets)``, features of shape (E,), or features alone where the data set gives images
    alone. With K views an item is one of an image's K, drawn by torch's random state.

    Args:
        shards: The files, in order.
        rows: Rows of each of them but the last.
        targets: What stands beside each row, view by view; None: nothing.
        count: Number of images.
        views: Number of views of each.
        computed: Rows that were computed and not found on disk.
        seconds: That computing them took.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        rows: int,
        targets: Sequence[tuple[Any, ...] | None],
        *,
        count: int,
        views: int,
        computed: int = 0,
        seconds: float = 0.0,
    ):
        self._shards, self._rows, self._targets = tuple(shards), rows, list(targets)
        self._count, self.views = count, views
        self.computed = computed
        self.seconds = seconds
        self.size_difference = 0.0
        """By how much features change with the number of images in a batch, relative to the largest; measured."""
        self._open: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        try:
            index = operator.index(index)
        except TypeError:
            raise ApplyError(
                f"an item is one image's, by its number; found a {type(index).__name__}",
                notes=["features.batch([0, 1, 2]) gives several images' features in one tensor"],
            ) from None
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = self._row(index % len(self))
        return self._item(row, self._features(row).clone())

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several items, as a loader asks for them; it copies them into a batch."""
        rows = [self._row(index) for index in indices]
        return [self._item(row, self._features(row)) for row in rows]

    def batch(self, indices: Sequence[int] | Tensor, view: int = 0) -> Tensor:
        """Return the features of some images.

        Args:
            indices: Which images, N of them.
            view: Which view of them.

        Returns:
            (N, E), in memory.

        Raises:
            IndexError: If there is no such image, or no such view.
        """
        found = indices.tolist() if isinstance(indices, Tensor) else indices
        if not all(0 <= index < self._count for index in found) or not 0 <= view < self.views:
            raise IndexError(f"images {found} of {self._count}, view {view} of {self.views}")
        return torch.stack([self._features(view * self._count + index) for index in found])

    def _row(self, index: int) -> int:
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        return view * self._count + index

    def _features(self, row: int) -> Tensor:
        number, at = divmod(row, self._rows)
        if number not in self._open:
            path = self._shards[number]
            try:
                with safe_open(path, "pt") as file:
                    self._open[number] = file.get_tensor("features")
            except (OSError, SafetensorError):
                raise FreezePlanError(
                    f"{path}: these features are gone or damaged since they were computed",
                    notes=["applied.cached(...) again computes what is missing; freezeplan cache rm removes entries"],
                ) from None
        return self._open[number][at]

    def _item(self, row: int, features: Tensor) -> Any:
        targets = self._targets[row]
        return features if targets is None else (features, *targets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process maps the files itself


def key(model: nn.Module, part: Resolution, prefix: Prefix, dtype: FeatureDtype, device: torch.device) -> str:
    """Return a digest of all that decides about the bits of features but the images.

    Frozen parameters and buffers, bit by bit; which outputs are kept; the modules' own settings; the device and the
    numbers that it computes with; the versions of torch and timm.
    """
    found = hashlib.sha256()
    live = names.modules(model)
    facts = {
        "format": 2,  # convolutions of cached calls lie channels-last while features are computed
        "model": [zoo.title(model), type(model).__module__, type(model).__qualname__],
        "calls": [(call.module, call.number, repr(call.outputs), repr(live.get(call.module))) for call in prefix.calls],
        "image": [prefix.image_shape, str(prefix.image_dtype)],
        "dtype": dtype,
        **arithmetic(device),
        "versions": [torch.__version__, zoo.version()],
    }
    found.update(json.dumps(facts).encode())
    for name, tensors in seal.still(model, part):
        found.update(f"{name} {seal.digest(tensors)}".encode())
    return found.hexdigest()[:16]


def arithmetic(device: torch.device) -> dict[str, Any]:
    """Return what decides about the bits of a product of matrices besides its numbers, as plain data.

    The kind of device and its name; autocast; how exact float32 products are (TF32); cuDNN's version; on the CPU its
    instruction set and the number of threads, which change the order of sums.

    Examples:
        >>> arithmetic(torch.device("cpu"))["device"][0]
        'cpu'
    """
    kind = device.type
    named = torch.cuda.get_device_name(device) if kind == "cuda" else ""
    cpu = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()] if kind == "cpu" else []
    return {
        "device": [kind, named, *cpu],
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "",
        "precision": {place: _setting(place) for place in _PRECISIONS},
        "cudnn": torch.backends.cudnn.version() if kind == "cuda" else None,  # type: ignore[no-untyped-call]
        "override": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    }


_PRECISIONS = (
    "fp32_precision", "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision", "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision", "cuda.matmul.allow_tf32", "cudnn.allow_tf32",
    "cuda.matmul.allow_bf16_reduced_precision_reduction", "cuda.matmul.allow_fp16_reduced_precision_reduction",
)  # fmt: skip
"""Settings below ``torch.backends``; the newer ones are there from torch 2.9 on, which refuses to read the older ones
where a newer one was set."""


def _setting(place: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(operator.attrgetter(place)(torch.backends))
    except (AttributeError, RuntimeError):
        return ""


@dataclass(frozen=True)
class Boundary:
    """Where the frozen part ends in one phase, and where its features are kept."""

    prefix: Prefix
    folder: Path
    about: Mapping[str, Any]
    """What ``freezeplan cache ls`` says of them."""


def fill(
    model: nn.Module,
    boundaries: Sequence[Boundary],
    dataset: Dataset[Any],
    *,
    views: int,
    seed: int,
    dtype: FeatureDtype,
    batch_size: int,
    device: torch.device,
    workers: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
    earlier: Boundary | None = None,
) -> Features:
    """Compute what is not there yet, and return the features of the first boundary.

    Every image is read once, to know whose features they are; the model runs on those of shards that are missing, or on
    their features at an ``earlier`` boundary, where they are there. What another process is writing is left to it.
    ``AppliedPlan.cached`` says what the other arguments are.

    Raises:
        FreezePlanError: If the features do not fit on the disk or under the limit, an image has another shape, or a
            feature is too large for the data type.
    """
    reader = _Reader(dataset, views, seed)
    first = boundaries[0].prefix
    bytes_of = [b.prefix.elements * getattr(torch, dtype).itemsize for b in boundaries]
    most = max(1, SHARD_BYTES // max(*bytes_of, first.image_bytes) // batch_size)
    rows = most * batch_size
    directory = boundaries[0].folder.parent
    if limit is not None:
        _check_limit(directory, len(reader) * sum(bytes_of), limit)
    for boundary in boundaries:
        store.begin(boundary.folder, boundary.about)
    targets: list[tuple[Any, ...] | None] = []
    shards: list[list[Path]] = [[] for _ in boundaries]
    waiting: list[tuple[int, Path]] = []
    computed, seconds = 0, 0.0

    def write(batches: Sequence[Tensor], missing: Sequence[tuple[int, Path]]) -> None:
        nonlocal computed, seconds
        store.check_room(directory, sum(bytes_of[at] for at, _ in missing) * sum(map(len, batches)), limit)
        started = time.perf_counter()
        prefixes = [boundaries[at].prefix for at, _ in missing]
        given, ahead = batches, None
        if earlier is not None and _whole(earlier.folder / missing[0][1].name, sum(map(len, batches)), earlier):
            with safe_open(earlier.folder / missing[0][1].name, "pt") as file:
                given, ahead = file.get_tensor("features").split(batch_size), earlier.prefix
        parts = [capture(model, prefixes, batch.to(device), ahead) for batch in given]
        for column, (at, path) in enumerate(missing):
            store.begin(boundaries[at].folder, boundaries[at].about)  # removed meanwhile, perhaps
            _write(path, torch.cat([_stored(part[column], dtype) for part in parts]))
        computed += sum(map(len, batches))
        seconds += time.perf_counter() - started

    for number, (batches, found) in enumerate(_shards(reader, first, batch_size, most, workers)):
        targets += found
        name = _digest(batches) + store.SUFFIX
        paths = [boundary.folder / name for boundary in boundaries]
        for at, path in enumerate(paths):
            shards[at].append(path)
        missing = [(at, p) for at, p in enumerate(paths) if not _whole(p, sum(map(len, batches)), boundaries[at])]
        with _locked([path for _, path in missing]) as held:
            mine = [(at, path) for at, path in missing if path in held]
            mine = [(at, p) for at, p in mine if not _whole(p, sum(map(len, batches)), boundaries[at])]
            if mine:
                write(batches, mine)
            if progress is not None:
                progress(len(targets), len(reader))
            if any(at == 0 and path not in held for at, path in missing):
                waiting.append((number, paths[0]))
    for number, path in waiting:
        with _locked([path], timeout=-1):
            part = _Rows(reader, range(number * rows, min((number + 1) * rows, len(reader))))
            batches, _ = next(_shards(part, first, batch_size, most, 0))
            if not _whole(path, sum(map(len, batches)), boundaries[0]):
                write(batches, [(0, path)])
    return Features(
        shards[0], rows, targets, count=len(reader) // views, views=views, computed=computed, seconds=seconds
    )


def check_stored(
    model: nn.Module, prefix: Prefix, images: Tensor, features: Features, dtype: FeatureDtype, device: torch.device
) -> float:
    """Compute the first batch of features once more, and compare it with what is stored, bit by bit.

    It is the very computation that stored them: the same images in one batch, under the same autocast, with weights in
    the same memory format.

    Args:
        model: As it was when the features were computed.
        prefix: What is cached of it.
        images: The first batch of them, (N, C, H, W).
        features: What is stored.
        dtype: Of what is stored.
        device: Where the passes run.

    Returns:
        By how much the features of the first three images differ if only these are in the batch, relative to the
        largest: the rounding of a device that chooses kernels by shape. It is reported, and never judged.

    Raises:
        ApplyError: If they differ: something that no digest covers has changed.
    """
    fresh = capture(model, [prefix], images.to(device))[0]
    stored = torch.stack([features._features(row) for row in range(len(fresh))])
    if not same(_stored(fresh, dtype), stored):
        raise ApplyError(
            "the features on disk are not those that the model gives now",
            notes=["freezeplan cache rm, then again; if it stays so, the frozen part is not deterministic"],
        )
    return largest_difference(fresh[:3], capture(model, [prefix], images[:3].to(device))[0])


def image_of(item: Any) -> Tensor:
    """Return the image of a data set's item: the item itself, or its first part.

    Raises:
        ApplyError: If there is no image.
    """
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = f"{image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
        raise ApplyError(
            f"an item of the data set is an image, or begins with one, as a floating-point tensor; found a {found}",
            notes=["let the data set's transform end in ToTensor and Normalize, as for training"],
        )
    return image


def check_arguments(dataset: Any, *, views: int, batch_size: int, dtype: str) -> None:
    """Refuse what features cannot be kept of, or in.

    Raises:
        ApplyError: If the data set has no length or no index, is empty, or a number or the data type is no such one.
    """
    if isinstance(dataset, DataLoader):
        raise ApplyError(
            "features are kept of a data set, image by image; found a DataLoader",
            notes=["applied.cached(loader.dataset, ...), and a DataLoader of what it gives"],
        )
    counted = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not counted or isinstance(dataset, (IterableDataset, Tensor)):
        raise ApplyError(
            f"features are kept of a data set with len(dataset) and dataset[index]; found a {type(dataset).__name__}",
            notes=["torch.utils.data.TensorDataset(images, labels) makes one of tensors"],
        )
    if dtype not in DTYPES:
        raise ApplyError(f"dtype is {', '.join(map(repr, DTYPES))}, found {dtype!r}")
    if views < 1 or batch_size < 1 or not len(dataset):
        raise ApplyError(
            f"features need at least one image, one view and one image a pass, found {len(dataset)}, {views} and "
            f"{batch_size}"
        )


def check_fixed(dataset: Dataset[Any], views: int, seed: int) -> None:
    """Refuse images that are not the same each time.

    Sixteen of them are read twice, from two random states. A transform that seldom acts shows too: reading its image
    moves one of the global random states.

    Raises:
        ApplyError: If the data set augments at random and no views were asked for, or in a way that no seed reaches.
    """
    count = len(dataset)  # type: ignore[arg-type]
    for index in sorted({at * count // 16 for at in range(16)}):
        seeds = (2 * index + 1, 2 * index + 2) if views == 1 else (seed + index, seed + index)
        (one, drawn), (two, _) = (_seeded(dataset, index, chosen) for chosen in seeds)
        same = _digest([image_of(one)]) == _digest([image_of(two)])
        if views == 1 and (drawn or not same):
            raise ApplyError(
                f"image {index} is not the same each time: the data set augments at random, and features are computed "
                "once",
                notes=["views=4 keeps four fixed augmented versions of each image; or take the augmentation out"],
            )
        if not same:
            raise ApplyError(
                f"image {index} is not the same twice for the same seed: its augmentation draws from a random "
                "state of its own",
                notes=["let it draw from torch's, NumPy's or Python's global random state"],
            )


def first_images(dataset: Dataset[Any], views: int, seed: int) -> Tensor:
    """Return the first three images, of their first view; (3, C, H, W), some of them twice where there are fewer."""
    reader = _Reader(dataset, views, seed)
    with _own_random_state():
        return torch.stack([image_of(reader[row % len(dataset)]) for row in range(3)])  # type: ignore[arg-type]


def first_batch(dataset: Dataset[Any], views: int, seed: int, batch_size: int) -> Tensor:
    """Return the images of the first batch that ``fill`` computes features of, (N, C, H, W)."""
    reader = _Reader(dataset, views, seed)
    with _own_random_state():
        return torch.stack([image_of(reader[row]) for row in range(min(batch_size, len(reader)))])


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Whatever is drawn or seeded here, the caller's random states stay as they are."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seeded(dataset: Dataset[Any], index: int, seed: int) -> tuple[Any, bool]:
    """An item as it is drawn from a seed, and whether anything was drawn for it."""
    with _own_random_state():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        before = _random_states()
        item = dataset[index]
        return item, _random_states() != before


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.random.get_rng_state().numpy().tobytes()


class _Reader(Dataset[Any]):
    """Every view of every image, view by view; each view is drawn from a seed of its own."""

    def __init__(self, dataset: Dataset[Any], views: int, seed: int):
        self.dataset, self.views, self.seed = dataset, views, seed

    def __len__(self) -> int:
        return self.views * len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> Any:
        view, index = divmod(row, len(self.dataset))  # type: ignore[arg-type]
        if self.views == 1:
            return self.dataset[index]
        digest = hashlib.sha256(f"{self.seed} {view} {index}".encode()).digest()
        return _seeded(self.dataset, index, int.from_bytes(digest[:7], "big"))[0]


class _Rows(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any], rows: range):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[self.rows[row]]


def _shards(
    reader: Dataset[Any], prefix: Prefix, batch_size: int, most: int, workers: int
) -> Iterator[tuple[list[Tensor], list[tuple[Any, ...] | None]]]:
    """The images of one shard after the other, in batches, and what stands beside them."""
    collate: Callable[[list[Any]], list[Any]] = list
    batches = iter(DataLoader(reader, batch_size=batch_size, num_workers=workers, collate_fn=collate))
    row = 0
    while shard := list(islice(batches, most)):
        stacked: list[Tensor] = []
        targets: list[tuple[Any, ...] | None] = []
        for items in shard:
            images = [image_of(item) for item in items]
            for image in images:
                if tuple(image.shape) != prefix.image_shape or image.dtype != prefix.image_dtype:
                    raise FreezePlanError(
                        f"row {row} is {image.dtype} of shape {tuple(image.shape)}, the first image "
                        f"{prefix.image_dtype} of shape {prefix.image_shape}",
                        notes=["features are kept of images of one size: resize and crop them in the transform"],
                    )
                row += 1
            stacked.append(torch.stack(images))
            targets += [tuple(item[1:]) if isinstance(item, (tuple, list)) else None for item in items]
        yield stacked, targets


def _digest(batches: list[Tensor]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(f"{batch.dtype}{tuple(batch.shape)}".encode())
        found.update(batch.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _stored(features: Tensor, dtype: FeatureDtype) -> Tensor:
    found = features.to(getattr(torch, dtype))
    if bool(features.isfinite().all()) and not bool(found.isfinite().all()):
        raise FreezePlanError(
            f"a feature of {float(features.abs().max()):.3g} is too large for {dtype}",
            notes=["dtype='bfloat16' or 'float32'"],
        )
    return found.cpu()


def _write(path: Path, features: Tensor) -> None:
    with store.explained(path.parent.parent), whole_file(path) as temporary:
        try:
            save_file({"features": features.contiguous()}, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        flush(temporary)


def _whole(path: Path, rows: int, boundary: Boundary) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return list(file.get_slice("features").get_shape()) == [rows, boundary.prefix.elements]
    except (FileNotFoundError, SafetensorError, OSError):
        return False


@contextmanager
def _locked(paths: Sequence[Path], timeout: float = 0) -> Iterator[set[Path]]:
    """Hold the locks of those of these files that nobody else writes within so many seconds; -1: wait for each."""
    held: dict[Path, FileLock] = {}
    try:
        for path in paths:
            lock = FileLock(f"{path}.lock")
            with store.explained(path.parent.parent):
                try:
                    lock.acquire(timeout=timeout)
                except Timeout:  # which is an OSError
                    continue
            held[path] = lock
        yield set(held)
    finally:
        for path, lock in held.items():
            Path(f"{path}.lock").unlink(missing_ok=True)  # the file is there: who waits for the lock will see it
            lock.release()


def _check_limit(directory: Path, needed: int, limit: int) -> None:
    if needed > limit:
        raise FreezePlanError(
            f"{directory}: these features take {needed:,} bytes, and the limit is {limit:,}",
            notes=["a larger limit, fewer views, or dtype='float16'"],
        )
