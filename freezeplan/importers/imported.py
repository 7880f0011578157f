"""What an importer returns: the plan, and what a reader has to know about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from freezeplan.errors import PlanError
from freezeplan.plan.location import Source
from freezeplan.plan.refusal import refusal
from freezeplan.plan.schema import Plan


@dataclass(frozen=True)
class Imported:
    """A plan from another tool's file.

    Examples:
        >>> Imported.of(Path("args.yaml"), rules=[{"match": ".*", "lr_mult": 1}]).plan.name
        'args'
    """

    plan: Plan
    """Does what the file does, apart from what the notes say."""
    notes: tuple[str, ...] = ()
    """Differences from the tool, and what of the file was not taken over, with its place; one sentence each."""

    @classmethod
    def of(cls, path: Path, notes: Iterable[str] = (), **keys: Any) -> Imported:
        """Return the plan with these keys, called like the file.

        Raises:
            PlanError: Where a plan cannot hold what the file says.
        """
        with refused(str(path)):
            return cls(Plan(version=1, name=path.stem, **keys), tuple(notes))


@contextmanager
def refused(where: str) -> Iterator[None]:
    """Make parts of a plan of what a file says, or refuse that.

    Args:
        where: Its place.

    Raises:
        PlanError: Where a plan cannot hold it.

    Examples:
        >>> from freezeplan.plan.schema import Rule
        >>> with refused("s.yaml:2:5"):
        ...     Rule(match="fc", lr_mult=float("inf"))
        Traceback (most recent call last):
        ...
        freezeplan.errors.PlanError: s.yaml:2:5: lr_mult must be a finite number, found inf
    """
    try:
        yield
    except ValidationError as error:
        raise PlanError(replace(problem, where=where) for problem in refusal(error, Source()).problems) from None
