"""Class folders and the folders of splits: which file is an image, of which class and split, by its name alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from freezeplan.errors import DataError, Problem, printable
from freezeplan.training.archive import some

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing")
"""Names of split folders, and values of a table's ``split`` column, in any case; the first that is there is taken."""
SUFFIXES = (".jpg", ".jpeg", ".png")
"""Of images, in any case."""
_Below = Mapping[str, tuple[str, ...]]
"""An image's name to its parts below the folder that all images share."""


@dataclass(frozen=True)
class Folders:
    """Images by their splits and classes."""

    train: Mapping[str, str]
    """File to class."""
    val: Mapping[str, str]
    """The same; empty where there is no validation split."""
    splits: tuple[str, ...] = ()
    """The folders of both, where there are any."""
    notes: tuple[str, ...] = ()
    """What was not used, and what is no image."""


def read_folders(names: Iterable[str], where: str) -> Folders:
    """Read splits and classes off the names of files.

    Args:
        names: Below the data set's root. Hidden files, and what Macs leave in archives, do not count.
        where: The data set, for errors.

    Raises:
        DataError: If no image is there, an image is in no class folder, or one of both splits is missing beside folders
            that are no split.

    Examples:
        >>> found = read_folders(["Train/rose/1.jpg", "Test/rose/2.jpg", "Test/rose/3.webp"], "photos")
        >>> found.train, found.val, found.splits
        ({'Train/rose/1.jpg': 'rose'}, {'Test/rose/2.jpg': 'rose'}, ('Train', 'Test'))
        >>> found.notes
        ('left out: 1 .webp file; images are .jpg, .jpeg and .png',)
    """
    seen = sorted(name for name in names if not _hidden(name))
    images = [name for name in seen if name.lower().endswith(SUFFIXES)]
    others = [name for name in seen if not name.lower().endswith(SUFFIXES)]
    if not images:
        found = _by_suffix(others) if others else "no file"
        notes = [f"images are {', '.join(SUFFIXES)} files in one folder a class; found {found}"]
        raise DataError("no image is in it", where=where, notes=notes)
    left_out = _left_out(images, others)
    shared = PurePosixPath(*_common([PurePosixPath(name).parent.parts for name in images]))
    below = {name: PurePosixPath(name).relative_to(shared).parts for name in images}
    top = sorted({parts[0] for parts in below.values() if len(parts) > 1})
    train, val = first(TRAIN, top), first(VAL, top)
    problem = _outside(below, top, train, str(shared)) or _beside(below, top, train)
    if problem:
        raise DataError(replace(problem, where=where, notes=(*problem.notes, *left_out)))
    if train is None:
        return Folders({name: parts[0] for name, parts in below.items()}, {}, (), left_out)
    splits = tuple(name for name in (train, val) if name)
    sides = [{name: parts[1] for name, parts in below.items() if parts[0] == split} for split in (train, val)]
    return Folders(sides[0], sides[1], splits, unused(set(top).difference(splits)) + left_out)


def first(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    """Return the name that is the first of ``wanted``, whatever its case.

    Examples:
        >>> first(VAL, ["Test", "Valid", "rose"])
        'Valid'
    """
    there = sorted(names)
    return next((name for word in wanted for name in there if name.lower() == word), None)


def unused(names: Iterable[str]) -> tuple[str, ...]:
    """Say which splits are not used; nothing where there is none."""
    found = sorted(names)
    return (f"unused: {some(found)}",) if found else ()


def _outside(below: _Below, top: Sequence[str], train: str | None, shared: str) -> Problem | None:
    """Find images that are in no class folder."""
    loose = [name for name, parts in below.items() if len(parts) < (3 if train else 2)]
    if not loose and (train or len(top) > 1):
        return None
    notes = ["one folder a class: photos/rose/1.jpg; or train/rose/1.jpg and val/rose/2.jpg"]
    if train and any(len(below[name]) == 2 for name in loose):
        notes.append(_rename(train))
    if not loose or (len(loose) == len(below) and shared != "."):
        found = f"all images are in one folder, {shared!r}, and a class is a folder; two classes or more"
    elif len(loose) == 1:
        found = f"an image lies outside a class folder: {printable(loose[0])}"
    else:
        found = f"{len(loose)} images lie outside a class folder, the first is {printable(loose[0])}"
    return Problem(found, notes=tuple(notes))


def _beside(below: _Below, top: Sequence[str], train: str | None) -> Problem | None:
    """Find folders that are no split where one of both splits is missing: what is in them may be what is missing."""
    split = train or next((name for name in top if name.lower() in VAL and _holds_classes(below, name)), None)
    strange = [name for name in top if name.lower() not in TRAIN + VAL]
    if split is None or (train and (not strange or first(VAL, top))):
        return None
    found = f"the folder {split!r} is a split, and " + (
        f"beside it {'is' if len(strange) == 1 else 'are'} {some(list(map(repr, strange)))}, no split"
        if strange
        else "there is no training split"
    )
    known = f"training images are in {' or '.join(TRAIN)}, validation images in {', '.join(VAL[:-1])} or {VAL[-1]}"
    return Problem(found, notes=(f"{known}, in any case; rename the folder, or move it away", _rename(split)))


def _holds_classes(below: _Below, folder: str) -> bool:
    return all(len(parts) > 2 for parts in below.values() if parts[0] == folder)


def _rename(split: str) -> str:
    return f"the folder {split!r} is read as a split; rename it if it is a class"


def _left_out(images: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Say which files are no images by their names, and which folders hold nothing else."""
    if not others:
        return ()
    used = {folder for name in images for folder in PurePosixPath(name).parents}
    above = [list(PurePosixPath(name).parents)[::-1] for name in others]
    lost = {str(next((folder for folder in folders if folder not in used), "")) for folders in above} - {""}
    so = f", so no image is in {some(sorted(map(repr, lost)))}" if lost else ""
    known = f"images are {', '.join(SUFFIXES[:-1])} and {SUFFIXES[-1]}"
    return (f"left out: {_by_suffix(others)} file{'s' if len(others) > 1 else ''}{so}; {known}",)


def _by_suffix(names: Sequence[str]) -> str:
    counts = Counter(printable(PurePosixPath(name).suffix.lower()) or "suffixless" for name in names)
    most = counts.most_common(3)
    rest = len(names) - sum(count for _, count in most)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in [*most, *([("other", rest)] if rest else [])])


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all paths begin with, less the one that would leave no class folder."""
    low, high = min(paths), max(paths)
    count = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    found = low[:count]
    return found[:-1] if found and found[-1].lower() in TRAIN else found
