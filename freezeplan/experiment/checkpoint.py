"""Checkpoints of a run that is not finished: written whole or not at all, the last two kept, none trusted unseen."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from freezeplan.errors import OutputError
from freezeplan.whole import flush, whole_file

FOLDER = "unfinished"
"""Inside the folder of results, until they are written."""


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

        Nothing in a file is executed (``weights_only=True``).
        """
        for path in (self.path, self._previous):
            if not path.exists():
                continue
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                state: dict[str, Any] = torch.load(io.BytesIO(content[32:]), weights_only=True)
                return state
            self.warn(f"{path}: damaged, left aside; what was written before it is used")
        return None

    @property
    def _previous(self) -> Path:
        return self.path.with_suffix(".previous")


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
        shutil.rmtree(self.folder, ignore_errors=True)


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
        OutputError: If there is an unfinished run and neither was asked for, or it is another run, or the folder
            cannot be written.
    """
    folder = out / FOLDER
    about = folder / "run.json"
    wanted = json.loads(json.dumps(facts))
    if any(folder.glob("*.checkpoint")) and not resume and not overwrite:
        notes = ["--resume goes on with it, --overwrite starts anew"]
        raise OutputError("holds an unfinished run", where=str(out), notes=notes)
    if about.exists() and resume:
        found = json.loads(about.read_text(encoding="utf-8"))
        other = next((key for key in {**found, **wanted} if found.get(key) != wanted.get(key)), None)
        if other is not None:
            raise OutputError(
                f"holds another run: its {other} is {found.get(other)}, now it is {wanted.get(other)}",
                where=str(out),
                notes=["give what it was begun with, or another --out"],
            )
        return Checkpoints(folder, warn)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(about) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written to: {error.strerror}", where=str(out)) from error
    return Checkpoints(folder, warn)
