"""Checkpoints of a run that is not finished: written whole or not at all, the last two kept, none trusted unseen."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freezeplan.atomic import flush, whole_file
from freezeplan.errors import OutputError

FOLDER = "unfinished"
"""Inside the folder of results, until they are written: as long as it is there, the run is not finished."""


@dataclass(frozen=True)
class Checkpoint:
    """The file of one arm and seed, and the one before it."""

    path: Path
    warn: Callable[[str], None]
    """Is told of a damaged file."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state: tensors, numbers, strings, lists and dicts. The one before it stays until the next.

        Raises:
            OutputError: If it cannot be written. What was there stays.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        try:
            with whole_file(self.path) as temporary:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
                flush(temporary)
                if self.path.exists():
                    self.path.replace(self._previous)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            notes = ["make room and go on with --resume"]
            raise OutputError(f"no checkpoint can be written: {reason}", where=str(self.path), notes=notes) from error

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole; None if there is none. A damaged file is told to ``warn``.

        Nothing in a file is executed (``weights_only=True``): one that asks for it is damaged, whatever its digest.
        """
        for path in (self.path, self._previous):
            if not path.exists():
                continue
            state = _state(path.read_bytes())
            if state is not None:
                return state
            self.warn(f"{path}: damaged, left aside; what was written before it is used")
        return None

    @property
    def _previous(self) -> Path:
        return self.path.with_suffix(".previous")


def _state(content: bytes) -> dict[str, Any] | None:
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    try:
        found = torch.load(io.BytesIO(content[32:]), weights_only=True)
    except Exception:  # what a made-up file makes a reader raise is not documented
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    warn: Callable[[str], None]

    def of(self, arm: str, seed: int) -> Checkpoint:
        """Return the checkpoint of one arm and seed."""
        return Checkpoint(self.folder / f"{arm}-seed{seed}.checkpoint", self.warn)

    def remove(self) -> None:
        """Remove all of them: the results are written."""
        with suppress(OSError):  # what cannot be removed is gone on with, to the same results
            _remove(self.folder)


def open_checkpoints(
    out: Path, facts: Mapping[str, Any], *, resume: bool, overwrite: bool, warn: Callable[[str], None]
) -> Checkpoints:
    """Prepare the folder of a run's checkpoints.

    Args:
        out: The folder of its results.
        facts: All that decides its figures, as data for JSON; a run goes on only with the same.
        resume: Go on where there is something to go on from.
        overwrite: Throw away what is there.
        warn: Is told of damaged checkpoints.

    Raises:
        OutputError: If there is an unfinished run and neither was asked for, or it is another run, or ``run.json``,
            which says so, is damaged or missing, or the folder cannot be written. Nothing is removed then.
    """
    folder = out / FOLDER
    about = folder / "run.json"
    wanted = json.loads(json.dumps(facts))
    begun = any(path.suffix in (".checkpoint", ".previous") for path in folder.glob("*"))
    if begun and not resume and not overwrite:
        notes = ["--resume goes on with it, --overwrite starts anew"]
        raise OutputError("holds an unfinished run", where=str(out), notes=notes)
    if resume and (begun or about.exists()):
        check_same_run(out, read_facts(about), wanted)
        return Checkpoints(folder, warn)
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        with whole_file(about) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
            flush(temporary)
    except OSError as error:
        raise OutputError(f"cannot be written to: {error.strerror}", where=str(out)) from error
    return Checkpoints(folder, warn)


def check_same_run(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare what is written down of a run with what is asked for now.

    Raises:
        OutputError: With the first fact that differs.
    """
    other = next((key for key in {**found, **wanted} if found.get(key) != wanted.get(key)), None)
    if other is not None:
        raise OutputError(
            f"holds another run: its {other} is {found.get(other)}, now it is {wanted.get(other)}",
            where=str(where),
            notes=["give what it was begun with, or another --out"],
        )


def read_facts(about: Path) -> dict[str, Any]:
    """Return what a file says of a run.

    Raises:
        OutputError: If it is damaged or missing.
    """
    reason = "is damaged"
    try:
        found = json.loads(about.read_bytes())
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        reason = "is missing"
    except (OSError, ValueError, RecursionError):
        pass
    notes = ["--overwrite starts anew, or give another --out"]
    raise OutputError(f"{reason}, and it says which run the checkpoints are of", where=str(about), notes=notes)


def _remove(folder: Path) -> None:
    """Remove a folder under another name, so that a kill midway leaves no half of one to go on with."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)  # of an earlier kill
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
